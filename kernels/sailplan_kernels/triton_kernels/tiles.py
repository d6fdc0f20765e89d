"""One program a tile: statistics (maximum and sum of exponentials), gradient (weights and
moments), rescale; any dtype, any lengths.
The pairwise sigmoid loss has a gradient kernel of its own (sigmoid_tiles.py), and large batches
another schedule (persistent.py).

A program computes a [BM, BN] tile of dot products in float32, in ONE pass over the dimensions: at
the end of every Matryoshka prefix the running sum is that prefix's dot product, read
(arithmetic.py) and then continued. The loop over prefixes is a loop at run time: one compiled
kernel serves any number of prefixes, and its registers do not grow with them.
"""

import triton
import triton.language as tl

from sailplan_kernels.triton_kernels.arithmetic import (
    VECTORS,
    tags_to_compare,
    tile_of,
    write_either_statistics,
    write_gradient,
    write_statistics,
)


@triton.jit
def add_segment(
    acc,
    rows,
    columns,
    bounds,
    om,
    on,
    n,
    m,
    D,
    p,
    STEP: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + rows[:, start:end] @ columns[:, start:end].T; ``bounds`` count in STEPs, by which
    loads may be as wide as STEP.
    """
    start, end = tl.load(bounds + p) * STEP, tl.load(bounds + p + 1) * STEP
    at = tl.arange(0, BK)
    left = rows + om[:, None].to(tl.int64) * D
    right = columns + on[None, :].to(tl.int64) * D
    for k in range(start, end, BK):
        d = k + at
        a = tl.load(left + d[None, :], mask=(om < n)[:, None] & (d < end)[None, :], other=0.0)
        b = tl.load(right + d[:, None], mask=(on < m)[None, :] & (d < end)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def places(om, on, n, pitch, BM: tl.constexpr, BN: tl.constexpr):
    """Of a tile's weights from its corner on, and which of them are inside; BM * pitch is below
    2^31.
    """
    return tl.arange(0, BM)[:, None] * pitch + tl.arange(0, BN)[None, :], (om < n)[:, None] & (
        on < pitch
    )[None, :]


@triton.jit
def corner(weights, pm, pn, n, pitch, p, BM: tl.constexpr, BN: tl.constexpr):
    """Where a tile's weights of prefix p begin, in [P, n, pitch]."""
    return weights + ((p * n.to(tl.int64) + pm * BM) * pitch + pn * BN)


@triton.jit
def add_to_prefixes(
    weights, pm, pn, om, on, n, pitch, prefixes, BM: tl.constexpr, BN: tl.constexpr
):
    """From each prefix's own weights, which this program has written, to those of all prefixes
    from it on, in place.

    Added up in float32 and from the longest prefix down: a weight is rounded twice at most,
    whatever the number of prefixes.
    """
    if prefixes > 1:
        tl.debug_barrier()  # another thread of this program may have written what this one reads
        place, inside = places(om, on, n, pitch, BM, BN)
        total = tl.load(
            corner(weights, pm, pn, n, pitch, prefixes - 1, BM, BN) + place, mask=inside, other=0.0
        ).to(tl.float32)
        for i in range(1, prefixes):
            here = corner(weights, pm, pn, n, pitch, prefixes - 1 - i, BM, BN) + place
            total += tl.load(here, mask=inside, other=0.0).to(tl.float32)
            tl.store(here, total.to(weights.dtype.element_ty), mask=inside)


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
    D,
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
    PRECISION: tl.constexpr,
):
    """row_* [P, TC, n], column_* [P, TR, m].

    KEEP (one prefix, rows only): kept [n, pitch] are the tile's exponentials.
    """
    pm, pn = tile_of(tl.program_id(0), n, m, BM, BN, GROUP)
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    live = tags_to_compare(row_tags, column_tags, om, on, N, M, tags)
    acc = tl.zeros((BM, BN), tl.float32)
    for p in range(prefixes):
        acc = add_segment(acc, rows, columns, bounds, om, on, n, m, D, p, STEP, BK, PRECISION)
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
    D,
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
    PRECISION: tl.constexpr,
):
    """weights [P, n, pitch]; row_* [P, TC, n], column_* [P, TR, m]."""
    pm, pn = tile_of(tl.program_id(0), n, m, BM, BN, GROUP)
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    live = tags_to_compare(row_tags, column_tags, om, on, N, M, tags)
    acc = tl.zeros((BM, BN), tl.float32)
    for p in range(prefixes):
        acc = add_segment(acc, rows, columns, bounds, om, on, n, m, D, p, STEP, BK, PRECISION)
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


@triton.jit(do_not_specialize=["row_factor", "column_factor", "n", "m"])
def rescale_kernel(
    kept, row_factor, column_factor, n, m, pitch, BM: tl.constexpr, BN: tl.constexpr
):
    """kept [n, pitch] exponentials to weights, in place: times row_factor [TC, n] of its tile,
    times column_factor [m].
    """
    pm, pn = tl.program_id(0), tl.program_id(1)
    om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    place = kept + om[:, None].to(tl.int64) * pitch + on[None, :]
    inside = (om < n)[:, None] & (on < pitch)[None, :]
    row = tl.load(row_factor + pn.to(tl.int64) * n + om, mask=om < n, other=0.0)
    column = tl.load(column_factor + on, mask=on < m, other=0.0)
    e = tl.load(place, mask=inside, other=0.0).to(tl.float32) * row[:, None] * column[None, :]
    place, inside = places(om, on, n, pitch, BM, BN)
    tl.store(
        corner(kept, pm, pn, n, pitch, 0, BM, BN) + place, e.to(kept.dtype.element_ty), mask=inside
    )
