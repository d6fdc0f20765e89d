"""What a loss needs from the other ranks, and nothing more.

Every method is a collective: all ranks of the exchange call it, in the same order, whether or not their own tensors
need gradients. A loss that computes its gradient in the forward pass uses ``gather`` without autograd and
``reduce_scatter``; a loss that leaves the gradient to autograd uses ``gather`` alone, whose backward is that same
reduce-scatter. Sums, never means: the convention across ranks is the loss's business (see infonce/api.py).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Exchange(Protocol):
    """Collectives over the ranks that share their negatives."""

    rank: int
    world_size: int

    def sizes(self, n: int) -> list[int]:
        """Every rank's ``n``, in rank order."""

    def gather(self, x: Tensor, sizes: list[int] | None = None) -> Tensor:
        """``x`` [n, ...] of all ranks, concatenated in rank order on dimension 0; n may differ from rank to rank.

        ``sizes`` (every rank's n) saves the collective that asks for it. Any dtype. Differentiable: the gradient is
        the sum over ranks of their gradients, each rank receiving its own rows; a rank whose ``x`` takes part in
        autograd then needs all other ranks to take part too.
        """

    def reduce_scatter(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Sum of all ranks' ``x`` [sum(sizes), ...], of which this rank gets its ``sizes[rank]`` rows. No gradient."""

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over ranks, as a new tensor. No gradient."""

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over ranks, as a new tensor. No gradient."""
