"""The elastic reading order: which record is row k of a data set's infinite stream, as pure
integer arithmetic.

Rows are dealt to L canonical *lanes* like cards: row k belongs to lane k mod L. Within an epoch
(rows e*N .. e*N + N - 1) the records are laid out as runs of `segment` consecutive records in a
keyed random order; each lane reads its own contiguous chunk of that layout, and shuffles within
windows of `window` records. So

- every epoch visits every record exactly once, whatever N is;
- a global batch of a multiple of L rows takes equally from every lane;
- the union over ranks is the same for any number R of them; a rank that takes rows r, r + R, ...
  reads whole lanes, hence long sequential runs, where R divides L;
- any row is computed alone: resuming at row 10^12 costs the same as starting, and nothing is kept
  in memory.

All permutations are Feistel networks over a square domain with cycle walking: format-preserving
encryption's way to permute 0..n-1 without a table (Black and Rogaway 2002). Integer arithmetic
only, so the order cannot change with a library version.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(words: Words) -> Words:
    """The finaliser of splitmix64: a bijection of 64-bit words whose output looks random (Steele
    et al. 2014).
    """
    words = words ^ (words >> _SHIFTS[0])
    words *= _FACTORS[0]
    words ^= words >> _SHIFTS[1]
    words *= _FACTORS[1]
    words ^= words >> _SHIFTS[2]
    return words


def keyed(*parts: int | Integers) -> Words:
    """One random-looking 64-bit word per element from integers and integer arrays (broadcast
    together); at least 1-d.
    """
    first = next((place for place, part in enumerate(parts) if not isinstance(part, int)), None)
    plain = [part for part in parts[:first] if isinstance(part, int)]
    key = np.array([keyed_integer(*plain)], dtype=np.uint64)
    for part in parts[len(plain) :]:
        word = np.atleast_1d(np.asarray(part, dtype=np.int64)).view(np.uint64)
        key = mix(key * np.uint64(3) + mix(word + _GOLDEN) + _GOLDEN)
    return key


def keyed_integer(*parts: int, key: int = 0) -> int:
    """Return `keyed(*parts)` of plain integers, as an integer of 64 bits (ten times faster than
    an array of one).

    key: what the parts before these gave.
    """
    for part in parts:  # `mix` twice, written out: this runs several times a row
        word = (part + 0x9E3779B97F4A7C15) & _MASK
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
        key = (key * 3 + (word ^ (word >> 31)) + 0x9E3779B97F4A7C15) & _MASK
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK
        key ^= key >> 31
    return key


def seeds(*parts: int | Integers) -> Integers:
    """Return one non-negative 63-bit seed per element of `keyed(*parts)`, int64."""
    return (keyed(*parts) >> np.uint64(1)).astype(np.int64)


def uniform(*parts: int | Integers) -> NDArray[np.float64]:
    """Counter-based uniform numbers in [0, 1) with 53 random bits, one per element of
    `keyed(*parts)`.
    """
    return (keyed(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: Integers, size: Integers | int, key: Words) -> Integers:
    """The image of `index` under a keyed permutation of 0..size-1; `size` and `key` may differ
    per element.

    index int64 [n] with 0 <= index < size; size int64 scalar or [n]; key uint64 [1] or [n]. Returns
    int64 [n].
    """
    sizes = np.broadcast_to(np.asarray(size, dtype=np.int64), index.shape)
    keys = np.broadcast_to(key, index.shape)
    side = np.floor(np.sqrt(np.maximum(sizes - 1, 0))).astype(np.int64) + 1  # side * side >= size
    result = _feistel(index, side, keys)
    while (
        outside := np.flatnonzero(result >= sizes)
    ).size:  # cycle walking: apply again until inside the range
        result[outside] = _feistel(result[outside], side[outside], keys[outside])
    return result


def _feistel(index: Integers, side: Integers, keys: Words) -> Integers:
    sides = (
        side.view(np.uint64)
        if side.flags.c_contiguous
        else np.ascontiguousarray(side).view(np.uint64)
    )
    left, right = np.divmod(index.astype(np.uint64), sides)
    for turn in range(1, ROUNDS + 1):
        left, right = right, (left + mix(right + keys * np.uint64(2 * turn + 1)) % sides) % sides
    return (left * sides + right).astype(np.int64)


def positions(
    dataset_key: int,
    size: int,
    seed: int,
    start_row: int,
    count: int,
    lanes: int,
    segment: int,
    window: int,
) -> Integers:
    """Records of rows start_row .. start_row + count - 1 of the data set's infinite stream.

    dataset_key, seed: 63-bit integers (sailplan.runtime.seeds.derive) that name the stream; size:
    number of records; lanes, segment, window as in the module's text. Returns int64 [count], each
    in 0..size-1.
    """
    assert size > 0 and lanes > 0 and segment > 0 and window > 0 and start_row >= 0, (
        "the plan checks its configuration"
    )
    rows = np.arange(start_row, start_row + count, dtype=np.int64)
    epoch, index = np.divmod(rows, size)
    place, start, length = _lane_chunk(rows, epoch, size, lanes)
    turn = (index - place) // lanes  # how many rows of this epoch the lane has read before
    block, inside = np.divmod(turn, window)
    width = np.minimum(window, length - block * window)
    shuffled = permute(inside, width, keyed(seed, dataset_key, 1, epoch, place, block))
    return _segments(start + block * window + shuffled, epoch, size, segment, seed, dataset_key)


def _lane_chunk(
    rows: Integers, epoch: Integers, size: int, lanes: int
) -> tuple[Integers, Integers, Integers]:
    """Per row: its lane's first row within the epoch (which also orders the chunks), and the
    lane's chunk (start, length).

    An epoch of N records starts at lane e*N mod L, so the first N mod L lanes, counted from there,
    read one record more.
    """
    place = (rows - epoch * size) % lanes
    short, longer = divmod(size, lanes)
    return (
        place,
        place * short + np.minimum(place, longer),
        short + (place < longer).astype(np.int64),
    )


def _segments(
    layout: Integers, epoch: Integers, size: int, segment: int, seed: int, dataset_key: int
) -> Integers:
    """Map positions in an epoch's layout (whole segments in keyed order, the short last one at a
    keyed place) to records.
    """
    full, tail = divmod(size, segment)
    tail_start = (keyed(seed, dataset_key, 2, epoch) % np.uint64(full + 1)).astype(
        np.int64
    ) * segment
    in_tail = (layout >= tail_start) & (layout < tail_start + tail)
    without_tail = np.where(layout >= tail_start + tail, layout - tail, layout)
    if full == 0:
        return layout - tail_start
    slot, offset = np.divmod(np.where(in_tail, 0, without_tail), segment)
    record = permute(slot, full, keyed(seed, dataset_key, 3, epoch)) * segment + offset
    return np.where(in_tail, full * segment + layout - tail_start, record)
