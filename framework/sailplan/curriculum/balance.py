"""Adaptive multi-source balancing: training sets that look like the benchmark get more of the
steps (recipe 2.2).

Each set is summarised by k-means centroids with cluster sizes, separately for every kind of vector
it has (fused, vision, text, audio). Two sets are compared by optimal transport between their
centroids: the entropic plan P for the cost 1 - cosine, with the cluster sizes as marginals, moves
every cluster to those it resembles, and score = sum(P * cosine) is the mean similarity of what was
matched. A softmax of the scores gives weights.

A score is known no better than its sample and its k-means, which can end elsewhere on another
sample of the same set.
So each training set is drawn from its sample again and clustered anew several times (bootstrap):
the mean is the score, the spread its standard error, and the softmax's temperature is counted in
standard errors. Otherwise chance decides between sets that are alike.
A standard error shrinks with the sample, and weights must not: below SMALLEST_ERROR it counts as
that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import ot

from sailplan.config.fields import JsonObject
from sailplan.config.schema import BalanceConfig
from sailplan.embed.clustering import k_means

SMALLEST_ERROR = 0.0125  # as a cosine; times the default temperature: 0.1

Summary = dict[str, "Clusters"]  # kind of vector ("fused", "vision", ...) -> its clusters


@dataclass(frozen=True)
class Clusters:
    """A set's summary for one kind of vector."""

    centroids: np.ndarray  # float64 [k, D], unit length
    shares: np.ndarray  # float64 [k], cluster sizes, sum 1


