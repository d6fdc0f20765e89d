"""Rows shared out over tensor-parallel peers: each encodes a part of them, and all get the whole.

Tensor-parallel peers hold the same rows. A part of the model that each of T peers holds whole need
not run on all rows on each of them: a peer encodes 1/T of the rows, and one gather of the part's
output (a few tokens a row) replaces the two all-reduces a layer, forward and backward, that cutting
its matrices costs.

What follows the gather is the same on all peers, and so is the gradient that comes back
(megatron-core sums it where the tower's matrices are cut): a peer takes its own rows' slice of it,
without a message. Its gradient of the part's parameters is then that of its rows alone, a part of
the sum, which `parallelize.finish_gradients` forms once a step.

The rows are filled up to a multiple of T with absent ones, so that peers make the same calls
whatever the rows hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


class _GatherRows(torch.autograd.Function):
    """Equal numbers of rows of every peer, in peers' order; backward: the own rows' slice of a
    gradient that all peers have.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.first, ctx.rows = group.rank() * len(mine), len(mine)  # type: ignore[attr-defined]
        whole = mine.new_empty((group.size() * len(mine), *mine.shape[1:]))
        dist.all_gather_into_tensor(whole, mine.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        first, rows = ctx.first, ctx.rows  # type: ignore[attr-defined]
        return gradient[first : first + rows], None


def mark_shared(module: nn.Module) -> None:
    """Notes on the parameters of a part that peers hold whole and run on their own rows: not
    cut, gradients to be summed.
    """
    for parameter in module.parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        parameter.tensor_parallel_partial = True  # type: ignore[attr-defined]


def encode_own_rows(
    encode: Callable[..., Sequence[Tensor]],
    group: dist.ProcessGroup | None,
    *inputs: Tensor,
    dropout: bool = False,
) -> Sequence[Tensor]:
    """`encode(*inputs)`, each peer of `group` running its part of the rows; None: the whole, here.

    inputs: [b, ...] with b at least 1, the same on all peers. encode: whole on every peer and row
    by row; a row of zeros must be absent to it. dropout: whether it draws random numbers: then each
    peer draws its own, and afterwards all peers' generators are again alike. Returns what `encode`
    does, each [b, ...] and the same on all peers.
    """
    if group is None or group.size() == 1:
        return encode(*inputs)
    rows = len(inputs[0])
    each = -(-rows // group.size())
    own = [_padded_rows(tensor, group.rank() * each, each) for tensor in inputs]
    if not dropout:
        return [_GatherRows.apply(part, group)[:rows] for part in encode(*own)]  # type: ignore[no-untyped-call]
    seed = int(torch.randint(2**62, ()))  # from the CPU's generator, which is alike on all peers
    with torch.random.fork_rng(devices=[inputs[0].device] if inputs[0].is_cuda else []):
        torch.manual_seed(seed + group.rank())
        parts = encode(*own)
    return [_GatherRows.apply(part, group)[:rows] for part in parts]  # type: ignore[no-untyped-call]


def _padded_rows(tensor: Tensor, first: int, count: int) -> Tensor:
    """Rows first..first+count, those past the end zeros."""
    mine = tensor[first : first + count]
    return (
        mine
        if len(mine) == count
        else torch.cat([mine, mine.new_zeros((count - len(mine), *mine.shape[1:]))])
    )
