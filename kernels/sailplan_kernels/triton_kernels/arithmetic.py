"""What happens to a tile of dot products once it is there: masks, exponentials, their sums, the
weights of the gradient.

Every schedule (tiles.py, sigmoid_tiles.py: one program a tile; persistent.py: programs that go from
tile to tile) calls these functions, in the same order, so a pair is masked in both or in neither.
Each tile writes its own partial results; nothing is added atomically, so results are bitwise equal
from run to run.

What is excluded stands at MASKED_SCORE: finite, so that products with 0 stay 0, and with an
exponential of exactly 0. A column that is no candidate has a shift of INVALID_SHIFT, which does the
same to its logits; a row that is none likewise for the columns. So validity costs nothing: a shift
is part of a multiplication and addition that is there anyway. Tags are looked at where a tile has
any that may match (``tags_to_compare``), which few tiles have.

Instructions are what these kernels are short of: while they are issued, the matrix units wait. So
vectors over rows and columns are padded to whole tiles and aligned (no bounds, wide loads),
coefficients are folded into shifts of exponents beforehand, and exponentials are taken to the base
2, with the logits multiplied by log2(e).

Legend: n rows, m columns, N and M the same padded to whole tiles, P prefixes, T tags, TR and TC the
number of tiles along rows and columns; om, on [BM], [BN] the places of this tile's rows and
columns, pm, pn its own place, p its prefix.
Vectors: norms, limits, logs, pushes [P, N] or [P, M]; scales, shifts [N] or [M]; tags int32 [T, 2,
N] or [T, 2, M].
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MASKED_SCORE = tl.constexpr(-1e30)
EMPTY = tl.constexpr(-1e20)  # a maximum below it is that of nothing
INVALID_SHIFT = tl.constexpr(1e30)
# Logits to the base 2 within it need no maximum: their exponentials, and the sums of 2^27 of them,
# are ordinary float32 numbers.
# It is a temperature of 0.0152 or more.
SAFE_RANGE = tl.constexpr(95.0)
# Chunks of rows start anywhere: what is written as a vector is compiled for any alignment, one
# kernel for all of them.
VECTORS = [
    "bounds",
    "row_maximum",
    "row_sum",
    "column_maximum",
    "column_sum",
    "row_moment",
    "column_moment",
    "row_temperature",
    "column_temperature",
    "row_total",
    "n",
    "m",
    "prefixes",
    "tags",
]


@triton.jit
def tile_of(program, n, m, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Tiles go down groups of GROUP rows before they go right, so that the operands in work stay
    in L2.
    """
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = program % (GROUP * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def tags_to_compare(row_tags, column_tags, om, on, N, M, tags):
    """``tags``, or 0 where no pair of the tile shares a tag's lower half: such a tile is clean,
    its masks are skipped.

    Looked at pair by pair are only tags whose ranges meet. Halves may agree where tags do not; then
    the masks find nothing, at the price of having looked.
    """
    found = 0
    for t in range(tags):
        mine, theirs = tl.load(row_tags + 2 * t * N + om), tl.load(column_tags + 2 * t * M + on)
        if (tl.max(mine) >= tl.min(theirs)) & (tl.min(mine) <= tl.max(theirs)):
            difference = (mine[:, None] ^ theirs[None, :]).to(tl.uint32, bitcast=True)
            found = tl.where(tl.min(tl.ravel(difference, can_reorder=True)) == 0, tags, found)
    return found


@triton.jit
def masked(x, row_tags, column_tags, om, on, N, M, tags):
    """MASKED_SCORE where row and column share a tag, both halves of it.

    Tags of rows that are none are -2, those of columns -1.
    """
    for t in range(tags):
        mine, theirs = row_tags + 2 * t * N + om, column_tags + 2 * t * M + on
        same = tl.load(mine)[:, None] == tl.load(theirs)[None, :]
        same &= tl.load(mine + N)[:, None] == tl.load(theirs + M)[None, :]
        x = tl.where(same, MASKED_SCORE, x)
    return x


@triton.jit
def softplus(z):
    """log(1 + e^z) of a logit times log2(e); 0 at MASKED_SCORE. Small results keep their digits.

    log(1 + x) = 2 artanh(s), s = x / (2 + x), as its series: s is at most 1/3, where what is left
    out is 1e-8 of the result.
    The library's logarithm takes more registers than a tile has left.
    """
    x = tl.exp2(-tl.abs(z))
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 + q * (
        1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))
    )
    return tl.maximum(z, 0.0) / LOG2E + 2.0 * s * series


