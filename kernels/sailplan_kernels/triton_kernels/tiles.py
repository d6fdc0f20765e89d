"""Two kernels over tiles of scores: statistics (maximum and sum of exponentials) and gradient (weights and moments).

One program computes one [BM, BN] tile of dot products in float32, in ONE pass over the dimensions: at the end of every
Matryoshka prefix the running sum is that prefix's dot product, read and then continued. Both kernels call the same
function for the dot product, the cosine and the masks, in the same order, so a pair is masked in both or in neither.
Each tile writes its own partial results; nothing is added atomically, so results are bitwise equal from run to run.

Exponentials are taken to the base 2, with the logits multiplied by log2(e) beforehand.
Legend: n rows, m columns, P prefixes, T tags, TR and TC the number of tiles along rows and columns.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_of(program, n, m, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Tiles go down groups of GROUP rows before they go right, so that the operands in work stay in L2."""
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = program % (GROUP * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def add_segment(
    acc, rows, columns, om, on, n, m, D, START: tl.constexpr, END: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """acc + rows[:, START:END] @ columns[:, START:END].T"""
    at = tl.arange(0, BK)
    left = rows + om[:, None].to(tl.int64) * D
    right = columns + on[None, :].to(tl.int64) * D
    for k in range(START, END, BK):
        d = k + at
        a = tl.load(left + d[None, :], mask=(om < n)[:, None] & (d < END)[None, :], other=0.0)
        b = tl.load(right + d[:, None], mask=(on < m)[None, :] & (d < END)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def cosine_of(acc, row_norm, column_norm, om, on, n, m, p: tl.constexpr):
    rn = tl.load(row_norm + p * n + om, mask=om < n, other=0.0)
    cn = tl.load(column_norm + p * m + on, mask=on < m, other=0.0)
    return acc * rn[:, None] * cn[None, :], rn, cn


@triton.jit
def masked_by_identity(x, row_tags, column_tags, column_valid, om, on, n, m, TAGS: tl.constexpr):
    """x where the column is valid and shares no tag with the row, else -inf. Tags of rows that are none are -2."""
    x = tl.where((tl.load(column_valid + on, mask=on < m, other=0) != 0)[None, :], x, float("-inf"))
    for t in tl.static_range(TAGS):
        mine = tl.load(row_tags + t * n + om, mask=om < n, other=-2)
        theirs = tl.load(column_tags + t * m + on, mask=on < m, other=-1)
        x = tl.where(mine[:, None] == theirs[None, :], float("-inf"), x)
    return x


@triton.jit
def row_logits(
    cosine, identity, row_limit, row_scale, correction, om, on, n, m, p: tl.constexpr, LIMITS: tl.constexpr
):
    """Logits of the row loss times log2(e), -inf where the pair is masked."""
    scale = tl.load(row_scale + om, mask=om < n, other=0.0) * LOG2E
    shift = tl.load(correction + on, mask=on < m, other=0.0) * LOG2E
    z = tl.where(identity == float("-inf"), identity, cosine * scale[:, None] - shift[None, :])
    if LIMITS:
        limit = tl.load(row_limit + p * n + om, mask=om < n, other=float("inf"))
        z = tl.where(cosine > limit[:, None], float("-inf"), z)
    return z


@triton.jit
def column_logits(
    cosine, identity, row_valid, column_limit, column_scale, om, on, n, m, p: tl.constexpr, LIMITS: tl.constexpr
):
    """As row_logits, of the column loss: rows must be valid too, and the column's limit holds."""
    scale = tl.load(column_scale + on, mask=on < m, other=0.0) * LOG2E
    z = tl.where(identity == float("-inf"), identity, cosine * scale[None, :])
    z = tl.where((tl.load(row_valid + om, mask=om < n, other=0) != 0)[:, None], z, float("-inf"))
    if LIMITS:
        limit = tl.load(column_limit + p * m + on, mask=on < m, other=float("inf"))
        z = tl.where(cosine > limit[None, :], float("-inf"), z)
    return z


@triton.jit
def softplus(z):
    """log(1 + e^z) of a logit times log2(e); 0 at -inf. Small results keep their digits (a series where 1 + x would round)."""
    x = tl.exp2(-tl.abs(z))
    log = tl.where(x < 1e-3, x - 0.5 * x * x, tl.log(1.0 + x))
    return tl.where(z == float("-inf"), 0.0, tl.maximum(z, 0.0) / LOG2E + log)


@triton.jit
def sigmoid(z):
    x = tl.exp2(-tl.abs(z))
    return tl.where(z >= 0, 1.0, x) / (1.0 + x)


@triton.jit
def statistics_kernel(
    rows, columns, row_norm, column_norm, row_tags, column_tags, row_valid, column_valid, row_limit, column_limit,
    row_scale, column_scale, correction, row_maximum, row_sum, column_maximum, column_sum, n, m, D,
    PREFIXES: tl.constexpr, TAGS: tl.constexpr, LIMITS: tl.constexpr, COLUMNS: tl.constexpr, SIGMOID: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial maxima and sums: row_* [P, TC, n], column_* [P, TR, m], maxima in units of log2."""
    pm, pn = tile_of(tl.program_id(0), n, m, BM, BN, GROUP)
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for p in tl.static_range(len(PREFIXES) - 1):
        acc = add_segment(acc, rows, columns, om, on, n, m, D, PREFIXES[p], PREFIXES[p + 1], BK, PRECISION)
        cosine, _, _ = cosine_of(acc, row_norm, column_norm, om, on, n, m, p)
        identity = masked_by_identity(cosine, row_tags, column_tags, column_valid, om, on, n, m, TAGS)
        z = row_logits(cosine, identity, row_limit, row_scale, correction, om, on, n, m, p, LIMITS)
        at = (p * tiles_n + pn).to(tl.int64) * n + om
        if SIGMOID:
            tl.store(row_sum + at, tl.sum(softplus(z), 1), mask=om < n)
        else:
            top = tl.max(z, 1)
            finite = tl.where(top == float("-inf"), 0.0, top)
            tl.store(row_maximum + at, top, mask=om < n)
            tl.store(row_sum + at, tl.sum(tl.exp2(z - finite[:, None]), 1), mask=om < n)
        if COLUMNS:
            z = column_logits(cosine, identity, row_valid, column_limit, column_scale, om, on, n, m, p, LIMITS)
            at = (p * tiles_m + pm).to(tl.int64) * m + on
            top = tl.max(z, 0)
            finite = tl.where(top == float("-inf"), 0.0, top)
            tl.store(column_maximum + at, top, mask=on < m)
            tl.store(column_sum + at, tl.sum(tl.exp2(z - finite[None, :]), 0), mask=on < m)


@triton.jit
def gradient_kernel(
    rows, columns, row_norm, column_norm, row_tags, column_tags, row_valid, column_valid, row_limit, column_limit,
    row_scale, column_scale, correction, row_log, row_push, column_log, column_push, weights,
    row_moment, column_moment, row_temperature, column_temperature, row_total, n, m, D,
    PREFIXES: tl.constexpr, TAGS: tl.constexpr, LIMITS: tl.constexpr, COLUMNS: tl.constexpr, SIGMOID: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights [P, n, m], each prefix's own (not yet summed over longer ones); row_* [P, TC, n], column_* [P, TR, m]."""
    pm, pn = tile_of(tl.program_id(0), n, m, BM, BN, GROUP)
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    inside = (om < n)[:, None] & (on < m)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for p in tl.static_range(len(PREFIXES) - 1):
        acc = add_segment(acc, rows, columns, om, on, n, m, D, PREFIXES[p], PREFIXES[p + 1], BK, PRECISION)
        cosine, rn, cn = cosine_of(acc, row_norm, column_norm, om, on, n, m, p)
        identity = masked_by_identity(cosine, row_tags, column_tags, column_valid, om, on, n, m, TAGS)
        z = row_logits(cosine, identity, row_limit, row_scale, correction, om, on, n, m, p, LIMITS)
        at = (p * tiles_n + pn).to(tl.int64) * n + om
        push = tl.load(row_push + p * n + om, mask=om < n, other=0.0)
        scale = tl.load(row_scale + om, mask=om < n, other=0.0)
        if SIGMOID:
            share = sigmoid(z) * push[:, None]
            tl.store(row_total + at, tl.sum(share, 1), mask=om < n)
            g = share * scale[:, None]
        else:
            log = tl.load(row_log + p * n + om, mask=om < n, other=0.0) * LOG2E
            # A logit is below its own logsumexp; rows without push may hold any, and 0 * inf is NaN.
            g = tl.exp2(tl.minimum(z - log[:, None], 1.0)) * (push * scale)[:, None]
        if COLUMNS:
            tl.store(row_temperature + at, tl.sum(g * cosine, 1), mask=om < n)
            z = column_logits(cosine, identity, row_valid, column_limit, column_scale, om, on, n, m, p, LIMITS)
            push = tl.load(column_push + p * m + on, mask=on < m, other=0.0)
            scale = tl.load(column_scale + on, mask=on < m, other=0.0)
            log = tl.load(column_log + p * m + on, mask=on < m, other=0.0) * LOG2E
            c = tl.exp2(tl.minimum(z - log[None, :], 1.0)) * (push * scale)[None, :]
            tl.store(column_temperature + (p * tiles_m + pm).to(tl.int64) * m + on, tl.sum(c * cosine, 0), mask=on < m)
            g += c
        moment = g * cosine
        tl.store(row_moment + at, tl.sum(moment, 1), mask=om < n)
        tl.store(column_moment + (p * tiles_m + pm).to(tl.int64) * m + on, tl.sum(moment, 0), mask=on < m)
        g = g * rn[:, None] * cn[None, :]
        place = weights + (p * n + om[:, None]).to(tl.int64) * m + on[None, :]
        tl.store(place, g.to(weights.dtype.element_ty), mask=inside)
