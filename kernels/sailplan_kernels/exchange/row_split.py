"""Tensor-parallel peers hold the same embeddings: each does its share of the rows.

Without it T peers compute the same scores T times. Here peer t takes rows t n/T to (t+1) n/T
against all candidates; what is a row's own comes together again inside the group, the keys' partial
gradients are summed there, and every peer returns the full, equal result. To all who do not ask for
peers, a RowSplit is the exchange it wraps: a loss that knows nothing of shares is computed whole on
every peer and is as right.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sailplan_kernels.exchange.base import Exchange, Gathering, Stream
from sailplan_kernels.exchange.local import Local


class RowSplit:
    """The exchange ``inner`` of this rank's data-parallel group, and ``peers``, the exchange of
    its tensor-parallel group.
    """

    def __init__(self, inner: Exchange, peers: Exchange) -> None:
        self.inner, self.peers = inner, peers
        self.rank, self.world_size, self.materializes_all = (
            inner.rank,
            inner.world_size,
            inner.materializes_all,
        )

    def sizes(self, n: int) -> list[int]:
        return self.inner.sizes(n)

    def gather(self, x: Tensor, sizes: list[int] | None = None) -> Tensor:
        return self.inner.gather(x, sizes)

    def reduce_scatter(self, x: Tensor, sizes: list[int]) -> Tensor:
        return self.inner.reduce_scatter(x, sizes)

    def stream(self, x: Tensor, sizes: list[int], accumulate: torch.dtype) -> Stream:
        return self.inner.stream(x, sizes, accumulate)

    def gather_parts(self, parts: Sequence[Tensor]) -> Gathering:
        return self.inner.gather_parts(parts)

    def reduce_scatter_parts(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return self.inner.reduce_scatter_parts(parts)

    def sum(self, x: Tensor) -> Tensor:
        return self.inner.sum(x)

    def max(self, x: Tensor) -> Tensor:
        return self.inner.max(x)


def peers_of(exchange: Exchange) -> Exchange:
    """Those who hold the same rows as this rank: the tensor-parallel group of a RowSplit, else
    this rank alone.
    """
    return (
        exchange.peers
        if isinstance(exchange, RowSplit) and exchange.peers.world_size > 1
        else Local()
    )


def shares(n: int, peers: Exchange) -> tuple[list[int], slice]:
    """How many of ``n`` rows each peer does, as even as can be, and which are this rank's."""
    bounds = [n * t // peers.world_size for t in range(peers.world_size + 1)]
    return [b - a for a, b in pairwise(bounds)], slice(bounds[peers.rank], bounds[peers.rank + 1])