@triton.jit
def sigmoid(z):
    x = tl.exp2(-tl.abs(z))
    return tl.where(z >= 0, 1.0, x) / (1.0 + x)


@triton.jit
def row_logits(
    acc,
    row_norm,
    column_norm,
    row_tags,
    column_tags,
    row_max_cosine,
    row_scale,
    column_shift,
    om,
    on,
    N,
    M,
    p,
    live,
    LIMITS: tl.constexpr,
):
    """Cosines, MASKED_SCORE where row and column share a tag, and logits of the row loss times
    log2(e), hugely negative where the pair is masked.

    LIMITS compares cosines, which are therefore the same product of the same numbers wherever they
    are computed.
    """
    x = acc * tl.load(row_norm + p * N + om)[:, None] * tl.load(column_norm + p * M + on)[None, :]
    x = masked(x, row_tags, column_tags, om, on, N, M, live)
    z = x * (tl.load(row_scale + om) * LOG2E)[:, None] - tl.load(column_shift + on)[None, :]
    if LIMITS:
        z = tl.where(x > tl.load(row_max_cosine + p * N + om)[:, None], MASKED_SCORE, z)
    return x, z


@triton.jit
def column_logits(
    x, row_shift, column_max_cosine, column_scale, om, on, N, M, p, LIMITS: tl.constexpr
):
    """As row_logits, of the column loss.

    Columns that are no candidates have logits nobody may read.
    """
    z = x * (tl.load(column_scale + on) * LOG2E)[None, :] - tl.load(row_shift + om)[:, None]
    if LIMITS:
        z = tl.where(x > tl.load(column_max_cosine + p * M + on)[None, :], MASKED_SCORE, z)
    return z


@triton.jit
def shared_factors(row_norm, row_scale, om, N, p):
    """What turns (dot product * column norm) into a logit times log2(e) [BM], where one
    temperature serves rows and columns.

    A row of zeros has dot products of 0 and may have any factor; it must not be 0, which would take
    its shifts away.
    """
    norm = tl.load(row_norm + p * N + om)
    return tl.where(norm == 0, 1.0, norm * tl.load(row_scale) * LOG2E)


@triton.jit
def write_shared_statistics(
    acc,
    row_norm,
    column_norm,
    row_tags,
    column_tags,
    row_scale,
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
):
    """write_statistics of tame logits at one temperature: one exponential serves row and column,
    and nothing is subtracted from it.

    Maxima of rows are real for the longest prefix, whose row is compared with its positive; all
    else says 0 there.
    """
    y = acc * tl.load(column_norm + p * M + on)[None, :] - tl.load(column_shift + on)[None, :]
    y = masked(y, row_tags, column_tags, om, on, N, M, live)
    z = (
        y * shared_factors(row_norm, row_scale, om, N, p)[:, None]
        - tl.load(row_shift + om)[:, None]
    )
    e = tl.exp2(z)
    at, down = (p * tiles_n + pn).to(tl.int64) * n + om, (p * tiles_m + pm).to(tl.int64) * m + on
    total = tl.sum(e, 1)
    if p == prefixes - 1:
        top = tl.max(z, 1)
        tl.store(row_maximum + at, tl.where(total == 0, float("-inf"), top), mask=om < n)
        tl.store(row_sum + at, tl.where(total == 0, 0.0, total * tl.exp2(-top)), mask=om < n)
    else:
        tl.store(row_maximum + at, tl.where(total == 0, float("-inf"), 0.0), mask=om < n)
        tl.store(row_sum + at, total, mask=om < n)
    total = tl.sum(e, 0)
    tl.store(column_maximum + down, tl.where(total == 0, float("-inf"), 0.0), mask=on < m)
    tl.store(column_sum + down, total, mask=on < m)


