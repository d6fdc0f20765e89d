"""What a loss needs from the other ranks, and nothing more.

Every method is a collective: all ranks of the exchange call it, in the same order, whether or not
their own tensors need gradients. A loss that computes its gradient in the forward pass streams over
everybody's rows and hands each shard's gradient in; a loss that leaves the gradient to autograd
uses ``gather`` alone, whose backward is the same sum.
Sums, never means: the convention across ranks is the loss's business (see infonce/api.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of all ranks' rows, in memory now."""

    start: int  # index of the first of them among all ranks' rows, in rank order
    vectors: Tensor  # [s, D]
    gradient: Tensor | None  # [s, D] add to it; None: this round carries no gradient


class Stream(Protocol):
    """All ranks' rows, a shard at a time, own rows first."""

    def shards(self, accumulate: bool = False) -> Iterator[Shard]:
        """One round over all rows.

        With ``accumulate`` each shard has a place for its gradient, zero at the first such round (a
        stream of an exchange that is not ``whole`` allows one such round). Use a shard before
        you ask for the next."""

    def finish(self) -> Tensor:
        """[n, D] sum over ranks of the gradients of this rank's own rows, after the round that
        accumulated them.
        """


class Gathering(Protocol):
    """Parts under way."""

    def wait(self) -> list[Tensor]:
        """[world_size * l, ...] of each part, in rank order."""


@runtime_checkable
class Exchange(Protocol):
    """Collectives over the ranks that share their negatives."""

    rank: int
    world_size: int
    materializes_all: bool  # a stream keeps all shards in memory: another round costs nothing

    def sizes(self, n: int) -> list[int]:
        """Every rank's ``n``, in rank order."""

    def gather(self, x: Tensor, sizes: list[int] | None = None) -> Tensor:
        """``x`` [n, ...] of all ranks, concatenated in rank order on dimension 0; n may differ
        from rank to rank.

        ``sizes`` (every rank's n) saves the collective that asks for it. Any dtype. Differentiable:
        the gradient is the sum over ranks of their gradients, each rank receiving its own rows; a
        rank whose ``x`` takes part in autograd then needs all other ranks to take part too.
        """

    def reduce_scatter(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Sum of all ranks' ``x`` [sum(sizes), ...], of which this rank gets its ``sizes[rank]``
        rows. No gradient.
        """

    def stream(self, x: Tensor, sizes: list[int], accumulate: torch.dtype) -> Stream:
        """All ranks' ``x`` [n, D] as a stream; gradients accumulate in ``accumulate``.

        May start to send at once.
        """

    def gather_parts(self, parts: Sequence[Tensor]) -> Gathering:
        """Begin to gather several tensors [l, ...], each of one shape and dtype on all ranks, in
        ONE collective. No gradient.
        """

    def reduce_scatter_parts(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sum of all ranks' [world_size * l, ...] of each part, of which this rank gets its l;
        ONE collective. No gradient.
        """

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over ranks, as a new tensor. No gradient."""

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over ranks, as a new tensor. No gradient."""
