"""Adaptive multi-source balancing: training sets that look like the benchmark get more of the steps (recipe 2.2).

Each set is summarised by k-means centroids with cluster sizes, separately for every kind of vector it has (fused,
vision, text, audio). Two sets are compared by optimal transport between their centroids: the entropic plan P for
the cost 1 - cosine, with the cluster sizes as marginals, moves every cluster to those it resembles, and
score = sum(P * cosine) is the mean similarity of what was matched. Softmax of the standardised scores gives weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ot

from sailplan.config.schema import BalanceConfig
from sailplan.embed.clustering import k_means

Summary = dict[str, "Clusters"]  # kind of vector ("fused", "vision", ...) -> its clusters


@dataclass(frozen=True)
class Clusters:
    """A set's summary for one kind of vector."""

    centroids: np.ndarray  # float64 [k, D], unit length
    shares: np.ndarray  # float64 [k], cluster sizes, sum 1


@dataclass
class Balance:
    """Weights and everything they were made from, for the report."""

    weights: dict[str, float]  # training set -> probability, sum 1
    scores: dict[str, float]  # training set -> mean similarity over the benchmarks
    pairs: dict[str, dict[str, float]]  # training set -> benchmark -> similarity
    kinds: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # the same, per kind of vector

    def as_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "scores": self.scores, "pairs": self.pairs, "kinds": self.kinds}


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows of length one, float64 [n, D]."""
    vectors = np.asarray(vectors, dtype=np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def cluster(vectors: np.ndarray, clusters: int, *seed: int | str) -> Clusters:
    """k-means of the unit vectors [n, D] into min(clusters, n) clusters; empty clusters are dropped. Same seed, same result."""
    rows = unit_rows(vectors)
    labels, centres = k_means(rows, clusters, *seed)
    sizes = np.bincount(labels, minlength=len(centres))
    return Clusters(unit_rows(centres)[sizes > 0], sizes[sizes > 0] / len(rows))


def transport_plan(first: Clusters, second: Clusters, epsilon: float, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """(P, C): log-stabilised Sinkhorn plan float64 [k1, k2] for the cost 1 - C, and the centroid cosines C.

    Its marginals are the cluster sizes, up to what `iterations` reach; it is scaled to sum 1 exactly. Working with
    logarithms keeps small epsilons from underflowing (Cuturi 2013, the log-domain form of POT).
    """
    cosines = first.centroids @ second.centroids.T
    plan = ot.sinkhorn(
        first.shares, second.shares, 1.0 - cosines, reg=epsilon, method="sinkhorn_log", numItermax=iterations, stopThr=1e-9, warn=False
    )
    return plan / plan.sum(), cosines


def similarity(first: Clusters, second: Clusters, epsilon: float, iterations: int) -> float:
    """sum(P * C), in [-1, 1]: the mean cosine of matched clusters."""
    plan, cosines = transport_plan(first, second, epsilon, iterations)
    return float((plan * cosines).sum())


def compare(training: Summary, benchmark: Summary, config: BalanceConfig) -> tuple[float | None, dict[str, float]]:
    """(score, score per kind): the fused similarity where both sets have it, else the mean over the other shared kinds.

    None where the two sets share no kind of vector: audio cannot be compared with pictures.
    """
    kinds = {
        kind: similarity(training[kind], benchmark[kind], config.epsilon, config.iterations) for kind in training if kind in benchmark
    }
    if "fused" in kinds:
        return kinds["fused"], kinds
    return (float(np.mean(list(kinds.values()))) if kinds else None), kinds


def softmax_weights(scores: dict[str, float], temperature: float) -> dict[str, float]:
    """Softmax of the standardised scores divided by the temperature. Cosines sit in a narrow band: without
    standardising, the weights come out uniform. Equal scores give equal weights."""
    values = np.array(list(scores.values()))
    spread = values.std()
    standard = (values - values.mean()) / spread if spread > 1e-12 else np.zeros_like(values)
    exponent = np.exp((standard - standard.max()) / temperature)
    return {name: float(value) for name, value in zip(scores, exponent / exponent.sum(), strict=True)}


def with_floor(balanced: dict[str, float], fixed: dict[str, float], floor: float = 0.1) -> dict[str, float]:
    """(1 - floor) * balanced + floor * fixed shares: no set that the stage lists falls below a tenth of its fixed share."""
    total = sum(fixed.values())
    return {name: (1 - floor) * weight + floor * fixed[name] / total for name, weight in balanced.items()}


def balance(training: dict[str, Summary], benchmark: dict[str, Summary], config: BalanceConfig) -> Balance:
    """Sampling weights of the training sets. A set comparable with no benchmark gets the lowest score among the others,
    so that it neither leads nor vanishes; if none is comparable all weights are equal."""
    pairs: dict[str, dict[str, float]] = {}
    kinds: dict[str, dict[str, dict[str, float]]] = {}
    for name, summary in training.items():
        pairs[name], kinds[name] = {}, {}
        for other, target in benchmark.items():
            score, kinds[name][other] = compare(summary, target, config)
            if score is not None:
                pairs[name][other] = score
    known = {name: float(np.mean(list(found.values()))) for name, found in pairs.items() if found}
    lowest = min(known.values(), default=0.0)
    scores = {name: known.get(name, lowest) for name in training}
    return Balance(softmax_weights(scores, config.temperature), scores, pairs, kinds)
