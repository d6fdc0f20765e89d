"""Which records a stage keeps: those nearest to the benchmark (stage II), and those whose own
pair looks clean (stage III).

Both are rankings cut at a fraction, so no threshold has to be tuned; equal values are ordered by
position, so the result is the same on every rank and machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sailplan.curriculum.balance import Summary, unit_rows


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


def keep_highest(positions: np.ndarray, scores: np.ndarray, fraction: float) -> np.ndarray:
    """The `fraction` of positions int64 [n] with the highest scores (at least one), sorted; ties
    by the lower position.
    """
    count = max(1, round(fraction * len(positions)))
    order = np.lexsort((positions, -scores))[:count]
    return np.sort(positions[order])


def drop_lowest(positions: np.ndarray, scores: np.ndarray, fraction: float) -> np.ndarray:
    """The positions without the `fraction` that score lowest: own-pair cosines this low are
    likely mislabelled. Records whose
    score is nan (a side is missing) are dropped first."""
    return keep_highest(positions, np.nan_to_num(scores, nan=-np.inf), 1.0 - fraction)
