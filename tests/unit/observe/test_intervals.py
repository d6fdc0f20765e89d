"""Intervals and chance against values of the literature and against drawing at random."""

from __future__ import annotations

import random

import pytest

from sailplan.observe.intervals import chance, interval, wilson


def test_wilsons_interval_is_that_of_the_books() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for found, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(found / count, count) == pytest.approx((low, high), abs=5e-5)


def test_only_shares_of_queries_have_an_interval() -> None:
    metrics = {"recall@10": 0.5, "auc": 0.8, "prefix_48/recall@10": 0.4, "queries": 100.0}
    assert interval("recall@10", metrics) == pytest.approx(wilson(0.5, 100))
    assert interval("prefix_48/recall@10", metrics) is not None
    assert interval("auc", metrics) is None and interval("recall@10", {"recall@10": 0.5}) is None


def test_chance_is_what_a_random_order_reaches() -> None:
    source, candidates, turns = random.Random(0), 40, 4000
    ranks = [source.randint(1, candidates) for _ in range(turns)]
    metrics = {"candidates": float(candidates)}
    drawn = {
        "recall@5": sum(rank <= 5 for rank in ranks) / turns,
        "mean_rank": sum(ranks) / turns,
        "mrr": sum(1 / rank for rank in ranks) / turns,
    }
    for name, value in drawn.items():
        assert chance(name, metrics) == pytest.approx(value, rel=0.08), name
    assert chance("recall@100", metrics) == 1.0 and chance("auc", metrics) == 0.5
    assert chance("recall@5", {}) is None and chance("nmi", metrics) is None
