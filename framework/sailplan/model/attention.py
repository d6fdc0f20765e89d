"""Core attention over packed rows: one long sequence in which every position sees those of its
own row alone, without a mask.

Rows of equal length are neighbours (`data.packing`), so there are three ways, which compute the
same:

    all rows are of one length                 scaled_dot_product_attention of [rows, heads, length,
    d] on CUDA in half precision, no dropout      torch's varlen_attn (flash kernels by cumulative
    lengths) else                                       scaled_dot_product_attention once for each
    length

What attention must know of the rows travels through megatron-core's layers in the place of the
mask. Rotary angles are by position within the row; their sines and cosines are taken once for all
layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from sailplan.config.fields import Options
from sailplan.data.packing import Runs

HALF = (torch.bfloat16, torch.float16)
VARLEN_DEVICES = ("cuda",)
_VARLEN: list[
    tuple[Callable[..., Any], bool]
] = []  # torch's function, and whether it knows groups of query heads (torch 2.12)


class Sequences(NamedTuple):
    """The rows of a packed sequence, shortest first."""

    runs: Runs  # (rows, length), on the host
    ends: Tensor  # int32 [n + 1], cumulative lengths, on the sequence's device
    longest: int
    equal: bool  # one length only
    rotation: tuple[Tensor, Tensor] | None = (
        None  # cosines and sines of the rotary angles, [p, 1, d]
    )
    lengths: Tensor | None = (
        None  # `runs` as int64 [k, 2] on the CPU: what a compiled layer hands on
    )

    @classmethod
    def of(cls, runs: Runs, ends: Tensor | None, device: torch.device) -> Sequences:
        """ends: of any integer type; None where there is one run."""
        if device.type in VARLEN_DEVICES:
            load_varlen()  # outside of what is compiled
        if ends is None:
            ((rows, length),) = runs
            ends = torch.arange(rows + 1, dtype=torch.int32, device=device) * length
        return cls(
            runs,
            ends.to(torch.int32),
            max(length for _, length in runs),
            len(runs) == 1,
            lengths=torch.tensor(runs),
        )

    def filled_up(self, extra: int) -> Sequences:
        """With a row of `extra` positions behind the others."""
        total = sum(rows * length for rows, length in self.runs) + extra
        rotation = (
            None
            if self.rotation is None
            else tuple(F.pad(part, (0, 0, 0, 0, 0, extra)) for part in self.rotation)
        )
        runs = (*self.runs, (1, extra))
        ends, longest = F.pad(self.ends, (0, 1), value=total), max(self.longest, extra)
        return Sequences(runs, ends, longest, False, rotation, torch.tensor(runs))  # type: ignore[arg-type]

    def rotated_by(self, angles: Tensor, dtype: torch.dtype) -> Sequences:
        """angles: float32 [p, d]."""
        return self._replace(
            rotation=(angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None])
        )


def rotated(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """heads [p, heads, d] turned by rotary angles (Su et al., 2021; halves, not pairs)."""
    first, second = heads.chunk(2, -1)
    return heads * rotation[0] + torch.cat([-second, first], -1) * rotation[1]


class PackedAttention(nn.Module):
    """Core attention over this rank's heads, behind the constructor and the call of
    megatron-core's specifications.

    Every position attends to all of its row, or with `attn_mask_type` causal to itself and those
    before it.
    """

    def __init__(self, config: TransformerConfig, **_: object) -> None:
        super().__init__()
        self.config = config
        self.dropout = config.attention_dropout
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Sequences,
        attn_mask_type: AttnMaskType = AttnMaskType.no_mask,
        **_: object,
    ) -> Tensor:
        """query [p, 1, heads, d], key and value [p, 1, key_value_heads, d].

        Returns [p, 1, heads * d].
        """
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if attention_mask.rotation is not None:
            query, key = (
                rotated(query, attention_mask.rotation),
                rotated(key, attention_mask.rotation),
            )
        context = self.attend(
            query, key, value, attention_mask, attn_mask_type == AttnMaskType.causal
        )
        return context.flatten(1)[:, None]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rows: Sequences, causal: bool
    ) -> Tensor:
        """query [p, heads, d], key and value [p, key_value_heads, d].

        Returns [p, heads, d] or [p, heads * d].
        """
        dropout = self.dropout if self.training else 0.0
        if rows.equal:
            return _equal(query, key, value, rows.longest, causal, dropout)
        if not dropout and takes_varlen(query):
            return _by_cumulative_lengths(query, key, value, rows, causal)
        if torch.compiler.is_compiling():
            assert rows.lengths is not None
            return _compiled(query, key, value, rows.lengths, causal, dropout)
        return by_length(query, key, value, rows.runs, causal, dropout)


def takes_varlen(query: Tensor) -> bool:
    """Whether torch's flash kernels take such heads [.., d] by cumulative lengths."""
    return (
        query.device.type in VARLEN_DEVICES
        and query.dtype in HALF
        and query.size(-1) % 8 == 0
        and query.size(-1) <= 256
    )


