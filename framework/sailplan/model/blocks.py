"""Transformer blocks, bidirectional or causal, made of unmodified megatron-core parts.

megatron-core brings the tensor-parallel linears and the layer wiring; the core attention is
`model.attention`'s and the norm is torch's RMSNorm or LayerNorm. Rows lie one behind the other,
[positions of all rows, 1, hidden] in megatron-core's order, whether they are of one length or not.

Weights are drawn as whole matrices on the CPU and then cut, so that a seed gives the same model at
every tensor-parallel size.

Dropout draws from torch's global generator. Tensor-parallel peers must be seeded alike, so that
they drop the same hidden units; the dropped attention weights then depend on the tensor-parallel
size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from sailplan.config.schema import TransformerShape
from sailplan.model.attention import PackedAttention, Sequences


def initial_deviation(hidden: int) -> float:
    """Standard deviation of fresh weights, sqrt(2 / (5 hidden)): "SmallInit" of Nguyen and
    Salazar (2019).

    It is 0.046 at hidden 192 and 0.016 at 1536: the usual 0.02, made to fit narrow models too.
    """
    return math.sqrt(2 / (5 * hidden))


_UNCUT: ContextVar[bool] = ContextVar("uncut", default=False)


@contextmanager
def uncut(on: bool = True) -> Iterator[None]:
    """Layers that are built inside the block are whole on every tensor-parallel rank."""
    token = _UNCUT.set(on)
    try:
        yield
    finally:
        _UNCUT.reset(token)


def process_groups() -> ProcessGroupCollection:
    """megatron-core's groups, or empty ones where no world was started (building on the meta
    device to count parameters).
    """
    if not parallel_state.model_parallel_is_initialized():
        return ProcessGroupCollection(tp=None, cp=None, pp=None)
    # Nothing is context parallel, so that group holds this rank alone: what megatron-core's layers
    # take for a world of one.
    alone = parallel_state.get_context_parallel_group()
    return ProcessGroupCollection(
        tp=alone if _UNCUT.get() else parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
    )


class Norm(nn.RMSNorm):
    """torch's RMSNorm behind the constructor that megatron-core's specifications call."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


class CenteredNorm(nn.LayerNorm):
    """torch's LayerNorm behind the same constructor."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


NORMS: dict[str, type[nn.Module]] = {"rms": Norm, "layer": CenteredNorm}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class HeadNorm(Norm):
    """Norm of each query or key head.

    One weight serves the heads of all tensor-parallel ranks, but each rank sees
    only its own heads: its gradient is a part of the sum (see `parallelize.finish_gradients`)."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **options: object
    ) -> None:
        super().__init__(config, hidden_size, eps, **options)
        self.weight.tensor_parallel_partial = True  # type: ignore[attr-defined]


class RowLinear(RowParallelLinear):
    """megatron-core's, naming its group where that layer leaves it to a default and warns on
    rank 0: a compiler would stop there.
    """

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *args: object,
        tp_group: object = None,
        **options: object,
    ) -> Tensor:
        return super()._forward_impl(input, weight, *args, tp_group=self.tp_group, **options)


def head_size(shape: TransformerShape) -> int:
    return shape.head_size or shape.hidden // shape.heads


def transformer_config(
    shape: TransformerShape,
    dtype: torch.dtype,
    tensor_parallel: int,
    *,
    sequence_parallel: bool = False,
) -> TransformerConfig:
    """The megatron-core configuration of one stack; every fusion that needs a GPU extension is
    off (see `model.fused`).
    """
    return TransformerConfig(
        num_layers=max(shape.layers, 1),  # of an empty stack only the norm is built
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.key_value_heads or shape.heads,
        ffn_hidden_size=shape.feed_forward,
        hidden_dropout=shape.dropout,
        attention_dropout=shape.dropout,
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=sequence_parallel,
        init_method_std=initial_deviation(
            shape.hidden
        ),  # output projections: divided by sqrt(2 layers) by megatron-core
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        kv_channels=head_size(shape),
        normalization="RMSNorm" if shape.norm == "rms" else "LayerNorm",
        layernorm_epsilon=shape.norm_epsilon,
        activation_func=ACTIVATIONS[shape.activation],
        gated_linear_unit=shape.gated,
        add_bias_linear=shape.bias,
        add_qkv_bias=shape.query_key_value_bias,
        qk_layernorm=shape.query_key_norm,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def _layer(shape: TransformerShape) -> ModuleSpec:
    head_norm = {"q_layernorm": HeadNorm, "k_layernorm": HeadNorm} if shape.query_key_norm else {}
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=PackedAttention,
        linear_proj=RowLinear,
        **head_norm,
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowLinear)
    norm = NORMS[shape.norm]
    mask_type = AttnMaskType.causal if shape.causal else AttnMaskType.no_mask
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": mask_type}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP, params={"ffn_hidden_size": shape.feed_forward}, submodules=mlp
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def rotary_frequencies(head_size: int, base: float, device: torch.device) -> Tensor:
    """float32 [head_size / 2] (Su et al., 2021)."""
    return base ** (-torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size)


def rotary_angles(places: Tensor, head_size: int, base: float) -> Tensor:
    """Angles of rotary position embedding of places int64 [p], float32 [p, head_size]."""
    angles = places.float()[:, None] * rotary_frequencies(head_size, base, places.device)
    return torch.cat([angles, angles], -1)


