"""One rank alone: every collective is the identity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sailplan_kernels.exchange.base import Shard


class Local:
    """The exchange of a single rank. See Exchange for the methods."""

    rank = 0
    world_size = 1
    materializes_all = True

    def sizes(self, n: int) -> list[int]:
        return [n]

    def gather(self, x: Tensor, sizes: list[int] | None = None) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor, sizes: list[int]) -> Tensor:
        return x.detach()

    def stream(self, x: Tensor, sizes: list[int], accumulate: torch.dtype) -> _OwnRows:
        return _OwnRows(x, accumulate)

    def gather_parts(self, parts: Sequence[Tensor]) -> _OwnParts:
        return _OwnParts(parts)

    def reduce_scatter_parts(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return list(parts)

    def sum(self, x: Tensor) -> Tensor:
        return x.detach().clone()

    def max(self, x: Tensor) -> Tensor:
        return x.detach().clone()


class _OwnParts:
    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = parts

    def wait(self) -> list[Tensor]:
        return list(self.parts)


class _OwnRows:
    def __init__(self, x: Tensor, accumulate: torch.dtype) -> None:
        self.x, self.accumulate = x.detach(), accumulate
        self.gradient: Tensor | None = None

    def shards(self, accumulate: bool = False) -> Iterator[Shard]:
        if accumulate and self.gradient is None:
            self.gradient = torch.zeros_like(self.x, dtype=self.accumulate)
        yield Shard(0, self.x, self.gradient if accumulate else None)

    def finish(self) -> Tensor:
        return (
            torch.zeros_like(self.x, dtype=self.accumulate)
            if self.gradient is None
            else self.gradient
        )
