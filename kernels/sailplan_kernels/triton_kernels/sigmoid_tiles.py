"""The pairwise sigmoid loss over a tile of scores: its value and its gradient in ONE pass, as no row waits for a denominator.

Built from the parts of tiles.py, whose words on masks, prefixes, determinism and registers hold here too.
"""

import triton
import triton.language as tl

from sailplan_kernels.triton_kernels.tiles import VECTORS, add_segment, add_to_prefixes, masked_cosines, row_logits, sigmoid, softplus, tile_of


@triton.jit
def add_each(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit(do_not_specialize=VECTORS)
def sigmoid_kernel(
    rows, columns, bounds, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit,
    row_scale, column_scale, row_shift, column_shift, row_push, weights, row_sum, row_total, row_moment, column_moment,
    n, m, D, pitch, prefixes,
    STEP: tl.constexpr, TAGS: tl.constexpr, LIMITS: tl.constexpr, MOMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights [P, n, pitch]; row_* [P, TC, n]; column_moment [P, TR, m], written with MOMENTS.

    row_sum: softplus of the logits, row_total: push * sigmoid.
    """
    pm, pn = tile_of(tl.program_id(0), n, m, BM, BN, GROUP)
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    inside = (om < n)[:, None] & (on < pitch)[None, :]
    place = weights + om[:, None].to(tl.int64) * pitch + on[None, :]
    layer = n.to(tl.int64) * pitch
    acc = tl.zeros((BM, BN), tl.float32)
    for p in range(prefixes):
        acc = add_segment(acc, rows, columns, bounds, om, on, n, m, D, p, STEP, BK, PRECISION)
        rn = tl.load(row_norm + p * n + om, mask=om < n, other=0.0)
        cn = tl.load(column_norm + p * m + on, mask=on < m, other=0.0)
        x = masked_cosines(acc, rn, cn, row_tags, column_tags, om, on, n, m, TAGS)
        z = row_logits(x, row_limit, row_scale, column_shift, om, on, n, m, p, LIMITS)
        at = (p * tiles_n + pn).to(tl.int64) * n + om
        push = tl.load(row_push + p * n + om, mask=om < n, other=0.0)
        g = sigmoid(z)
        loss, total, moment = tl.reduce((softplus(z), g, g * x), 1, add_each)
        tl.store(row_sum + at, loss, mask=om < n)
        tl.store(row_total + at, total * push, mask=om < n)
        scale = tl.load(row_scale + om, mask=om < n, other=0.0)
        push *= scale
        tl.store(row_moment + at, moment * push, mask=om < n)
        g *= push[:, None]
        if MOMENTS:
            tl.store(column_moment + (p * tiles_m + pm).to(tl.int64) * m + on, tl.sum(g * x, 0), mask=on < m)
        g = g * rn[:, None] * cn[None, :]
        tl.store(place + p * layer, g.to(weights.dtype.element_ty), mask=inside)
    add_to_prefixes(place, layer, inside, prefixes)
