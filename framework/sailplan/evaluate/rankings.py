"""Measures of ranked lists against graded judgments, as trec_eval defines them.

A list is ordered by falling score and, where scores tie, by falling document id: trec_eval's order,
which the input's order never changes. Documents without a judgment are not relevant. A query
without a relevant document scores 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

RELEVANT = 1  # the least grade of a relevant document
CUT = 10  # of mrr and ndcg beside those that are asked for


def ordered(scores: Mapping[str, float]) -> list[str]:
    """Return document ids, the best first. scores: float32 numbers, as trec_eval compares."""
    return sorted(sorted(scores, reverse=True), key=lambda document: -scores[document])


def measures(
    ranking: Sequence[str], judgments: Mapping[str, int], at: Sequence[int]
) -> dict[str, float]:
    """Return the measures of one query: ndcg@k and recall@k for k in `at`, mrr@10, mrr and map
    over the whole list.

    ranking: document ids, the best first, none twice. judgments: document id -> grade; 1 and more
    is relevant. The gain of nDCG is the grade, its discount log2(rank + 1). Sums over queries,
    divided by their number, are trec_eval's averages.
    """
    gains = [max(judgments.get(document, 0), 0) for document in ranking]
    ideal = sorted((grade for grade in judgments.values() if grade >= RELEVANT), reverse=True)
    places = [place for place, gain in enumerate(gains, start=1) if gain >= RELEVANT]
    found: dict[str, float] = {}
    for k in at:
        best = _discounted(ideal[:k])
        found[f"ndcg@{k}"] = _discounted(gains[:k]) / best if best else 0.0
        found[f"recall@{k}"] = sum(place <= k for place in places) / len(ideal) if ideal else 0.0
    first = 1.0 / places[0] if places else 0.0
    found[f"mrr@{CUT}"] = first if places and places[0] <= CUT else 0.0
    found["mrr"] = first
    found["map"] = (
        sum(number / place for number, place in enumerate(places, start=1)) / len(ideal)
        if ideal
        else 0.0
    )
    return found


def _discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, start=1))
