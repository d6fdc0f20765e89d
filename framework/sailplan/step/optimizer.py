"""AdamW and its parameter groups; what a stage trains.

Matrices decay; norms, biases and other vectors do not; temperatures have a learning rate of their own and do not
decay. Sharded parameters (DTensor) and plain ones never share a group, because the fused update refuses the mix.
Each group carries `name` and `peak_learning_rate`, so that a schedule is one number: `set_learning_rate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sailplan.config.schema import OptimizerConfig
from sailplan.errors import ConfigurationError
from sailplan.model.parallelize import reshard


def build_optimizer(encoder: nn.Module, objectives: nn.Module, temperatures: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), fused, over all parameters, frozen ones included.

    Call it after the encoder was sharded. Groups, empty ones left out: encoder_decay, encoder_no_decay, objectives_decay,
    objectives_no_decay, temperatures. A frozen parameter has no gradient and is not touched, not even by decay.
    """
    reshard(encoder)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for prefix, module in (("encoder", encoder), ("objectives", objectives)):
        for parameter in module.parameters():
            name = f"{prefix}_decay" if parameter.ndim >= 2 else f"{prefix}_no_decay"
            groups.setdefault((name, isinstance(parameter, DTensor)), []).append(parameter)
    groups[("temperatures", False)] = list(temperatures.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "name": name, "peak_learning_rate": 0.0} for (name, _), parameters in groups.items() if parameters],
        fused=True,
    )
    configure(optimizer, config)
    return optimizer


def configure(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Gives the groups a stage's settings, at their peak learning rates; the moments stay."""
    for group in optimizer.param_groups:
        own = config.temperature_learning_rate if group["name"] == "temperatures" else config.learning_rate
        group["peak_learning_rate"] = group["lr"] = own
        group["weight_decay"] = config.weight_decay if group["name"].endswith("_decay") and not group["name"].endswith("_no_decay") else 0.0
        group["betas"] = (config.betas[0], config.betas[1])
        group["eps"] = config.epsilon


def set_learning_rate(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Sets every group's learning rate to `scale` times its peak (train.schedule.learning_rate_scale)."""
    for group in optimizer.param_groups:
        group["lr"] = scale * group["peak_learning_rate"]


def set_trainable(encoder: Any, objectives: nn.Module, temperatures: nn.Module, parts: Sequence[str]) -> None:
    """Lets only the named parts have gradients: all, objectives, temperatures, or parts of the encoder (`encoder.parts()`).

    May be called at any time between steps, also on a sharded encoder. Raises ConfigurationError for an unknown part.
    """
    # FSDP2 copies the flag from the sharded to the gathered parameter when it gathers: gathered ones must go first.
    reshard(encoder)
    own = encoder.parts()
    unknown = [part for part in parts if part not in ("all", "objectives", "temperatures", *own)]
    if unknown or not parts:
        found = ", ".join(unknown) or "nothing"
        raise ConfigurationError(f"stages.*.trainable: found {found}, expected some of all, {', '.join(own)}, objectives, temperatures")
    chosen = {name: list(parameters) for name, parameters in own.items()}
    chosen |= {"objectives": list(objectives.parameters()), "temperatures": list(temperatures.parameters())}
    for name, parameters in chosen.items():
        for parameter in parameters:
            parameter.requires_grad_("all" in parts or name in parts)
            if not parameter.requires_grad:
                parameter.grad = None