@dataclass(frozen=True)
class Balance:
    """Weights and everything they were made from, for the report."""

    weights: dict[str, float]  # training set -> probability, sum 1
    scores: dict[str, float]  # training set -> mean similarity over the benchmarks
    pairs: dict[str, dict[str, float]]  # training set -> benchmark -> similarity
    kinds: dict[str, dict[str, dict[str, float]]] = field(
        default_factory=dict
    )  # the same, per kind of vector
    errors: dict[str, float] = field(
        default_factory=dict
    )  # training set -> standard error of its score

    def as_dict(self) -> JsonObject:
        return {
            "weights": self.weights,
            "scores": self.scores,
            "errors": self.errors,
            "pairs": self.pairs,
            "kinds": self.kinds,
        }


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows of length one, float64 [n, D]."""
    vectors = np.asarray(vectors, dtype=np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def cluster(vectors: np.ndarray, clusters: int, *seed: int | str) -> Clusters:
    """k-means of the unit vectors [n, D] into min(clusters, n) clusters; empty clusters are
    dropped. Same seed, same result.
    """
    rows = unit_rows(vectors)
    labels, centres = k_means(rows, clusters, *seed)
    sizes = np.bincount(labels, minlength=len(centres))
    return Clusters(unit_rows(centres)[sizes > 0], sizes[sizes > 0] / len(rows))


def transport_plan(
    first: Clusters, second: Clusters, epsilon: float, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """(P, C): log-stabilised Sinkhorn plan float64 [k1, k2] for the cost 1 - C, and the centroid
    cosines C.

    Its marginals are the cluster sizes, up to what `iterations` reach; it is scaled to sum 1
    exactly. Working with logarithms keeps small epsilons from underflowing (Cuturi 2013, the
    log-domain form of POT).
    """
    cosines = first.centroids @ second.centroids.T
    plan = ot.sinkhorn(
        first.shares,
        second.shares,
        1.0 - cosines,
        reg=epsilon,
        method="sinkhorn_log",
        numItermax=iterations,
        stopThr=1e-9,
        warn=False,
    )
    return plan / plan.sum(), cosines


def similarity(first: Clusters, second: Clusters, epsilon: float, iterations: int) -> float:
    """sum(P * C), in [-1, 1]: the mean cosine of matched clusters."""
    plan, cosines = transport_plan(first, second, epsilon, iterations)
    return float((plan * cosines).sum())


def compare(
    training: Summary, benchmark: Summary, config: BalanceConfig
) -> tuple[float | None, dict[str, float]]:
    """(score, score per kind): the fused similarity where both sets have it, else the mean over
    the other shared kinds.

    None where the two sets share no kind of vector: audio cannot be compared with pictures.
    """
    kinds = {
        kind: similarity(training[kind], benchmark[kind], config.epsilon, config.iterations)
        for kind in training
        if kind in benchmark
    }
    if "fused" in kinds:
        return kinds["fused"], kinds
    return (float(np.mean(list(kinds.values()))) if kinds else None), kinds


def softmax_weights(scores: dict[str, float], temperature: float, unit: float) -> dict[str, float]:
    """Return the softmax of scores / (temperature * unit).

    A unit of nothing gives equal scores equal weights.
    """
    values = np.array(list(scores.values()))
    exponent = (values - values.max()) / max(temperature * unit, 1e-9)
    shares = np.exp(exponent)
    return {name: float(value) for name, value in zip(scores, shares / shares.sum(), strict=True)}


def unit_of(scores: dict[str, float], errors: dict[str, float], config: BalanceConfig) -> float:
    """Return what the temperature is counted in (`BalanceConfig.temperature_unit`), as a cosine."""
    if config.temperature_unit == "cosine":
        return 1.0
    if config.temperature_unit == "spread":
        return float(np.std(list(scores.values())))
    return max(
        SMALLEST_ERROR, float(np.sqrt(np.mean(np.square(list(errors.values()))))) if errors else 0.0
    )


def with_floor(
    balanced: dict[str, float], fixed: dict[str, float], floor: float = 0.1
) -> dict[str, float]:
    """(1 - floor) * balanced + floor * fixed shares: no set that the stage lists falls below
    that part of its fixed share.
    """
    total = sum(fixed.values())
    return {
        name: (1 - floor) * weight + floor * fixed[name] / total
        for name, weight in balanced.items()
    }


def by_size(sizes: dict[str, int], weights: str) -> Balance:
    """Return weights that look at no vector: uniform, size or sqrt_size, of training sets with
    so many records.
    """
    power = {"uniform": 0.0, "sqrt_size": 0.5, "size": 1.0}[weights]
    values = {name: float(size) ** power for name, size in sizes.items()}
    return Balance({name: value / sum(values.values()) for name, value in values.items()}, {}, {})


def balance(
    training: Mapping[str, Sequence[Summary]], benchmark: dict[str, Summary], config: BalanceConfig
) -> Balance:
    """Return sampling weights of the training sets, each given by one or more summaries
    (bootstrap replicates).

    A set comparable with no benchmark gets the lowest score among the others, so that it neither
    leads nor vanishes; if none is comparable all weights are equal.
    """
    pairs: dict[str, dict[str, float]] = {}
    kinds: dict[str, dict[str, dict[str, float]]] = {}
    errors: dict[str, float] = {}
    for name, replicates in training.items():
        pairs[name], kinds[name], totals = {}, {}, []
        for other, target in benchmark.items():
            found = [compare(summary, target, config) for summary in replicates]
            scores = [score for score, _ in found if score is not None]
            kinds[name][other] = {
                kind: float(np.mean([own[kind] for _, own in found if kind in own]))
                for kind in found[0][1]
            }
            if scores:
                pairs[name][other] = float(np.mean(scores))
                totals.append(scores)
        if totals and len(totals[0]) > 1:
            errors[name] = float(np.mean(totals, axis=0).std(ddof=1))
    known = {name: float(np.mean(list(found.values()))) for name, found in pairs.items() if found}
    lowest = min(known.values(), default=0.0)
    means = {name: known.get(name, lowest) for name in training}
    weights = softmax_weights(
        means, config.temperature, unit_of(means, errors, config) if known else 1.0
    )
    return Balance(weights, means, pairs, kinds, errors)
