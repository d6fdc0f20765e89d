"""The persistent schedule (persistent.py) for several prefixes, of which all but the longest end in whole BKs.

The loop over prefixes is one at run time, as in tiles.py, inside the loop over tiles. No pass of the compiler specialises the
warps of such a kernel; vectors still arrive through descriptors, ahead of the products, and no thread holds their addresses.
"""

import triton
import triton.language as tl

from sailplan_kernels.triton_kernels.arithmetic import VECTORS, tile_of, write_gradient, write_sigmoid, write_statistics
from sailplan_kernels.triton_kernels.persistent import add_products
from sailplan_kernels.triton_kernels.tiles import add_to_prefixes


@triton.jit
def places(weights, pm, pn, om, on, n, pitch, BM: tl.constexpr, BN: tl.constexpr):
    """Of a tile's weights of the first prefix, how far the next prefix's are, and which are inside; BM * pitch is below 2^31."""
    corner = weights + (pm.to(tl.int64) * BM * pitch + pn * BN)
    place = corner + (tl.arange(0, BM)[:, None] * pitch + tl.arange(0, BN)[None, :])
    return place, n.to(tl.int64) * pitch, (om < n)[:, None] & (on < pitch)[None, :]


@triton.jit(do_not_specialize=VECTORS)
def statistics_kernel(
    rows, columns, bounds, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit, row_scale, column_scale, row_shift, column_shift,
    row_maximum, row_sum, column_maximum, column_sum, n, m, prefixes,
    STEP: tl.constexpr, TAGS: tl.constexpr, LIMITS: tl.constexpr, COLUMNS: tl.constexpr, SIGMOID: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """rows, columns: descriptors of [n, length] and [m, length]. row_* [P, TC, n], column_* [P, TR, m]."""
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pm, pn = tile_of(tile, n, m, BM, BN, GROUP)
        om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for p in range(prefixes):
            start, end = tl.load(bounds + p) * STEP, tl.load(bounds + p + 1) * STEP
            acc = add_products(acc, rows, columns, pm, pn, start, end, BM, BN, BK)
            write_statistics(
                acc, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit, row_scale, column_scale, row_shift, column_shift,
                row_maximum, row_sum, column_maximum, column_sum, pm, pn, om, on, n, m, p, tiles_m, tiles_n, TAGS, LIMITS, COLUMNS, SIGMOID,
            )  # fmt: skip


@triton.jit(do_not_specialize=VECTORS)
def gradient_kernel(
    rows, columns, bounds, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit, row_scale, column_scale, row_shift, column_shift,
    row_log, row_push, column_log, column_push, weights, row_moment, column_moment, row_temperature, column_temperature, n, m, pitch, prefixes,
    STEP: tl.constexpr, TAGS: tl.constexpr, LIMITS: tl.constexpr, COLUMNS: tl.constexpr, MOMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """rows, columns: descriptors of [n, length] and [m, length]. weights [P, n, pitch]; row_* [P, TC, n], column_* [P, TR, m]."""
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pm, pn = tile_of(tile, n, m, BM, BN, GROUP)
        om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
        place, layer, inside = places(weights, pm, pn, om, on, n, pitch, BM, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for p in range(prefixes):
            start, end = tl.load(bounds + p) * STEP, tl.load(bounds + p + 1) * STEP
            acc = add_products(acc, rows, columns, pm, pn, start, end, BM, BN, BK)
            g = write_gradient(
                acc, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit, row_scale, column_scale, row_shift, column_shift,
                row_log, row_push, column_log, column_push, row_moment, column_moment, row_temperature, column_temperature,
                pm, pn, om, on, n, m, p, tiles_m, tiles_n, TAGS, LIMITS, COLUMNS, MOMENTS, AGAIN=True,
            )  # fmt: skip
            tl.store(place + p * layer, g.to(weights.dtype.element_ty), mask=inside)
        add_to_prefixes(place, layer, inside, prefixes)


@triton.jit(do_not_specialize=VECTORS)
def sigmoid_kernel(
    rows, columns, bounds, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit, row_scale, column_scale, row_shift, column_shift,
    row_push, weights, row_sum, row_total, row_moment, column_moment, n, m, pitch, prefixes,
    STEP: tl.constexpr, TAGS: tl.constexpr, LIMITS: tl.constexpr, MOMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """rows, columns: descriptors of [n, length] and [m, length]. weights [P, n, pitch]; row_* [P, TC, n]; column_moment [P, TR, m], with MOMENTS."""
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pm, pn = tile_of(tile, n, m, BM, BN, GROUP)
        om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
        place, layer, inside = places(weights, pm, pn, om, on, n, pitch, BM, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for p in range(prefixes):
            start, end = tl.load(bounds + p) * STEP, tl.load(bounds + p + 1) * STEP
            acc = add_products(acc, rows, columns, pm, pn, start, end, BM, BN, BK)
            g = write_sigmoid(
                acc, row_norm, column_norm, row_tags, column_tags, row_limit, row_scale, column_shift, row_push, row_sum, row_total, row_moment,
                column_moment, pm, pn, om, on, n, m, p, tiles_m, tiles_n, TAGS, LIMITS, MOMENTS, AGAIN=True,
            )  # fmt: skip
            tl.store(place + p * layer, g.to(weights.dtype.element_ty), mask=inside)
        add_to_prefixes(place, layer, inside, prefixes)
