"""All ranks receive all rows: all-gather forward, reduce-scatter-sum backward.

Bytes per rank: 2(W-1)mD for the gather in bf16 and 4(W-1)mD for the gradient in fp32 (m rows a
rank). Memory: the gathered rows and their gradient, O(W m D). A stream hands out this rank's own
rows while the others are in flight.

Ranks may hold different numbers of rows: the rows are padded to the longest, gathered, and the
padding cut away.
The gather owns its autograd function because the one torch ships returned silently wrong gradients
on gloo for a non-contiguous upstream gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sailplan_kernels.exchange.base import Gathering, Shard, Stream

# torch 2.13 renamed both collectives and warns at each call under the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Waitable(Protocol):
    """Something under way."""

    def wait(self) -> object: ...


class AllGather:
    """Exchange over a torch.distributed process group (None: the default group), gloo or nccl."""

    materializes_all = True

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is not a member, expected one of its ranks")

    def sizes(self, n: int) -> list[int]:
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        mine = torch.tensor([n], dtype=torch.int64, device=device)
        return self._all_gather(mine, [1] * self.world_size).tolist()

    def gather(self, x: Tensor, sizes: list[int] | None = None) -> Tensor:
        if sizes is None:
            sizes = self.sizes(x.shape[0])
        if sizes[self.rank] != x.shape[0]:
            raise ValueError(
                f"sizes: {sizes[self.rank]} for rank {self.rank}, expected the {x.shape[0]} rows "
                "of x"
            )
        return _Gather.apply(x, self, sizes)

    def reduce_scatter(self, x: Tensor, sizes: list[int]) -> Tensor:
        x = x.detach()
        longest = max(sizes)
        if any(size != longest for size in sizes):
            padded = x.new_zeros((self.world_size * longest, *x.shape[1:]))
            for rank, rows in enumerate(x.split(sizes)):
                padded[rank * longest : rank * longest + sizes[rank]] = rows
            x = padded
        mine = x.new_empty((longest, *x.shape[1:]))
        _reduce_scatter(mine, x.contiguous(), group=self.group)
        return mine[: sizes[self.rank]]

    def stream(self, x: Tensor, sizes: list[int], accumulate: torch.dtype) -> Stream:
        return _Gathered(self, x.detach(), sizes, accumulate)

    def start(self, everyone: Tensor, mine: Tensor) -> Waitable:
        """Begin to gather ``mine``, of equal size on all ranks, into ``everyone``."""
        return _all_gather(everyone, mine, group=self.group, async_op=True)

    def gather_parts(self, parts: Sequence[Tensor]) -> Gathering:
        mine = [x.detach().contiguous() for x in parts]
        everyone = [x.new_empty((self.world_size * len(x), *x.shape[1:])) for x in mine]
        # As bytes, because gloo joins what travels together into one tensor.
        return _Parts(
            everyone,
            self.start_parts(
                [x.view(-1).view(torch.uint8) for x in everyone],
                [x.view(-1).view(torch.uint8) for x in mine],
            ),
        )

    def start_parts(self, everyone: list[Tensor], mine: list[Tensor]) -> Waitable:
        """As ``start``, of several tensors in one collective."""
        return self._group.allgather_into_tensor_coalesced(everyone, mine)

    def reduce_scatter_parts(self, parts: Sequence[Tensor]) -> list[Tensor]:
        mine = [x.new_empty((len(x) // self.world_size, *x.shape[1:])) for x in parts]
        self._group.reduce_scatter_tensor_coalesced(mine, [x.contiguous() for x in parts]).wait()
        return mine

    @property
    def _group(self) -> dist.ProcessGroup:
        return self.group or dist.distributed_c10d._get_default_group()

    def sum(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        result = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, op=operation, group=self.group)
        return result

    def _all_gather(self, x: Tensor, sizes: list[int]) -> Tensor:
        if x.dtype is torch.bool:
            return self._all_gather(x.to(torch.uint8), sizes).to(torch.bool)
        longest = max(sizes)
        mine = x.detach()
        if x.shape[0] != longest:
            mine = x.new_zeros((longest, *x.shape[1:]))
            mine[: x.shape[0]] = x
        everyone = x.new_empty((self.world_size * longest, *x.shape[1:]))
        _all_gather(everyone, mine.contiguous(), group=self.group)
        if all(size == longest for size in sizes):
            return everyone
        return torch.cat(
            [part[:size] for part, size in zip(everyone.split(longest), sizes, strict=True)]
        )


class _Parts:
    def __init__(self, everyone: list[Tensor], work: Waitable) -> None:
        self.everyone, self.work = everyone, work

    def wait(self) -> list[Tensor]:
        self.work.wait()
        return self.everyone


class _Gathered:
    """The stream: one gather, started at once, waited for after the own rows; one buffer of
    gradients.
    """

    def __init__(
        self, exchange: AllGather, x: Tensor, sizes: list[int], accumulate: torch.dtype
    ) -> None:
        self.exchange, self.x, self.sizes, self.accumulate = exchange, x, sizes, accumulate
        self.longest = max(sizes)
        mine = x
        if len(x) != self.longest:
            mine = x.new_zeros((self.longest, *x.shape[1:]))
            mine[: len(x)] = x
        self.everyone = x.new_empty((exchange.world_size * self.longest, *x.shape[1:]))
        self.work: Waitable | None = exchange.start(self.everyone, mine.contiguous())
        self.gradient: Tensor | None = None

    def shards(self, accumulate: bool = False) -> Iterator[Shard]:
        if accumulate and self.gradient is None:
            self.gradient = torch.zeros_like(self.everyone, dtype=self.accumulate)
        rank, longest = self.exchange.rank, self.longest
        for first, last in ((rank, rank + 1), (0, rank), (rank + 1, len(self.sizes))):
            if first != rank and self.work is not None:
                self.work.wait()
                self.work = None
            # Padding lies between ranks of different sizes; without it neighbours are one shard.
            even = all(size == longest for size in self.sizes[first:last])
            for one in [(first, last)] if even else [(r, r + 1) for r in range(first, last)]:
                rows = slice(one[0] * longest, one[0] * longest + sum(self.sizes[slice(*one)]))
                if rows.stop > rows.start:
                    vectors = self.x if one == (rank, rank + 1) else self.everyone[rows]
                    yield Shard(
                        sum(self.sizes[: one[0]]),
                        vectors,
                        self.gradient[rows] if accumulate and self.gradient is not None else None,
                    )

    def finish(self) -> Tensor:
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.everyone, dtype=self.accumulate)
        mine = self.gradient.new_empty((self.longest, *self.x.shape[1:]))
        _reduce_scatter(mine, self.gradient, group=self.exchange.group)
        return mine[: len(self.x)]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, exchange: AllGather, sizes: list[int]) -> Tensor:
        ctx.exchange, ctx.sizes = exchange, sizes
        return exchange._all_gather(x, sizes)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.exchange.reduce_scatter(gradient.contiguous(), ctx.sizes), None, None
