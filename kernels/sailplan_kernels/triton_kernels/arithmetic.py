"""What happens to a tile of dot products once it is there: masks, exponentials, their sums, the weights of the gradient.

Every schedule (tiles.py, sigmoid_tiles.py: one program a tile; persistent.py: programs that go from tile to tile) calls these
functions, in the same order, so a pair is masked in both or in neither. Each tile writes its own partial results; nothing
is added atomically, so results are bitwise equal from run to run.

What is excluded stands at FLOOR: finite, so that products with 0 stay 0, and with an exponential of exactly 0. A column
that is no candidate has a shift of OUT, which does the same to its logits; a row that is none likewise for the columns.
A thread holds few rows and many columns of a tile, so vectors over columns are what registers are short of: there are few.

Exponentials are taken to the base 2, with the logits multiplied by log2(e) beforehand.
Legend: n rows, m columns, P prefixes, T tags, TR and TC the number of tiles along rows and columns; om, on [BM], [BN] the
places of this tile's rows and columns, pm, pn its own place, p its prefix.
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
def cosines(acc, row_norm, column_norm, row_tags, column_tags, om, on, n, m, p, TAGS: tl.constexpr):
    """From dot products; FLOOR where row and column share a tag. Tags of rows that are none are -2, those of columns -1."""
    rn = tl.load(row_norm + p * n + om, mask=om < n, other=0.0)
    cn = tl.load(column_norm + p * m + on, mask=on < m, other=0.0)
    x = acc * rn[:, None] * cn[None, :]
    for t in tl.static_range(TAGS):
        mine = tl.load(row_tags + t * n + om, mask=om < n, other=-2)
        theirs = tl.load(column_tags + t * m + on, mask=on < m, other=-1)
        x = tl.where(mine[:, None] == theirs[None, :], FLOOR, x)
    return x


@triton.jit
def times_norms(g, row_norm, column_norm, om, on, n, m, p, AGAIN: tl.constexpr):
    """d loss / d cosine to d loss / d dot product.

    AGAIN: the norms are really loaded a second time, which a policy of its own tells the compiler. In a wide tile they would
    spill, held since the cosines; in a narrow one the addresses cost more than the norms.
    """
    policy: tl.constexpr = "evict_last" if AGAIN else ""
    rn = tl.load(row_norm + p * n + om, mask=om < n, other=0.0, eviction_policy=policy)
    cn = tl.load(column_norm + p * m + on, mask=on < m, other=0.0, eviction_policy=policy)
    return g * rn[:, None] * cn[None, :]


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
def write_statistics(
    acc, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit, row_scale, column_scale, row_shift, column_shift,
    row_maximum, row_sum, column_maximum, column_sum, pm, pn, om, on, n, m, p, tiles_m, tiles_n,
    TAGS: tl.constexpr, LIMITS: tl.constexpr, COLUMNS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Partial maxima and sums of one tile: row_* [P, TC, n], column_* [P, TR, m], maxima in units of log2.

    Returns the exponentials relative to the maximum of their row in this tile (with SIGMOID the logits).
    """
    x = cosines(acc, row_norm, column_norm, row_tags, column_tags, om, on, n, m, p, TAGS)
    e = row_logits(x, row_limit, row_scale, column_shift, om, on, n, m, p, LIMITS)
    at = (p * tiles_n + pn).to(tl.int64) * n + om
    if SIGMOID:
        tl.store(row_sum + at, tl.sum(softplus(e), 1), mask=om < n)
    else:
        top = tl.max(e, 1)
        finite = tl.where(top < EMPTY, 0.0, top)
        e = tl.exp2(e - finite[:, None])
        tl.store(row_maximum + at, tl.where(top < EMPTY, float("-inf"), top), mask=om < n)
        tl.store(row_sum + at, tl.sum(e, 1), mask=om < n)
    if COLUMNS:
        z = column_logits(x, row_shift, column_limit, column_scale, om, on, n, m, p, LIMITS)
        at = (p * tiles_m + pm).to(tl.int64) * m + on
        top = tl.max(z, 0)
        total = tl.sum(tl.exp2(z - tl.where(top < EMPTY, 0.0, top)[None, :]), 0)
        out = (top < EMPTY) | (tl.load(column_shift + on, mask=on < m, other=OUT) >= OUT)
        tl.store(column_maximum + at, tl.where(out, float("-inf"), top), mask=on < m)
        tl.store(column_sum + at, tl.where(out, 0.0, total), mask=on < m)
    return e


@triton.jit
def write_gradient(
    acc, row_norm, column_norm, row_tags, column_tags, row_limit, column_limit, row_scale, column_scale, row_shift, column_shift,
    row_log, row_push, column_log, column_push, row_moment, column_moment, row_temperature, column_temperature,
    pm, pn, om, on, n, m, p, tiles_m, tiles_n, TAGS: tl.constexpr, LIMITS: tl.constexpr, COLUMNS: tl.constexpr, MOMENTS: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """Partial moments of one tile: row_* [P, TC, n], column_* [P, TR, m]. Returns the weights of this prefix.

    column_push is 0 for columns that are no candidates.
    """
    x = cosines(acc, row_norm, column_norm, row_tags, column_tags, om, on, n, m, p, TAGS)
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
    return times_norms(g, row_norm, column_norm, om, on, n, m, p, AGAIN)


@triton.jit
def add_each(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def write_sigmoid(
    acc, row_norm, column_norm, row_tags, column_tags, row_limit, row_scale, column_shift,
    row_push, row_sum, row_total, row_moment, column_moment, pm, pn, om, on, n, m, p, tiles_m, tiles_n,
    TAGS: tl.constexpr, LIMITS: tl.constexpr, MOMENTS: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Partial sums of one tile of the pairwise sigmoid loss. Returns the weights of this prefix.

    row_* [P, TC, n]: row_sum the softplus of the logits, row_total push * sigmoid; column_moment [P, TR, m], written with MOMENTS.
    AGAIN: as times_norms; and three sums one after the other, as no kernel with a sum of several is specialised on sm_90.
    """
    x = cosines(acc, row_norm, column_norm, row_tags, column_tags, om, on, n, m, p, TAGS)
    z = row_logits(x, row_limit, row_scale, column_shift, om, on, n, m, p, LIMITS)
    at = (p * tiles_n + pn).to(tl.int64) * n + om
    push = tl.load(row_push + p * n + om, mask=om < n, other=0.0)
    scaled = push * tl.load(row_scale + om, mask=om < n, other=0.0)
    if AGAIN:
        tl.store(row_sum + at, tl.sum(softplus(z), 1), mask=om < n)
        g = sigmoid(z)
        tl.store(row_total + at, tl.sum(g, 1) * push, mask=om < n)
        tl.store(row_moment + at, tl.sum(g * x, 1) * scaled, mask=om < n)
    else:
        g = sigmoid(z)
        loss, total, moment = tl.reduce((softplus(z), g, g * x), 1, add_each)
        tl.store(row_sum + at, loss, mask=om < n)
        tl.store(row_total + at, total * push, mask=om < n)
        tl.store(row_moment + at, moment * scaled, mask=om < n)
    g *= scaled[:, None]
    if MOMENTS:
        tl.store(column_moment + (p * tiles_m + pm).to(tl.int64) * m + on, tl.sum(g * x, 0), mask=on < m)
    return times_norms(g, row_norm, column_norm, om, on, n, m, p, AGAIN)
