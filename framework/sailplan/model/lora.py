"""Low-rank updates beside a matrix that may stay frozen: y = W x + alpha / rank * B (A x) (Hu et
al., arXiv 2106.09685).

B starts as zeros, so a fresh update changes nothing. Tensor parallelism follows the matrix that it
stands beside:

    column-parallel W (its rows cut)     A whole on every rank, B's rows cut; the gradient of A x is
    summed over ranks row-parallel W (its columns cut)     A's columns cut, B whole; A x is summed
    over ranks before B

so that whole factors have whole gradients on every rank and cut ones those of their part, as
everywhere in the tower.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from sailplan.config.schema import LoraConfig
from sailplan.model.encoders.omni.published import PublishedPart
from sailplan.model.protocol import repeated_layers

TARGETS = {"attention": ("linear_qkv", "linear_proj"), "mlp": ("linear_fc1", "linear_fc2")}


class LowRankUpdate(nn.Module):
    """The factors beside one linear layer; beside a parallel one A is drawn whole and then cut, as
    the layer's own weight.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        weight: Tensor = linear.weight  # type: ignore[assignment]
        self.scale = scale
        self.group: dist.ProcessGroup | None = getattr(linear, "tp_group", None)
        self.by_rows = not isinstance(linear, RowParallelLinear)
        parts = 1 if self.group is None else self.group.size()
        inputs = weight.shape[1] if self.by_rows else weight.shape[1] * parts
        whole = torch.randn(rank, inputs, dtype=torch.float32) / math.sqrt(inputs)
        if not self.by_rows:
            whole = whole.chunk(parts, 1)[0 if self.group is None else self.group.rank()].clone()
        self.a = nn.Parameter(whole.to(weight.dtype))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype))
        if isinstance(linear, nn.Linear):
            return
        cut: Any = self.b if self.by_rows else self.a
        cut.tensor_model_parallel, cut.partition_dim = True, 0 if self.by_rows else 1
        cut.partition_stride = getattr(weight, "partition_stride", 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs as the layer's own, [..., in]; returns what to add to its output."""
        inner = F.linear(inputs, self.a)
        if self.group is not None:
            inner = (
                copy_to_tensor_model_parallel_region(inner, self.group)
                if self.by_rows
                else reduce_from_tensor_model_parallel_region(inner, self.group)
            )
        return F.linear(inner, self.b) * self.scale


def _add_update(
    linear: nn.Module, inputs: tuple[object, ...], output: Tensor | tuple[Tensor, object]
) -> Tensor | tuple[Tensor, object]:
    update = linear.lora(inputs[0])  # type: ignore[operator]
    return output + update if isinstance(output, Tensor) else (output[0] + update, output[1])


def add_lora(parts: Mapping[str, nn.Module], config: LoraConfig) -> None:
    """Puts updates beside the targeted layers of the named parts, as their child `lora`; of a
    published encoder beside every linear one of its repeated layers.
    """
    names = [
        name
        for target, names in TARGETS.items()
        if target in config.targets or "all" in config.targets
        for name in names
    ]
    for part in config.parts:
        for name, module in list(parts[part].named_modules()):
            if (
                isinstance(module, (ColumnParallelLinear, RowParallelLinear))
                and name.rsplit(".", 1)[-1] in names
            ):
                _put_beside(module, config)
        for encoder in parts[part].modules():
            if isinstance(encoder, PublishedPart):
                linears = [
                    module
                    for layer in repeated_layers(encoder)
                    for module in layer.modules()
                    if isinstance(module, nn.Linear)
                ]
                for module in dict.fromkeys(linears):
                    _put_beside(module, config)


def _put_beside(linear: nn.Module, config: LoraConfig) -> None:
    linear.add_module("lora", LowRankUpdate(linear, config.rank, config.alpha / config.rank))
    linear.register_forward_hook(_add_update)


def is_lora(name: str) -> bool:
    """Whether a parameter's name is that of a factor, of ours or of peft's."""
    return ".lora." in name or ".lora_" in name


def merged(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Whole weights with the updates added to their matrices and the factors gone; the same
    mapping where there are none.
    """
    result = {name: value for name, value in weights.items() if not is_lora(name)}
    for name in _bases(weights):
        update = (
            weights[f"{name}.lora.b"].double()
            @ weights[f"{name}.lora.a"].double()
            * (config.alpha / config.rank)
        )
        result[f"{name}.weight"] = (result[f"{name}.weight"].double() + update).to(
            result[f"{name}.weight"].dtype
        )
    return result


def _bases(names: Iterable[str]) -> list[str]:
    return [name.removesuffix(".lora.a") for name in names if name.endswith(".lora.a")]
