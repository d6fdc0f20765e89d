"""How sure a metric is: chance and 95 % intervals of shares of queries."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

SHARE = re.compile(r"(^|/)(recall|hit)@\d+$")
QUANTILE = 1.959964  # of the normal distribution, for 95 %


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` independent queries (Wilson 1927)."""
    square = QUANTILE**2 / count
    middle = (share + square / 2) / (1 + square)
    half = QUANTILE / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def interval(metric: str, metrics: Mapping[str, float]) -> tuple[float, float] | None:
    """Return the interval of a metric of a task; None for one that is no share of its queries."""
    count, value = metrics.get("queries"), metrics.get(metric)
    if not count or value is None or not SHARE.search(metric) or not 0 <= value <= 1:
        return None
    return wilson(value, int(count))


def chance(metric: str, metrics: Mapping[str, float]) -> float | None:
    """Return what a random order of the candidates reaches where a query has one right answer,
    so at least; None where that is not known.
    """
    candidates = metrics.get("candidates")
    if not candidates:
        return None
    if SHARE.search(metric):
        return min(1.0, int(metric.rpartition("@")[2]) / candidates)
    if metric.rpartition("/")[2] == "mean_rank":
        return (candidates + 1) / 2
    if metric.rpartition("/")[2] == "mrr":
        return math.fsum(1 / rank for rank in range(1, int(candidates) + 1)) / candidates
    return 0.5 if metric == "auc" else None
