"""The pairwise sigmoid loss over a tile of scores: its value and its gradient in ONE pass, as no
row waits for a denominator.

Built from the parts of tiles.py, whose words on prefixes hold here too.
"""

import triton
import triton.language as tl

from sailplan_kernels.triton_kernels.arithmetic import (
    VECTORS,
    tags_to_compare,
    tile_of,
    write_sigmoid,
)
from sailplan_kernels.triton_kernels.tiles import add_segment, add_to_prefixes, corner, places


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
    D,
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
    PRECISION: tl.constexpr,
):
    """weights [P, n, pitch]; row_* [P, TC, n]; column_moment [P, TR, m], written with MOMENTS."""
    pm, pn = tile_of(tl.program_id(0), n, m, BM, BN, GROUP)
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    live = tags_to_compare(row_tags, column_tags, om, on, N, M, tags)
    acc = tl.zeros((BM, BN), tl.float32)
    for p in range(prefixes):
        acc = add_segment(acc, rows, columns, bounds, om, on, n, m, D, p, STEP, BK, PRECISION)
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
