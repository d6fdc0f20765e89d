"""As many programs as the device has processors, each going from tile to tile: for large batches in half precision, one prefix.
(Several prefixes: persistent_prefixes.py.)

What a tile means is arithmetic.py's; this is only the way there, for sm_90 and later. Vectors arrive through tensor descriptors,
which the copy unit (TMA) reads: no thread holds their addresses, and what lies beyond their ends reads as zeros. With
SPECIALISED the compiler gives the copies, and on sm_100 the matrix products, warps of their own, which run ahead into the next
tile while the others still take exponentials of this one.

Descriptors are made by the host (no device allocator). The weights leave through one with DESCRIPTOR_STORE. What the compiler
takes differs: on sm_90 it specialises with FLATTEN off and 4 warps (it adds 8), gives each group of warps half of a tile's rows
and then takes neither sums over rows nor stores through a descriptor; on sm_100 it specialises with FLATTEN on and takes both.
"""

import triton
import triton.language as tl

from sailplan_kernels.triton_kernels.arithmetic import VECTORS, tile_of, write_gradient, write_sigmoid, write_statistics


@triton.jit
def add_products(acc, rows, columns, pm, pn, start, end, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """acc + rows[:, start:end] @ columns[:, start:end].T of tile (pm, pn), in the order of tiles.py.

    In whole BKs: ``end`` is one, or where the vectors end.
    """
    for k in range(start, end, BK):
        acc = tl.dot(rows.load([pm * BM, k]), columns.load([pn * BN, k]).T, acc, input_precision="ieee")
    return acc


@triton.jit
def store_tile(target, x, pm, pn, om, on, n, pitch, BM: tl.constexpr, BN: tl.constexpr, DESCRIPTOR_STORE: tl.constexpr):
    """To target [n, pitch], a descriptor or a pointer. Places inside a tile are counted in 32 bits: BM * pitch is below 2^31."""
    if DESCRIPTOR_STORE:
        target.store([pm * BM, pn * BN], x.to(target.dtype))
    else:
        corner = target + (pm.to(tl.int64) * BM * pitch + pn * BN)
        inside = (om < n)[:, None] & (on < pitch)[None, :]
        tl.store(corner + (tl.arange(0, BM)[:, None] * pitch + tl.arange(0, BN)[None, :]), x.to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VECTORS)
def statistics_kernel(
    rows, columns, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit, row_scale, column_scale, row_shift, column_shift,
    row_maximum, row_sum, column_maximum, column_sum, kept, n, m, length, pitch,
    TAGS: tl.constexpr, LIMITS: tl.constexpr, COLUMNS: tl.constexpr, SIGMOID: tl.constexpr, KEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SPECIALISED: tl.constexpr, FLATTEN: tl.constexpr, DESCRIPTOR_STORE: tl.constexpr,
):  # fmt: skip
    """rows, columns: descriptors of [n, length] and [m, length]. row_* [TC, n], column_* [TR, m]; with KEEP: kept [n, pitch]."""
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALISED):
        pm, pn = tile_of(tile, n, m, BM, BN, GROUP)
        om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
        acc = add_products(tl.zeros((BM, BN), tl.float32), rows, columns, pm, pn, 0, length, BM, BN, BK)
        e = write_statistics(
            acc, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit, row_scale, column_scale, row_shift, column_shift,
            row_maximum, row_sum, column_maximum, column_sum, pm, pn, om, on, n, m, 0, tiles_m, tiles_n, TAGS, LIMITS, COLUMNS, SIGMOID,
        )  # fmt: skip
        if KEEP:
            store_tile(kept, e, pm, pn, om, on, n, pitch, BM, BN, DESCRIPTOR_STORE)


@triton.jit(do_not_specialize=VECTORS)
def gradient_kernel(
    rows, columns, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit, row_scale, column_scale, row_shift, column_shift,
    row_log, row_push, column_log, column_push, weights, row_moment, column_moment, row_temperature, column_temperature, n, m, length, pitch,
    TAGS: tl.constexpr, LIMITS: tl.constexpr, COLUMNS: tl.constexpr, MOMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SPECIALISED: tl.constexpr, FLATTEN: tl.constexpr, DESCRIPTOR_STORE: tl.constexpr,
):  # fmt: skip
    """rows, columns: descriptors of [n, length] and [m, length]. weights [n, pitch]; row_* [TC, n], column_* [TR, m]."""
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALISED):
        pm, pn = tile_of(tile, n, m, BM, BN, GROUP)
        om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
        acc = add_products(tl.zeros((BM, BN), tl.float32), rows, columns, pm, pn, 0, length, BM, BN, BK)
        g = write_gradient(
            acc, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit, row_scale, column_scale, row_shift, column_shift,
            row_log, row_push, column_log, column_push, row_moment, column_moment, row_temperature, column_temperature,
            pm, pn, om, on, n, m, 0, tiles_m, tiles_n, TAGS, LIMITS, COLUMNS, MOMENTS, AGAIN=True,
        )  # fmt: skip
        store_tile(weights, g, pm, pn, om, on, n, pitch, BM, BN, DESCRIPTOR_STORE)


@triton.jit(do_not_specialize=VECTORS)
def sigmoid_kernel(
    rows, columns, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit, row_scale, column_scale, row_shift, column_shift,
    row_push, weights, row_sum, row_total, row_moment, column_moment, n, m, length, pitch,
    TAGS: tl.constexpr, LIMITS: tl.constexpr, MOMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SPECIALISED: tl.constexpr, FLATTEN: tl.constexpr, DESCRIPTOR_STORE: tl.constexpr,
):  # fmt: skip
    """rows, columns: descriptors of [n, length] and [m, length]. weights [n, pitch]; row_* [TC, n]; column_moment [TR, m], with MOMENTS."""
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALISED):
        pm, pn = tile_of(tile, n, m, BM, BN, GROUP)
        om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
        acc = add_products(tl.zeros((BM, BN), tl.float32), rows, columns, pm, pn, 0, length, BM, BN, BK)
        g = write_sigmoid(
            acc, row_norm, column_norm, row_tags, column_tags, row_limit, row_scale, column_shift,
            row_push, row_sum, row_total, row_moment, column_moment, pm, pn, om, on, n, m, 0, tiles_m, tiles_n, TAGS, LIMITS, MOMENTS, AGAIN=True,
        )  # fmt: skip
        store_tile(weights, g, pm, pn, om, on, n, pitch, BM, BN, DESCRIPTOR_STORE)
