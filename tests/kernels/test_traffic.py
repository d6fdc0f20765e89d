"""Bytes that go to and from memory while a gradient accumulates, counted, at one memory budget."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sailplan_kernels import LossOptions, infonce
from sailplan_kernels.infonce.exchange_schedule import tile_sides
from sailplan_kernels.tiling.products import add_product

aten = torch.ops.aten
FULL, HALF = 4, 2  # bytes


def accumulation_bytes(
    n: int, m: int, dimension: int, tile: tuple[int, int], temporary: bool = False
) -> int:
    """Read and written of both sides' float32 gradients in one round over tiles; a temporary is
    written, read, and added in an operation of its own.
    """
    rows, columns = tile
    of_rows, of_columns = (
        -(-m // columns) * n * dimension * FULL,
        -(-n // rows) * m * dimension * FULL,
    )
    return (of_rows + of_columns) * (4 if temporary else 2)


def test_square_tiles_in_place_move_an_eighth_of_what_slivers_with_a_temporary_did():
    """64k x 64k, D = 768, three prefixes in half precision, the default budget: half of the
    gradients, of which a tile gets half.
    """
    n, d, prefixes = 65536, 768, 3
    area = 2 * n * d * FULL // 2 // 2 // (HALF * prefixes)
    slivers = (area // n, n)
    tile = tile_sides(n, n, area)
    assert tile[0] * tile[1] <= area and tile == (4096, 4096)
    before = accumulation_bytes(n, n, d, slivers, temporary=True)
    square, now = (accumulation_bytes(n, n, d, tile, temporary) for temporary in (True, False))
    assert before > 8 * square > 15 * now, (before, square, now)
    assert now < 13.5e9 and before > 200e9  # 4.5 ms instead of 69 at 3 TB/s


def test_tiles_cover_what_is_asked_within_the_area():
    for n, m in ((1, 1), (32, 65536), (300, 70), (65536, 32), (5000, 5000), (8192, 8192), (0, 40)):
        for area in (1, 5000, 60_000, 728_000, 17_000_000, 10**10):
            rows, columns = tile_sides(n, m, area)
            assert 1 <= rows <= max(16, n + 127) and 1 <= columns <= max(64, m + 127)
            assert rows * columns <= max(area, 16 * 64)
            assert min(rows, columns) >= min(n, m, 128, int(max(area, 1) ** 0.5) // 2)


class AccumulatedBytes(TorchDispatchMode):
    """Of the targets of products and of sums of matrices, read and written."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.dimension, self.total = dimension, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is aten.addmm_.default and result.shape[1] == self.dimension:
            self.total += 2 * result.numel() * result.element_size()
        elif (
            function in (aten.add_.Tensor, aten.mm.default, aten.mm.dtype)
            and result.dim() == 2
            and result.shape[1] == self.dimension
        ):
            self.total += (
                (1 + 2 * (function is aten.add_.Tensor)) * result.numel() * result.element_size()
            )
        return result


def test_a_loss_moves_what_the_arithmetic_says():
    n, d, budget = 2048, 24, 2**20
    g = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(n, d, generator=g, requires_grad=True) for _ in range(2))
    tile = tile_sides(
        n, n, budget // 2 // (3 * FULL + 3)
    )  # cosines and both losses' logits, and what masks and exclusions take
    assert tile == (128, 256)
    with AccumulatedBytes(d) as moved:
        infonce(
            queries,
            keys,
            0.05,
            symmetric=True,
            options=LossOptions(backend="chunked", memory_budget=budget),
        )
    assert moved.total == accumulation_bytes(n, n, d, tile)


def test_a_product_is_added_in_place():
    target, a, b = torch.ones(4, 30), torch.ones(4, 6), torch.ones(6, 24)
    with AccumulatedBytes(24) as moved:
        add_product(target[:, :24], a, b)
    assert (
        moved.total == 2 * 4 * 24 * FULL
        and target[:, :24].eq(7).all()
        and target[:, 24:].eq(1).all()
    )
