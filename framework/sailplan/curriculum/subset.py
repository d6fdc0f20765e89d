"""Which records a stage keeps: those nearest to the benchmark (stage II), and those whose own
pair looks clean (stage III).

Both are rankings cut at a fraction, so no threshold has to be tuned; equal values are ordered by
position, so the result is the same on every rank and machine. Nobody holds the ranking: each rank
scores its parts of the records, and the score at the cut is found by counting, 16 bits at a time.

    FOLDER/scores-K/0000012.npy    float64: scores of part 12's records, nan where always kept
    FOLDER/NAME.npy                int64: the kept positions, rising
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sailplan.curriculum.balance import Summary, unit_rows
from sailplan.embed.selection import Positions
from sailplan.runtime.arrays import SharedArray, save
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import apart, in_turns, sum_over_ranks

PART = 1 << 12  # records
STEP = 16  # bits that a count over all ranks decides
Scores = NDArray[np.float64]


def nearness(vectors: dict[str, np.ndarray], benchmarks: Sequence[Summary]) -> np.ndarray | None:
    """How near each record is to the benchmark: float64 [n], the mean over the shared kinds of
    vector of the highest cosine to any benchmark centroid. vectors: kind -> [n, D]. The fused kind
    alone decides where both have it. None where
    nothing is shared."""
    shared = [kind for kind in vectors if any(kind in benchmark for benchmark in benchmarks)]
    if "fused" in shared:
        shared = ["fused"]
    if not shared:
        return None
    best = []
    for kind in shared:
        centroids = np.concatenate(
            [benchmark[kind].centroids for benchmark in benchmarks if kind in benchmark]
        )
        best.append((unit_rows(vectors[kind]) @ centroids.T).max(axis=1))
    return np.mean(best, axis=0)


def keep_highest(
    parallel: Parallel,
    positions: Positions,
    score: Callable[[int, int], Scores],
    fraction: float,
    folder: Path,
    name: str,
) -> NDArray[np.int64]:
    """Return the `fraction` of rising positions with the highest scores (at least one), mapped
    from FOLDER/NAME.npy. Collective.

    score: rows start .. stop - 1 of the positions -> float64 [k]; nan: kept whatever the others
    are, and not counted. Ties are kept by the lower position.
    """
    count, ranks = len(positions), parallel.world_size
    size = max(1, min(PART, -(-count // ranks)))
    parts = -(-count // size)
    scores = folder / f"scores-{name}-{size}"
    scores.mkdir(parents=True, exist_ok=True)
    ranked = np.zeros(parts, dtype=np.int64)
    own = range(parallel.rank, parts, ranks)

    def path(part: int) -> Path:
        return scores / f"{part:07d}.npy"

    def rank_part(part: int) -> None:
        if not path(part).is_file():
            save(path(part), score(part * size, min(count, (part + 1) * size)))
        ranked[part] = int((~np.isnan(np.load(path(part)))).sum())

    in_turns(parallel, f"scoring {name}", range(parts), rank_part)
    total = int(sum_over_ranks(ranked).sum())
    wanted = min(total, max(1, round(fraction * total)))
    lowest, ties = _cut(lambda part: np.load(path(part)), own, wanted)
    # Of equal scores at the cut the first `ties` are kept: those of earlier parts first
    equal, kept = np.zeros(parts, dtype=np.int64), np.zeros(parts, dtype=np.int64)
    for part in own:
        codes = _codes(found := np.load(path(part)))
        equal[part] = int((codes == lowest).sum())
        kept[part] = int((codes > lowest).sum() + np.isnan(found).sum())
    equal = sum_over_ranks(equal)
    room = (ties - (np.cumsum(equal) - equal)).clip(0, equal)
    starts = np.concatenate([[0], np.cumsum(sum_over_ranks(kept) + room)])
    array = SharedArray(folder / f"{name}.npy", (int(starts[-1]),), "int64")

    def create() -> None:
        array.path.unlink(missing_ok=True)
        array.create()

    on_main(parallel, f"making {array.path}", create)

    def write() -> None:
        for part in own:
            codes = _codes(found := np.load(path(part)))
            keep = (codes > lowest) | np.isnan(found)
            keep[np.flatnonzero(codes == lowest)[: room[part]]] = True
            array.write(
                int(starts[part]), np.asarray(positions[part * size : (part + 1) * size])[keep]
            )

    apart(parallel, f"writing {array.path}", write)
    result: NDArray[np.int64] = np.load(array.path, mmap_mode="r")
    return result


def _codes(scores: Scores) -> NDArray[np.uint64]:
    """Return uint64 [n] that order as scores do; 0 for nan."""
    bits = (scores + 0.0).view(np.uint64)  # + 0.0 makes -0.0 equal to 0.0
    sign = np.uint64(1) << np.uint64(63)
    ordered = np.where(bits & sign, ~bits, bits | sign)
    return np.where(np.isnan(scores), np.uint64(0), ordered)


def _cut(read: Callable[[int], Scores], own: Sequence[int], wanted: int) -> tuple[np.uint64, int]:
    """Return the code of the `wanted`-th highest score of all ranks, and how many of those that
    equal it are among the wanted. Collective.
    """
    known, left = 0, wanted
    for shift in range(64 - STEP, -1, -STEP):
        counts = np.zeros(1 << STEP, dtype=np.int64)
        for part in own:
            codes = _codes(read(part))
            if shift + STEP < 64:
                codes = codes[codes >> np.uint64(shift + STEP) == np.uint64(known)]
            digits = (codes >> np.uint64(shift)) & np.uint64((1 << STEP) - 1)
            counts += np.bincount(digits[codes > 0].astype(np.int64), minlength=1 << STEP)
        above = np.cumsum(sum_over_ranks(counts)[::-1])
        place = int(np.searchsorted(above, max(1, left)))
        place = min(place, len(above) - 1)
        left -= int(above[place - 1]) if place else 0
        known = (known << STEP) | (len(above) - 1 - place)
    return np.uint64(known), left
