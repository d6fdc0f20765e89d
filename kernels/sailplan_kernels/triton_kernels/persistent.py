"""As many programs as the device has processors, each going from tile to tile: for large batches
in half precision.

What a tile means is arithmetic.py's; this is only the way there, for sm_90 and later. Vectors
arrive through tensor descriptors, which the copy unit (TMA) reads: no thread holds their addresses,
and what lies beyond their ends reads as zeros; the host makes them (no device allocator). All
prefixes but the longest end in whole BKs. The loop over prefixes is one at run time, as in
tiles.py, inside the loop over tiles.
"""

import triton
import triton.language as tl

from sailplan_kernels.triton_kernels.arithmetic import (
    VECTORS,
    tags_to_compare,
    tile_of,
    write_either_statistics,
    write_gradient,
    write_sigmoid,
    write_statistics,
)
from sailplan_kernels.triton_kernels.tiles import add_to_prefixes, corner, places


@triton.jit
def add_products(
    acc, rows, columns, pm, pn, start, end, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """acc + rows[:, start:end] @ columns[:, start:end].T of tile (pm, pn), in the order of
    tiles.py.

    In whole BKs: ``end`` is one, or where the vectors end.
    """
    for k in range(start, end, BK):
        acc = tl.dot(
            rows.load([pm * BM, k]), columns.load([pn * BN, k]).T, acc, input_precision="ieee"
        )
    return acc


@triton.jit(do_not_specialize=VECTORS)
def statistics_kernel(
    rows,
    columns,
    bounds,
    row_norm,
    column_norm,
    row_tags,
    column_tags,
    row_max_cosine,
    column_max_cosine,
    row_scale,
    column_scale,
    row_shift,
    column_shift,
    row_maximum,
    row_sum,
    column_maximum,
    column_sum,
    kept,
    n,
    m,
    N,
    M,
    pitch,
    prefixes,
    tags,
    STEP: tl.constexpr,
    LIMITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED: tl.constexpr,
    SIGMOID: tl.constexpr,
    CACHED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """rows, columns: descriptors of [n, length] and [m, length].

    row_* [P, TC, n], column_* [P, TR, m]; with KEEP: kept [n, pitch].
    """
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pm, pn = tile_of(tile, n, m, BM, BN, GROUP)
        om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
        live = tags_to_compare(row_tags, column_tags, om, on, N, M, tags)
        acc = tl.zeros((BM, BN), tl.float32)
        for p in range(prefixes):
            start, end = tl.load(bounds + p) * STEP, tl.load(bounds + p + 1) * STEP
            acc = add_products(acc, rows, columns, pm, pn, start, end, BM, BN, BK)
            if SHARED:
                write_either_statistics(
                    acc,
                    row_norm,
                    column_norm,
                    row_tags,
                    column_tags,
                    row_max_cosine,
                    column_max_cosine,
                    row_scale,
                    column_scale,
                    row_shift,
                    column_shift,
                    row_maximum,
                    row_sum,
                    column_maximum,
                    column_sum,
                    pm,
                    pn,
                    om,
                    on,
                    n,
                    m,
                    N,
                    M,
                    p,
                    prefixes,
                    tiles_m,
                    tiles_n,
                    live,
                )
            else:
                e = write_statistics(
                    acc,
                    row_norm,
                    column_norm,
                    row_tags,
                    column_tags,
                    row_max_cosine,
                    column_max_cosine,
                    row_scale,
                    column_scale,
                    row_shift,
                    column_shift,
                    row_maximum,
                    row_sum,
                    column_maximum,
                    column_sum,
                    pm,
                    pn,
                    om,
                    on,
                    n,
                    m,
                    N,
                    M,
                    p,
                    tiles_m,
                    tiles_n,
                    live,
                    LIMITS,
                    COLUMNS,
                    SIGMOID,
                )
                if CACHED:
                    place, inside = places(om, on, n, pitch, BM, BN)
                    tl.store(
                        corner(kept, pm, pn, n, pitch, 0, BM, BN) + place,
                        e.to(kept.dtype.element_ty),
                        mask=inside,
                    )


@triton.jit(do_not_specialize=VECTORS)
def gradient_kernel(
    rows,
    columns,
    bounds,
    row_norm,
    column_norm,
    row_tags,
    column_tags,
    row_max_cosine,
    column_max_cosine,
    row_scale,
    column_scale,
    row_shift,
    column_shift,
    row_log,
    column_log,
    weights,
    row_moment,
    column_moment,
    row_temperature,
    column_temperature,
    n,
    m,
    N,
    M,
    pitch,
    prefixes,
    tags,
    STEP: tl.constexpr,
    LIMITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED: tl.constexpr,
    MOMENTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """rows, columns: descriptors of [n, length] and [m, length].

    weights [P, n, pitch]; row_* [P, TC, n], column_* [P, TR, m].
    """
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pm, pn = tile_of(tile, n, m, BM, BN, GROUP)
        om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
        live = tags_to_compare(row_tags, column_tags, om, on, N, M, tags)
        acc = tl.zeros((BM, BN), tl.float32)
        for p in range(prefixes):
            start, end = tl.load(bounds + p) * STEP, tl.load(bounds + p + 1) * STEP
            acc = add_products(acc, rows, columns, pm, pn, start, end, BM, BN, BK)
            g = write_gradient(
                acc,
                row_norm,
                column_norm,
                row_tags,
                column_tags,
                row_max_cosine,
                column_max_cosine,
                row_scale,
                column_scale,
                row_shift,
                column_shift,
                row_log,
                column_log,
                row_moment,
                column_moment,
                row_temperature,
                column_temperature,
                pm,
                pn,
                om,
                on,
                n,
                m,
                N,
                M,
                p,
                tiles_m,
                tiles_n,
                live,
                LIMITS,
                COLUMNS,
                SHARED,
                MOMENTS,
            )
            place, inside = places(om, on, n, pitch, BM, BN)
            tl.store(
                corner(weights, pm, pn, n, pitch, p, BM, BN) + place,
                g.to(weights.dtype.element_ty),
                mask=inside,
            )
        add_to_prefixes(weights, pm, pn, om, on, n, pitch, prefixes, BM, BN)


@triton.jit(do_not_specialize=VECTORS)
def sigmoid_kernel(
    rows,
    columns,
    bounds,
    row_norm,
    column_norm,
    row_tags,
    column_tags,
    row_max_cosine,
    column_max_cosine,
    row_scale,
    column_scale,
    row_shift,
    column_shift,
    row_log,
    weights,
    row_sum,
    row_total,
    row_moment,
    column_moment,
    n,
    m,
    N,
    M,
    pitch,
    prefixes,
    tags,
    STEP: tl.constexpr,
    LIMITS: tl.constexpr,
    MOMENTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """rows, columns: descriptors of [n, length] and [m, length].

    weights [P, n, pitch]; row_* [P, TC, n]; column_moment [P, TR, m], with MOMENTS.
    """
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pm, pn = tile_of(tile, n, m, BM, BN, GROUP)
        om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
        live = tags_to_compare(row_tags, column_tags, om, on, N, M, tags)
        acc = tl.zeros((BM, BN), tl.float32)
        for p in range(prefixes):
            start, end = tl.load(bounds + p) * STEP, tl.load(bounds + p + 1) * STEP
            acc = add_products(acc, rows, columns, pm, pn, start, end, BM, BN, BK)
            g = write_sigmoid(
                acc,
                row_norm,
                column_norm,
                row_tags,
                column_tags,
                row_max_cosine,
                row_scale,
                column_shift,
                row_log,
                row_sum,
                row_total,
                row_moment,
                column_moment,
                pm,
                pn,
                om,
                on,
                n,
                m,
                N,
                M,
                p,
                tiles_m,
                tiles_n,
                live,
                LIMITS,
                MOMENTS,
            )
            place, inside = places(om, on, n, pitch, BM, BN)
            tl.store(
                corner(weights, pm, pn, n, pitch, p, BM, BN) + place,
                g.to(weights.dtype.element_ty),
                mask=inside,
            )
        add_to_prefixes(weights, pm, pn, om, on, n, pitch, prefixes, BM, BN)
