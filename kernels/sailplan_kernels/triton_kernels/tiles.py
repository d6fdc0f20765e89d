"""Kernels over tiles of scores: statistics (maximum and sum of exponentials), gradient (weights and moments), rescale.
The pairwise sigmoid loss has a gradient kernel of its own (sigmoid_tiles.py).

One program computes one [BM, BN] tile of dot products in float32, in ONE pass over the dimensions: at the end of every
Matryoshka prefix the running sum is that prefix's dot product, read and then continued. The loop over prefixes is a loop
at run time: one compiled kernel serves any number of prefixes, and its registers do not grow with them. Statistics and
gradient call the same function for the masked cosines, in the same order, so a pair is masked in both or in neither. Each
tile writes its own partial results; nothing is added atomically, so results are bitwise equal from run to run.

What is excluded stands at FLOOR: finite, so that products with 0 stay 0, and with an exponential of exactly 0. A column
that is no candidate has a shift of OUT, which does the same to its logits; a row that is none likewise for the columns.
A thread holds few rows and many columns of a tile, so vectors over columns are what registers are short of: there are few.

Exponentials are taken to the base 2, with the logits multiplied by log2(e) beforehand.
Legend: n rows, m columns, P prefixes, T tags, TR and TC the number of tiles along rows and columns.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-1e30)
EMPTY = tl.constexpr(-1e20)  # a maximum below it is that of nothing
OUT = tl.constexpr(1e30)
# Chunks of rows start anywhere: what is read as a vector is compiled for any alignment, one kernel for all of them.
VECTORS = [
    "bounds", "row_norm", "column_norm", "row_tags", "column_tags", "row_limit", "column_limit", "row_scale", "column_scale",
    "row_shift", "column_shift", "row_maximum", "row_sum", "column_maximum", "column_sum", "row_log", "row_push", "column_log",
    "column_push", "row_moment", "column_moment", "row_temperature", "column_temperature", "row_total", "n", "m", "prefixes",
]  # fmt: skip


@triton.jit
def tile_of(program, n, m, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Tiles go down groups of GROUP rows before they go right, so that the operands in work stay in L2."""
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = program % (GROUP * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def add_segment(acc, rows, columns, bounds, om, on, n, m, D, p, STEP: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """acc + rows[:, start:end] @ columns[:, start:end].T; ``bounds`` count in STEPs, by which loads may be as wide as STEP."""
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
def masked_cosines(acc, rn, cn, row_tags, column_tags, om, on, n, m, TAGS: tl.constexpr):
    """Cosines, FLOOR where row and column share a tag. Tags of rows that are none are -2, those of columns -1."""
    x = acc * rn[:, None] * cn[None, :]
    for t in tl.static_range(TAGS):
        mine = tl.load(row_tags + t * n + om, mask=om < n, other=-2)
        theirs = tl.load(column_tags + t * m + on, mask=on < m, other=-1)
        x = tl.where(mine[:, None] == theirs[None, :], FLOOR, x)
    return x


@triton.jit
def row_logits(x, row_limit, row_scale, column_shift, om, on, n, m, p, LIMITS: tl.constexpr):
    """Logits of the row loss times log2(e), hugely negative where the pair is masked."""
    scale = tl.load(row_scale + om, mask=om < n, other=0.0) * LOG2E
    shift = tl.load(column_shift + on, mask=on < m, other=OUT) * LOG2E
    z = x * scale[:, None] - shift[None, :]
    if LIMITS:
        limit = tl.load(row_limit + p * n + om, mask=om < n, other=float("inf"))
        z = tl.where(x > limit[:, None], FLOOR, z)
    return z


@triton.jit
def column_logits(x, row_shift, column_limit, column_scale, om, on, n, m, p, LIMITS: tl.constexpr):
    """As row_logits, of the column loss. Columns that are no candidates have logits nobody may read."""
    scale = tl.load(column_scale + on, mask=on < m, other=0.0) * LOG2E
    shift = tl.load(row_shift + om, mask=om < n, other=OUT)
    z = x * scale[None, :] - shift[:, None]
    if LIMITS:
        limit = tl.load(column_limit + p * m + on, mask=on < m, other=float("inf"))
        z = tl.where(x > limit[None, :], FLOOR, z)
    return z


@triton.jit
def softplus(z):
    """log(1 + e^z) of a logit times log2(e); 0 at FLOOR. Small results keep their digits.

    log(1 + x) = 2 artanh(s), s = x / (2 + x), as its series: s is at most 1/3, where what is left out is 1e-8 of the result.
    The library's logarithm takes more registers than a tile has left.
    """
    x = tl.exp2(-tl.abs(z))
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(z, 0.0) / LOG2E + 2.0 * s * series


@triton.jit
def sigmoid(z):
    x = tl.exp2(-tl.abs(z))
    return tl.where(z >= 0, 1.0, x) / (1.0 + x)


@triton.jit
def add_to_prefixes(place, layer, inside, prefixes):
    """From each prefix's own weights, which this program has written, to those of all prefixes from it on, in place.

    Added up in float32 and from the longest prefix down: a weight is rounded twice at most, whatever the number of prefixes.
    """
    if prefixes > 1:
        tl.debug_barrier()  # another thread of this program may have written what this one reads
        total = tl.load(place + (prefixes - 1) * layer, mask=inside, other=0.0).to(tl.float32)
        for i in range(1, prefixes):
            here = place + (prefixes - 1 - i) * layer
            total += tl.load(here, mask=inside, other=0.0).to(tl.float32)
            tl.store(here, total.to(place.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VECTORS)
def statistics_kernel(
    rows, columns, bounds, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit,
    row_scale, column_scale, row_shift, column_shift, row_maximum, row_sum, column_maximum, column_sum, kept,
    n, m, D, pitch, prefixes,
    STEP: tl.constexpr, TAGS: tl.constexpr, LIMITS: tl.constexpr, COLUMNS: tl.constexpr, SIGMOID: tl.constexpr, KEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial maxima and sums: row_* [P, TC, n], column_* [P, TR, m], maxima in units of log2.

    KEEP (one prefix, rows only): kept [n, pitch] are the exponentials relative to the maximum of their row in this tile.
    """
    pm, pn = tile_of(tl.program_id(0), n, m, BM, BN, GROUP)
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for p in range(prefixes):
        acc = add_segment(acc, rows, columns, bounds, om, on, n, m, D, p, STEP, BK, PRECISION)
        rn = tl.load(row_norm + p * n + om, mask=om < n, other=0.0)
        cn = tl.load(column_norm + p * m + on, mask=on < m, other=0.0)
        x = masked_cosines(acc, rn, cn, row_tags, column_tags, om, on, n, m, TAGS)
        z = row_logits(x, row_limit, row_scale, column_shift, om, on, n, m, p, LIMITS)
        at = (p * tiles_n + pn).to(tl.int64) * n + om
        if SIGMOID:
            tl.store(row_sum + at, tl.sum(softplus(z), 1), mask=om < n)
        else:
            top = tl.max(z, 1)
            finite = tl.where(top < EMPTY, 0.0, top)
            e = tl.exp2(z - finite[:, None])
            tl.store(row_maximum + at, tl.where(top < EMPTY, float("-inf"), top), mask=om < n)
            tl.store(row_sum + at, tl.sum(e, 1), mask=om < n)
            if KEEP:
                place = kept + om[:, None].to(tl.int64) * pitch + on[None, :]
                tl.store(place, e.to(kept.dtype.element_ty), mask=(om < n)[:, None] & (on < pitch)[None, :])
        if COLUMNS:
            z = column_logits(x, row_shift, column_limit, column_scale, om, on, n, m, p, LIMITS)
            at = (p * tiles_m + pm).to(tl.int64) * m + on
            top = tl.max(z, 0)
            total = tl.sum(tl.exp2(z - tl.where(top < EMPTY, 0.0, top)[None, :]), 0)
            out = (top < EMPTY) | (tl.load(column_shift + on, mask=on < m, other=OUT) >= OUT)
            tl.store(column_maximum + at, tl.where(out, float("-inf"), top), mask=on < m)
            tl.store(column_sum + at, tl.where(out, 0.0, total), mask=on < m)


@triton.jit(do_not_specialize=VECTORS)
def gradient_kernel(
    rows, columns, bounds, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit,
    row_scale, column_scale, row_shift, column_shift, row_log, row_push, column_log, column_push, weights,
    row_moment, column_moment, row_temperature, column_temperature, n, m, D, pitch, prefixes,
    STEP: tl.constexpr, TAGS: tl.constexpr, LIMITS: tl.constexpr, COLUMNS: tl.constexpr, MOMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights [P, n, pitch]; row_* [P, TC, n], column_* [P, TR, m]. column_push is 0 for columns that are no candidates."""
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
        down = (p * tiles_m + pm).to(tl.int64) * m + on
        push = tl.load(row_push + p * n + om, mask=om < n, other=0.0)
        scale = tl.load(row_scale + om, mask=om < n, other=0.0)
        log = tl.load(row_log + p * n + om, mask=om < n, other=0.0) * LOG2E
        # A logit is below its own logsumexp; rows without push may hold any, and 0 * inf is NaN.
        g = tl.exp2(tl.minimum(z - log[:, None], 1.0)) * (push * scale)[:, None]
        if COLUMNS:
            tl.store(row_temperature + at, tl.sum(g * x, 1), mask=om < n)
            z = column_logits(x, row_shift, column_limit, column_scale, om, on, n, m, p, LIMITS)
            log = tl.load(column_log + p * m + on, mask=on < m, other=0.0) * LOG2E
            c = tl.exp2(tl.minimum(z - log[None, :], 1.0))
            push = tl.load(column_push + p * m + on, mask=on < m, other=0.0)
            scale = tl.load(column_scale + on, mask=on < m, other=0.0)
            c *= (push * scale)[None, :]
            tl.store(column_temperature + down, tl.sum(c * x, 0), mask=on < m)
            g += c
        if MOMENTS:
            tl.store(row_moment + at, tl.sum(g * x, 1), mask=om < n)
            tl.store(column_moment + down, tl.sum(g * x, 0), mask=on < m)
        g = g * rn[:, None] * cn[None, :]
        tl.store(place + p * layer, g.to(weights.dtype.element_ty), mask=inside)
    add_to_prefixes(place, layer, inside, prefixes)


@triton.jit(do_not_specialize=["row_factor", "column_factor", "n", "m"])
def rescale_kernel(kept, row_factor, column_factor, n, m, pitch, BM: tl.constexpr, BN: tl.constexpr):
    """kept [n, pitch] exponentials to weights, in place: times row_factor [TC, n] of its tile, times column_factor [m]."""
    pm, pn = tl.program_id(0), tl.program_id(1)
    om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    place = kept + om[:, None].to(tl.int64) * pitch + on[None, :]
    inside = (om < n)[:, None] & (on < pitch)[None, :]
    row = tl.load(row_factor + pn.to(tl.int64) * n + om, mask=om < n, other=0.0)
    column = tl.load(column_factor + on, mask=on < m, other=0.0)
    e = tl.load(place, mask=inside, other=0.0).to(tl.float32) * row[:, None] * column[None, :]
    tl.store(place, e.to(kept.dtype.element_ty), mask=inside)
