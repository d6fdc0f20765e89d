"""In what width gradients travel home: float32, also of bfloat16 embeddings, because less would
break the promise on their error.

A key's gradient is a sum over all ranks, in which its positive's pull is most of what stands out. A
collective that adds in bfloat16 rounds the sum at every rank that it passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sailplan_kernels import LossOptions, infonce
from sailplan_kernels.exchange import AllGather
from sailplan_kernels.testing import run_ranks

RANKS, ROWS, D, BAR = 8, 24, 64, 3e-3  # the bar of test_numerics.py for bfloat16


class Noted(AllGather):
    """Notes the bytes of vectors that leave and of gradients that come home."""

    def __init__(self) -> None:
        super().__init__()
        self.out = self.home = 0

    def gather_parts(self, parts: Sequence[Tensor]):
        self.out += sum(x.nbytes for x in parts if x.is_floating_point() and x.shape[-1] == D)
        return super().gather_parts(parts)

    def reduce_scatter_parts(self, parts: Sequence[Tensor]) -> list[Tensor]:
        self.home += sum(x.nbytes for x in parts if x.shape[-1] == D)
        return super().reduce_scatter_parts(parts)


class InHalf(AllGather):
    """Adds in bfloat16, rank by rank round the ring, as a collective of such tensors does."""

    def reduce_scatter_parts(self, parts: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for x in parts:
            of_all = (
                self.gather_parts([x])
                .wait()[0]
                .view(self.world_size, self.world_size, -1, *x.shape[1:])[:, self.rank]
            )
            total = of_all[(self.rank + 1) % self.world_size].bfloat16()
            for step in range(2, self.world_size + 1):
                total = total + of_all[(self.rank + step) % self.world_size].bfloat16()
            found.append(total.to(x.dtype))
        return found


def vectors() -> tuple[Tensor, Tensor]:
    """bfloat16 [RANKS * ROWS, D] of topics, whose nearest negatives are about as near as the
    positives.
    """
    g = torch.Generator().manual_seed(0)
    draw = lambda rows: torch.randn(rows, D, generator=g)  # noqa: E731
    queries = draw(12)[torch.arange(RANKS * ROWS) % 12] + 0.5 * draw(RANKS * ROWS)
    return queries.bfloat16(), (queries + 0.3 * draw(RANKS * ROWS)).bfloat16()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("temperature", [0.02, 0.05])
def test_gradients_come_home_in_float32_for_less_breaks_the_bar(temperature):
    whole = [x.double().requires_grad_() for x in vectors()]
    infonce(*whole, temperature, options=LossOptions(backend="reference")).loss.backward()

    def work(rank: int, ranks: int):
        found = []
        for exchange in (Noted(), InHalf()):
            queries, keys = (x.split(ROWS)[rank].clone().requires_grad_() for x in vectors())
            infonce(
                queries,
                keys,
                temperature,
                exchange=exchange,
                options=LossOptions(sizes=[(ROWS, ROWS)] * ranks, backend="chunked"),
            ).loss.backward()
            found.append((keys.grad.float() / ranks, exchange))
        (own, noted), (half, _) = found
        return own, half, noted.out, noted.home

    parts = run_ranks(work, RANKS, timeout=60)
    own, half = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    assert error(own, whole[1].grad) <= BAR < error(half, whole[1].grad)
    out, home = (
        ROWS * D * 4,
        RANKS * ROWS * D * 4,
    )  # one shard leaves; on a CPU in float32, as its products round half precision
    assert all((part[2], part[3]) == (out, home) for part in parts)