@triton.jit
def write_statistics(
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
    LIMITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    """Partial maxima and sums of one tile: row_* [P, TC, n], column_* [P, TR, m], maxima in
    units of log2.

    Returns the exponentials relative to the maximum of their row in this tile (with SIGMOID the
    logits).
    """
    x, e = row_logits(
        acc,
        row_norm,
        column_norm,
        row_tags,
        column_tags,
        row_max_cosine,
        row_scale,
        column_shift,
        om,
        on,
        N,
        M,
        p,
        live,
        LIMITS,
    )
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
        z = column_logits(x, row_shift, column_max_cosine, column_scale, om, on, N, M, p, LIMITS)
        at = (p * tiles_m + pm).to(tl.int64) * m + on
        top = tl.max(z, 0)
        total = tl.sum(tl.exp2(z - tl.where(top < EMPTY, 0.0, top)[None, :]), 0)
        out = (top < EMPTY) | (tl.load(column_shift + on) >= EMPTY * -1)
        tl.store(column_maximum + at, tl.where(out, float("-inf"), top), mask=on < m)
        tl.store(column_sum + at, tl.where(out, 0.0, total), mask=on < m)
    return e


@triton.jit
def write_either_statistics(
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
):
    """write_statistics of both losses at one temperature: at a low one, with maxima."""
    if tl.load(row_scale) * LOG2E <= SAFE_RANGE:
        write_shared_statistics(
            acc,
            row_norm,
            column_norm,
            row_tags,
            column_tags,
            row_scale,
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
        write_statistics(
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
            False,
            True,
            False,
        )


@triton.jit
def write_gradient(
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
    LIMITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Partial moments of one tile: row_* [P, TC, n], column_* [P, TR, m].

    Returns the weights of this prefix.

    row_log, column_log: logsumexps times log2(e), less the logarithms of push times inverse
    temperature, so infinite where there is no push: the exponential of the difference is the
    coefficient, d loss / d cosine, of rows and columns that push and 0 of others.
    SHARED (with COLUMNS): one temperature, whose derivative needs no sums of its own.
    """
    at, down = (p * tiles_n + pn).to(tl.int64) * n + om, (p * tiles_m + pm).to(tl.int64) * m + on
    row, column = tl.load(row_log + p * N + om), tl.load(column_norm + p * M + on)
    norm = tl.load(row_norm + p * N + om)
    if SHARED:
        y = acc * column[None, :] - tl.load(column_shift + on)[None, :]
        y = masked(y, row_tags, column_tags, om, on, N, M, live)
        factor = shared_factors(row_norm, row_scale, om, N, p)
        g = tl.exp2(y * factor[:, None] - row[:, None]) + tl.exp2(
            y * factor[:, None] - tl.load(column_log + p * M + on)[None, :]
        )
        g = tl.where(
            (tl.load(row_shift + om) > 0)[:, None], 0.0, g
        )  # such a row may lie above a column's logsumexp: 0 times infinity
    else:
        x, z = row_logits(
            acc,
            row_norm,
            column_norm,
            row_tags,
            column_tags,
            row_max_cosine,
            row_scale,
            column_shift,
            om,
            on,
            N,
            M,
            p,
            live,
            LIMITS,
        )
        g = tl.exp2(z - row[:, None])
        if COLUMNS:
            tl.store(row_temperature + at, tl.sum(g * x, 1), mask=om < n)
            z = column_logits(
                x, row_shift, column_max_cosine, column_scale, om, on, N, M, p, LIMITS
            )
            c = tl.exp2(z - tl.load(column_log + p * M + on)[None, :])
            tl.store(column_temperature + down, tl.sum(c * x, 0), mask=on < m)
            g += c
    w = g * norm[:, None] * column[None, :]
    if MOMENTS:
        tl.store(row_moment + at, tl.sum(w * acc, 1), mask=om < n)
        tl.store(column_moment + down, tl.sum(w * acc, 0), mask=on < m)
    return w


@triton.jit
def write_sigmoid(
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
    LIMITS: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Partial sums of one tile of the pairwise sigmoid loss. Returns the weights of this prefix.

    row_log [P, N]: here the push itself. row_* [P, TC, n]: row_sum the softplus of the logits,
    row_total negative_grad * sigmoid; column_moment [P, TR, m], written with MOMENTS.
    """
    x, z = row_logits(
        acc,
        row_norm,
        column_norm,
        row_tags,
        column_tags,
        row_max_cosine,
        row_scale,
        column_shift,
        om,
        on,
        N,
        M,
        p,
        live,
        LIMITS,
    )
    at = (p * tiles_n + pn).to(tl.int64) * n + om
    negative_grad = tl.load(row_log + p * N + om)
    scaled = negative_grad * tl.load(row_scale + om)
    tl.store(row_sum + at, tl.sum(softplus(z), 1), mask=om < n)
    g = sigmoid(z)
    tl.store(row_total + at, tl.sum(g, 1) * negative_grad, mask=om < n)
    g *= scaled[:, None]
    tl.store(row_moment + at, tl.sum(g * x, 1), mask=om < n)
    if MOMENTS:
        tl.store(
            column_moment + (p * tiles_m + pm).to(tl.int64) * m + on, tl.sum(g * x, 0), mask=on < m
        )
    return g * tl.load(row_norm + p * N + om)[:, None] * tl.load(column_norm + p * M + on)[None, :]
