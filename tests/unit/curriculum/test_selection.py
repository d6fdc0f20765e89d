"""lambda*, balancing and subsets against brute force and obvious cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sailplan.config.schema import BalanceConfig
from sailplan.curriculum.balance import (
    SMALLEST_ERROR,
    Clusters,
    balance,
    by_size,
    cluster,
    softmax_weights,
    transport_plan,
    unit_of,
    unit_rows,
    with_floor,
)
from sailplan.curriculum.subset import keep_highest, nearness
from sailplan.curriculum.threshold import f1_threshold
from sailplan.embed.scoring import Pairs
from sailplan.embed.sides import unit
from sailplan.model.testing import join_layout
from sailplan_kernels.exchange import AllGather
from sailplan_kernels.testing import run_ranks


def fitting_sample(
    seed: int, decimals: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, Pairs]:
    random = torch.Generator().manual_seed(seed)
    queries = torch.randn(25, 8, generator=random)
    targets = queries + 0.8 * torch.randn(25, 8, generator=random)
    if decimals is not None:
        queries, targets = queries.round(decimals=decimals), targets.round(decimals=decimals)
    own = torch.arange(25)
    return queries, targets, Pairs.of(torch.cat([own, own[:5]]), torch.cat([own, own[5:10]]))


@pytest.mark.parametrize(("seed", "decimals"), [(0, None), (1, None), (2, 0)])
def test_lambda_is_the_best_of_all_thresholds(seed: int, decimals: int | None) -> None:
    queries, targets, positives = fitting_sample(seed, decimals)
    scores = (unit(queries) @ unit(targets).T).float().numpy()
    labels = np.zeros(scores.shape, dtype=bool)
    labels[positives.rows, positives.columns] = True

    def confusion(value: float) -> tuple[int, int, int, int]:
        predicted = scores >= np.float32(value)
        return (
            (predicted & labels).sum(),
            (predicted & ~labels).sum(),
            (~predicted & labels).sum(),
            (~predicted & ~labels).sum(),
        )

    best = max(2 * tp / (2 * tp + fp + fn) for tp, fp, fn, _ in map(confusion, np.unique(scores)))
    found = f1_threshold(queries, targets, positives)
    assert found.f1 == pytest.approx(best, abs=1e-12)
    assert (found.tp, found.fp, found.fn, found.tn) == confusion(found.value)
    assert found.precision == found.tp / (found.tp + found.fp)


@pytest.mark.parametrize("world_size", [2, 3])
def test_lambda_is_the_same_on_any_number_of_ranks(world_size: int) -> None:
    sample = fitting_sample(3)
    alone = f1_threshold(*sample)
    assert (
        run_ranks(lambda rank, world: f1_threshold(*sample, AllGather()), world_size)
        == [alone] * world_size
    )


def test_sinkhorn_plan_keeps_the_cluster_sizes() -> None:
    random = np.random.default_rng(0)
    first, second = (
        cluster(random.standard_normal((80, 6)), 7, 0),
        cluster(random.standard_normal((50, 6)), 5, 1),
    )
    plan, _ = transport_plan(first, second, epsilon=0.05, iterations=1000)
    assert np.allclose(plan.sum(1), first.shares, atol=1e-6)
    assert np.allclose(plan.sum(0), second.shares, atol=1e-6)


def test_narrow_costs_do_not_underflow() -> None:
    far = Clusters(np.eye(4)[:1], np.ones(1))
    opposite = Clusters(-np.eye(4)[:1], np.ones(1))
    plan, _ = transport_plan(far, opposite, epsilon=0.001, iterations=50)
    assert plan == pytest.approx(np.ones((1, 1)))


def again(rows: np.ndarray, clusters: int, times: int = 8) -> list[dict[str, Clusters]]:
    """Bootstrap replicates, as `kinds.replicates` makes them."""
    random = np.random.default_rng(len(rows))
    return [
        {"fused": cluster(rows[random.integers(len(rows), size=len(rows))], clusters, number)}
        for number in range(times)
    ]


def mixture(random: np.random.Generator, centres: np.ndarray, rows: int = 120) -> np.ndarray:
    return centres[random.integers(len(centres), size=rows)] + 0.25 * random.standard_normal(
        (rows, centres.shape[1])
    )


def test_equal_sets_get_equal_weights_in_every_draw_and_near_ones_lead() -> None:
    """Five samples of one distribution: 0.20 +- 0.05 each, in 10 of 10 draws.

    Two near and three far sets: each near one 0.3 or more.
    """
    config, lowest, highest = BalanceConfig(clusters=5, iterations=40), 1.0, 0.0
    for draw in range(10):
        random = np.random.default_rng(draw)
        centres, others = (
            unit_rows(random.standard_normal((6, 8))),
            unit_rows(random.standard_normal((6, 8))),
        )
        target = {"task": {"fused": cluster(mixture(random, centres), 5, "task", draw)}}
        found = balance(
            {f"equal {number}": again(mixture(random, centres), 5) for number in range(5)},
            target,
            config,
        )
        lowest, highest = (
            min(lowest, *found.weights.values()),
            max(highest, *found.weights.values()),
        )
        assert all(error > 0 for error in found.errors.values())
        if draw < 2:
            sets = {
                f"{'near' if number < 2 else 'far'} {number}": again(
                    mixture(random, centres if number < 2 else others), 5
                )
                for number in range(5)
            }
            weights = with_floor(
                balance(sets, target, config).weights, dict.fromkeys(sets, 1.0), config.floor
            )
            assert min(weights["near 0"], weights["near 1"]) >= 0.3
    assert lowest >= 0.15 and highest <= 0.25, (lowest, highest)


def test_weights_that_look_at_no_vector() -> None:
    sizes = {"small": 100, "large": 900}
    assert by_size(sizes, "uniform").weights == {"small": 0.5, "large": 0.5}
    assert by_size(sizes, "size").weights == pytest.approx({"small": 0.1, "large": 0.9})
    assert by_size(sizes, "sqrt_size").weights == pytest.approx({"small": 0.25, "large": 0.75})


def test_balancing_prefers_the_obviously_closer_set() -> None:
    random = np.random.default_rng(0)
    centre = np.eye(8)

    def around(axis: int, spread: float = 0.1) -> np.ndarray:
        return centre[axis] + spread * random.standard_normal((60, 8))

    config = BalanceConfig(clusters=4)
    training = {
        "near": again(around(0), 4),
        "middle": again(np.concatenate([around(0), around(3)]), 4),
        "far": again(around(5), 4),
    }
    result = balance(training, {"task": {"fused": cluster(around(0), 4, "task")}}, config)
    assert result.weights["near"] > result.weights["middle"] > result.weights["far"]
    assert sum(result.weights.values()) == pytest.approx(1.0)


def test_only_shared_kinds_are_compared() -> None:
    random = np.random.default_rng(0)
    vision, text, audio = (
        cluster(random.standard_normal((30, 4)), 3, name) for name in ("vision", "text", "audio")
    )
    training = {"pictures": [{"vision": vision, "text": text}], "sounds": [{"audio": audio}]}
    result = balance(
        training, {"task": {"vision": vision, "text": text}}, BalanceConfig(epsilon=0.01)
    )
    assert result.pairs["sounds"] == {}
    assert result.pairs["pictures"]["task"] == pytest.approx(
        np.mean(list(result.kinds["pictures"]["task"].values()))
    )
    assert result.weights == pytest.approx({"pictures": 0.5, "sounds": 0.5})


def test_a_temperature_is_counted_in_what_the_configuration_says() -> None:
    scores, errors = {"a": 0.701, "b": 0.702, "c": 0.703}, dict.fromkeys("abc", 0.02)
    spread, cosine, error = (
        softmax_weights(scores, 1.0, unit_of(scores, errors, BalanceConfig(temperature_unit=name)))
        for name in ("spread", "cosine", "standard_error")
    )
    assert spread["c"] > 2 * spread["a"] and cosine["c"] == pytest.approx(1 / 3, abs=1e-3)
    assert error["c"] / error["a"] == pytest.approx(np.exp(0.002 / 0.02))
    exact = unit_of(scores, dict.fromkeys("abc", 1e-6), BalanceConfig())
    assert exact == SMALLEST_ERROR  # a large sample does not make the choice hard
    assert softmax_weights({"a": 0.5, "b": 0.5}, 1.0, 0.0) == {"a": 0.5, "b": 0.5}


def test_clusters_are_deterministic() -> None:
    vectors = np.random.default_rng(0).standard_normal((40, 5))
    assert np.array_equal(cluster(vectors, 6, "x").centroids, cluster(vectors, 6, "x").centroids)
    assert (
        len(cluster(np.ones((9, 3)), 6, "x").centroids) == 1
    )  # equal rows make one cluster, no warning, no crash


def test_subset_keeps_the_nearest_records() -> None:
    random = np.random.default_rng(0)
    near, far = (
        np.eye(6)[0] + 0.1 * random.standard_normal((10, 6)),
        np.eye(6)[4] + 0.1 * random.standard_normal((30, 6)),
    )
    vectors = {"fused": np.concatenate([far, near])}
    scores = nearness(vectors, [{"fused": Clusters(unit_rows(np.eye(6)[:1]), np.ones(1))}])
    assert scores is not None
    assert scores.argsort()[-10:].min() >= 30
    assert nearness({"audio": near}, [{"fused": Clusters(np.eye(6), np.ones(6) / 6)}]) is None


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_highest_are_kept_and_ties_go_by_position(tmp_path: Path, world_size: int) -> None:
    """As a sort of all would: ties at the cut, missing sides (-inf), records that always stay."""
    random = np.random.default_rng(0)
    cases = {
        "ties": np.round(random.standard_normal(101), 1),
        "equal": np.zeros(40),
        "one": np.array([-0.5]),
        "missing": np.where(np.arange(30) % 3 == 0, -np.inf, random.standard_normal(30)),
        "always": np.where(np.arange(50) % 4 == 0, np.nan, -np.abs(random.standard_normal(50))),
    }

    def keep(rank: int, world: int) -> dict[str, list[int]]:
        parallel = join_layout(1)
        return {
            f"{name} {fraction}": keep_highest(
                parallel,
                3 + 2 * np.arange(len(scores)),
                lambda start, stop, scores=scores: scores[start:stop].copy(),
                fraction,
                tmp_path / str(world),
                f"{name}-{fraction}",
            ).tolist()
            for name, scores in cases.items()
            for fraction in (0.25, 0.5, 1.0)
        }

    for found in run_ranks(keep, world_size):
        for key, kept in found.items():
            name, fraction = key.split()
            scores = cases[name]
            ranked = np.flatnonzero(~np.isnan(scores))
            count = max(1, round(float(fraction) * len(ranked)))
            best = ranked[np.lexsort((ranked, -scores[ranked]))[:count]]
            wanted = np.sort([*best, *np.flatnonzero(np.isnan(scores))])
            assert kept == (3 + 2 * wanted).astype(int).tolist()