def interleaved_angles(
    places: Tensor, head_size: int, base: float, sections: Sequence[int]
) -> Tensor:
    """Rotary angles of places in three dimensions, float32 [p, head_size].

    places: int64 [3, p], frame, row and column. Of each three neighbouring frequencies the second
    follows the row and the third the column, up to sections[1] and sections[2] of them; all others
    follow the frame ("interleaved MRoPE" of Qwen3-VL, arXiv 2511.21631). With three equal places
    these are the angles of `rotary_angles`.
    """
    frequencies = rotary_frequencies(head_size, base, places.device)
    followed = places.float()[0, :, None].expand(-1, head_size // 2).clone()
    for number in (1, 2):
        followed[:, number : 3 * sections[number] : 3] = places.float()[number, :, None]
    angles = followed * frequencies
    return torch.cat([angles, angles], -1)


class Blocks(nn.Module):
    """A stack of pre-norm blocks and a final norm; a norm alone where `shape.layers` is 0.

    final_norm: False leaves the last norm out, for backbones that norm later.
    sequence_parallel: between the tensor-parallel matrices each rank holds a part of the positions
    (Korthikanti et al., arXiv 2205.05198): norms, sums and what is saved for them shrink with the
    number of ranks, and an all-gather and a reduce-scatter take the place of an all-reduce.
    Positions are filled up to a multiple of the ranks.
    """

    def __init__(
        self,
        shape: TransformerShape,
        dtype: torch.dtype,
        rope_base: float | None = None,
        *,
        final_norm: bool = True,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        groups = process_groups()
        size = groups.tp.size() if groups.tp is not None else 1
        self.cut_positions: dist.ProcessGroup | None = (
            groups.tp if sequence_parallel and size > 1 and shape.layers else None
        )
        config = transformer_config(
            shape, dtype, size, sequence_parallel=self.cut_positions is not None
        )
        self.rope_base = rope_base
        self.head_size = head_size(shape)
        self.causal = shape.causal
        norm = NORMS[shape.norm]
        if shape.layers:
            submodules = TransformerBlockSubmodules(
                layer_specs=[_layer(shape)] * shape.layers, layer_norm=norm if final_norm else None
            )
            self.block: nn.Module = TransformerBlock(config, submodules, pg_collection=groups)
        else:
            self.block = (
                norm(config, shape.hidden, shape.norm_epsilon) if final_norm else nn.Identity()
            )
        self.layers = shape.layers
        if self.cut_positions is not None:
            for parameter in self.block.parameters():
                if not getattr(
                    parameter, "tensor_model_parallel", False
                ):  # norms and biases see this rank's positions alone
                    parameter.tensor_parallel_partial = True  # type: ignore[attr-defined]

    def forward(
        self,
        hidden: Tensor,
        rows: Sequences | None = None,
        angles: Tensor | None = None,
        after: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """hidden [b, s, h], rows of one length that attend to all of themselves; or with `rows`
        packed, [p, h]. Returns the same shape.

        angles: rotary angles float32 [s, head_size], or packed [p, head_size]; None: of the
        positions 0, 1, 2, ..., where the stack has rotary angles and is not packed.
        after: called with each layer's number and output, in the shape of `hidden`; what it returns
        goes into the next layer.
        """
        if not self.layers:
            return self.block(hidden)
        shape = hidden.shape
        if rows is None:
            rows = Sequences.of(((shape[0], shape[1]),), None, hidden.device)
            if angles is None and self.rope_base is not None:
                angles = rotary_angles(
                    torch.arange(shape[1], device=hidden.device), self.head_size, self.rope_base
                )
            angles = None if angles is None else angles.repeat(shape[0], 1)
            hidden = hidden.flatten(0, 1)
        if angles is not None:
            rows = rows.rotated_by(angles, hidden.dtype)
        positions = len(hidden)
        if self.cut_positions is not None and (extra := -positions % self.cut_positions.size()):
            hidden, rows = F.pad(hidden, (0, 0, 0, extra)), rows.filled_up(extra)
        hidden = hidden[:, None]
        if after is not None:
            return self._layer_by_layer(
                hidden, rows, lambda layer, output: after(layer, output.reshape(shape))
            ).reshape(shape)
        if self.cut_positions is not None:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.cut_positions)
        output = self.block(hidden, attention_mask=rows)
        if self.cut_positions is not None:  # the gradient that comes back is whole on every rank
            output = gather_from_sequence_parallel_region(
                output, tensor_parallel_output_grad=False, group=self.cut_positions
            )
        return output[:positions].reshape(shape)

    def _layer_by_layer(
        self, hidden: Tensor, rows: Sequences, after: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        """hidden [p, 1, h] and the result; `after` sees whole sequences, so they must not be
        cut.
        """
        assert self.cut_positions is None
        for number, layer in enumerate(self.block.layers):  # type: ignore[arg-type, var-annotated]
            hidden, _ = layer(hidden_states=hidden, attention_mask=rows)
            hidden = after(number, hidden).reshape(hidden.shape)
        norm = self.block.final_layernorm
        return hidden if norm is None else norm(hidden)  # type: ignore[operator]
