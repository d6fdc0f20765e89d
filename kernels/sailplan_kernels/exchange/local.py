"""One rank alone: every collective is the identity."""

from __future__ import annotations

from torch import Tensor


class Local:
    """The exchange of a single rank. See Exchange for the methods."""

    rank = 0
    world_size = 1

    def sizes(self, n: int) -> list[int]:
        return [n]

    def gather(self, x: Tensor, sizes: list[int] | None = None) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor, sizes: list[int]) -> Tensor:
        return x.detach()

    def sum(self, x: Tensor) -> Tensor:
        return x.detach().clone()

    def max(self, x: Tensor) -> Tensor:
        return x.detach().clone()