def load_varlen() -> None:
    """Its import takes seconds, so only where it is wanted."""
    if not _VARLEN:
        from torch.nn.attention.varlen import varlen_attn

        _VARLEN.append((varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters))


def _by_cumulative_lengths(
    query: Tensor, key: Tensor, value: Tensor, rows: Sequences, causal: bool
) -> Tensor:
    ((attend, knows_groups),) = _VARLEN
    groups = query.size(1) // key.size(1)
    options: Options = {"window_size": (-1, 0) if causal else (-1, -1)}
    if groups > 1 and knows_groups:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return attend(query, key, value, rows.ends, rows.ends, rows.longest, rows.longest, **options)


def _equal(
    query: Tensor, key: Tensor, value: Tensor, length: int, causal: bool, dropout: float
) -> Tensor:
    """Rows of one length."""
    grouped = query.size(1) != key.size(1)
    query, key, value = (
        part.unflatten(0, (-1, length)).transpose(1, 2) for part in (query, key, value)
    )
    context = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
    )
    return context.transpose(1, 2).flatten(0, 1)


def by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[Sequence[int]],
    causal: bool,
    dropout: float,
) -> Tensor:
    """One call for each length.

    The cuts are one operation each, so that backward writes every gradient once.
    """
    sizes = [rows * length for rows, length in runs]
    parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), runs, strict=True)
    return torch.cat([_equal(q, k, v, length, causal, dropout) for q, k, v, (_, length) in parts])


# A compiled layer would be compiled anew for every list of lengths: to it the calls are one opaque
# operation, whose backward repeats the attention. Dropout draws from a seed, so that the repetition
# drops the same weights.
def _compiled(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, causal: bool, dropout: float
) -> Tensor:
    seed = torch.randint(2**62, ()) if dropout else torch.zeros((), dtype=torch.int64)
    return torch.ops.sailplan.attention_by_length(query, key, value, lengths, seed, causal, dropout)


@contextmanager
def _drawing_from(seed: Tensor, dropout: float, device: torch.device) -> Iterator[None]:
    if not dropout:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        yield


@torch.library.custom_op("sailplan::attention_by_length", mutates_args=())
def _operation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    seed: Tensor,
    causal: bool,
    dropout: float,
) -> Tensor:
    with _drawing_from(seed, dropout, query.device):
        return by_length(query, key, value, lengths.tolist(), causal, dropout)


def _backward_operation(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    seed: Tensor,
    causal: bool,
    dropout: float,
) -> tuple[Tensor, ...]:
    with torch.enable_grad(), _drawing_from(seed, dropout, query.device):
        leaves = [part.detach().requires_grad_() for part in (query, key, value)]
        context = by_length(leaves[0], leaves[1], leaves[2], lengths.tolist(), causal, dropout)
    return torch.autograd.grad(context, leaves, gradient)


# Not a custom_op: what runs inside of one is not differentiated.
_LIBRARY = torch.library.Library("sailplan", "FRAGMENT")
_LIBRARY.define(
    "attention_by_length_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor "
    "lengths, Tensor seed, "
    "bool causal, float dropout) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("attention_by_length_backward", _backward_operation, "CompositeExplicitAutograd")


@_operation.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.register_fake("sailplan::attention_by_length_backward")
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[object, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.sailplan.attention_by_length_backward(
        gradient, *ctx.saved_tensors, *ctx.options
    )
    return (*gradients, None, None, None, None)


_operation.register_autograd(_backward, setup_context=_keep)
