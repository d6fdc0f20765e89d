"""Risks: a recorded target is not what is scored, the history's items are (not) left out,
numbers that are not the field's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from sklearn.metrics import normalized_mutual_info_score, top_k_accuracy_score

from sailplan.config.schema import Config, EvaluationTask
from sailplan.curriculum.testing import write_pack
from sailplan.data.datasets import open_datasets
from sailplan.data.writer import Record, write_shards
from sailplan.embed.context import RunContext
from sailplan.embed.embedding import embed_view
from sailplan.embed.scoring import Pairs
from sailplan.errors import ConfigurationError
from sailplan.evaluate import metrics, sequences
from sailplan.evaluate.retrieval_task import item_view
from sailplan.evaluate.runner import evaluate
from sailplan.model.build import build_encoder
from sailplan.model.testing import join_layout
from sailplan_kernels.exchange import AllGather, Local
from sailplan_kernels.testing import run_ranks

AT = [1, 5, 10]


def things(numbers: Any) -> list[str]:
    return [f"things/{number:03d}" for number in numbers]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("pack")
    found = write_pack(root)
    found.parallel.dtype = "float64"
    random = np.random.default_rng(5)
    bodies = []
    for user in range(60):
        items = random.permutation(48)[:9]
        body = {
            "id": f"next/{user:03d}",
            "split": "held_out" if user < 40 else "train",
            "history": things(items[:7]),
            "target": things(items[7:8])[0],
        }
        if user == 3:
            body["target"] = body["history"][2]  # bought again
        if user == 4:
            body["target"] = "things/999"
        if user == 5:
            body["history"][0] = "things/999"
        bodies.append(body)
    write_shards([Record(body) for body in bodies], root / "next", "next", 20)
    found.data.sets["next"] = replace(found.data.sets["histories"], shards=str(root / "next"))
    ranked = [
        {
            "id": f"ranked/{n:03d}",
            "split": "held_out",
            "query": things([n])[0],
            "item": things([n + 1])[0],
            "best": things(random.permutation(48)[: n % 7]),
        }
        for n in range(40)
    ]
    write_shards([Record(body) for body in ranked], root / "ranked", "ranked", 20)
    found.data.sets["ranked"] = replace(found.data.sets["neighbours"], shards=str(root / "ranked"))
    found.evaluation.tasks = {
        "next": EvaluationTask(
            "next",
            kind="sequence",
            query="history",
            target="item",
            candidates="all",
            recall_at=AT,
            metrics=["recall", "nmi"],
        ),
        "agree": EvaluationTask(
            "ranked",
            query="query",
            target="item",
            candidates="all",
            metrics=["overlap", "kendall", "nmi"],
            reference="best",
            recall_at=[1, 3],
        ),
    }
    return found


def run(rank: int, world_size: int, config: Config, only: list[str]) -> dict[str, Any]:
    parallel = join_layout(1)
    encoder = build_encoder(config.model, config.parallel, parallel, seed=0)
    readers = open_datasets(config)
    found = evaluate(RunContext(config, parallel, encoder, {}, readers), only)
    everything = np.arange(48)
    vectors = {
        name: embed_view(
            encoder, readers["things"], view, everything, parallel=parallel, config=config
        ).fused
        for name, view in views(config).items()
    }
    reader = readers["next"]
    return {
        "tasks": found.tasks,
        "examples": found.examples,
        "vectors": {name: value.numpy() for name, value in vectors.items()},
        "bodies": [reader.body(position) for position in range(len(reader))],
    }


def views(config: Config) -> dict[str, Any]:
    """How the tasks show items."""
    sides = config.data.sets["ranked"].views
    return {"item": "item", "query": item_view(sides["query"]), "target": item_view(sides["item"])}


@pytest.fixture(scope="module")
def alone(config: Config) -> dict[str, Any]:
    return run_ranks(run, 1, config, ["next", "agree"])[0]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_a_recorded_target_is_scored_as_recorded(alone: dict[str, Any]) -> None:
    """Against scikit-learn's top-k accuracy, vanilla and with the history's items taken out of
    the scores.
    """
    items, found = unit(alone["vectors"]["item"].astype(np.float64)), alone["tasks"]["next"]
    place = {name: number for number, name in enumerate(things(range(48)))}
    asked = [
        body for body in alone["bodies"] if body["split"] == "held_out" and body["target"] in place
    ]
    histories = [[place[name] for name in body["history"] if name in place] for body in asked]
    targets = np.array([place[body["target"]] for body in asked])
    queries = unit(
        np.stack([items[history[-4:]].mean(0) for history in histories])
    )  # history_length: 4
    popular = np.zeros(48)
    for body in alone["bodies"]:
        if body["split"] == "train":
            popular[[place[name] for name in {*body["history"], body["target"]}]] += 1
    assert (
        found["queries"] == 39
        and found["unknown_targets"] == 1
        and found["repeated_targets"] == 1
        and found["candidates"] == 48
    )
    scores = queries @ items.T
    once = np.array(
        [target not in history for target, history in zip(targets, histories, strict=True)]
    )
    without = scores.copy()
    for row, history in enumerate(histories):
        without[row, history] = -2
    for k in AT:
        assert found[f"recall@{k}"] == pytest.approx(
            top_k_accuracy_score(targets, scores, k=k, labels=range(48))
        )
        assert found[f"filtered/recall@{k}"] == pytest.approx(
            top_k_accuracy_score(targets[once], without[once], k=k, labels=range(48))
        )
        assert (
            found[f"content_mean/filtered/recall@{k}"] == found[f"filtered/recall@{k}"]
        )  # no objective represents histories here
    assert found["filtered/queries"] == 38 and found["filtered/recall@10"] > found["recall@10"]
    order = metrics.popularity_ranks(popular, targets, [np.empty(0, dtype=np.int64)] * len(targets))
    assert found["popularity/recall@10"] == pytest.approx((order <= 10).mean())
    assert all(
        result["score"] <= 1
        for example in alone["examples"]["next"]
        for result in example["results"]
    )


def test_agreement_with_a_reference_is_scipys_and_set_arithmetic(
    alone: dict[str, Any], config: Config
) -> None:
    reader = open_datasets(config)["ranked"]
    scores = (
        unit(alone["vectors"]["query"].astype(np.float64))
        @ unit(alone["vectors"]["target"].astype(np.float64)).T
    )
    taus, first, third = [], [], []
    for position in range(len(reader)):
        body = reader.body(position)
        own, right = int(body["query"][-3:]), int(body["item"][-3:])
        row = scores[own].copy()
        if own != right:
            row[own] = -np.inf
        ranking = [int(name[-3:]) for name in body["best"]]
        if ranking:
            best = np.argsort(-row, kind="stable").tolist()
            first.append(best[0] == ranking[0])
            size = min(3, len(ranking))
            third.append(len({*best[:size]} & {*ranking[:size]}) / size)
        if len(ranking) > 1:
            taus.append(kendalltau(row[ranking], -np.arange(len(ranking))).statistic)
    found = alone["tasks"]["agree"]
    assert found["reference/queries"] == len(first) > 25
    assert found["reference/kendall"] == pytest.approx(np.mean(taus))
    assert found["reference/overlap@1"] == pytest.approx(np.mean(first)) and found[
        "reference/overlap@3"
    ] == pytest.approx(np.mean(third))
    assert 0 <= found["nmi"] <= 1 and 0 <= alone["tasks"]["next"]["nmi"] <= 1


def test_any_number_of_ranks_gives_the_same(config: Config, alone: dict[str, Any]) -> None:
    for found in run_ranks(run, 2, config, ["next", "agree"], timeout=120):
        for name in ("next", "agree"):
            assert found["tasks"][name] == pytest.approx(alone["tasks"][name], abs=1e-9)


def test_nmi_of_queries_and_targets_is_scikit_learns() -> None:
    """Well-separated clusters; some targets lie in another cluster than their query's."""
    random = np.random.default_rng(0)
    centres = np.linalg.qr(random.standard_normal((16, 16)))[0][:6]
    asked = random.integers(0, 6, 600)
    answered = np.where(random.random(600) < 0.3, random.integers(0, 6, 600), asked)
    vectors = [
        torch.from_numpy(5 * centres[labels] + 0.05 * random.standard_normal((600, 16)))
        for labels in (asked, answered)
    ]
    pairs = Pairs(torch.arange(600), torch.arange(600))
    found = metrics.pair_agreement(vectors[0], vectors[1], pairs, 6)
    assert (
        found["nmi"] == pytest.approx(normalized_mutual_info_score(asked, answered), abs=1e-12)
        and 0.3 < found["nmi"] < 0.8
    )
    assert metrics.pair_agreement(vectors[0], vectors[0], pairs, 6)["nmi"] == pytest.approx(1.0)
    shuffled = Pairs(torch.arange(600), torch.from_numpy(random.permutation(600)))
    assert metrics.pair_agreement(vectors[0], vectors[0], shuffled, 6)["nmi"] < 0.1


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_perfect_and_a_reversed_reference(world_size: int) -> None:
    random = torch.Generator().manual_seed(0)
    queries, candidates = torch.randn(7, 5, generator=random), torch.randn(30, 5, generator=random)
    order = torch.argsort(
        -torch.nn.functional.cosine_similarity(queries[:, None], candidates[None], dim=-1), dim=1
    ).numpy()
    excluded = Pairs.of(torch.arange(7), torch.from_numpy(order[:, 0].copy()))

    def measure(rank: int, world: int) -> list[dict[str, float]]:
        exchange = AllGather() if world > 1 else Local()
        rankings = [list(order), list(order[:, ::-1]), list(order[:, 1:])]
        hidden = [None, None, excluded]
        return [
            metrics.ranking_agreement(queries, candidates, one, [1, 10], left, exchange)
            for one, left in zip(rankings, hidden, strict=True)
        ]

    for best, worst, without in run_ranks(measure, world_size):
        found = [one["reference/kendall"] for one in (best, worst, without)]
        assert found == pytest.approx([1.0, -1.0, 1.0])
        assert (
            best["reference/overlap@10"] == without["reference/overlap@10"] == 1.0
            and worst["reference/overlap@10"] == 0.0
        )


def test_a_reference_for_a_task_without_a_ranking_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"tasks\.mine\.reference=best: kind sequence"):
        EvaluationTask(
            "next", kind="sequence", query="history", target="item", reference="best"
        ).validate("evaluation.tasks.mine")
    with pytest.raises(
        ConfigurationError, match=r"tasks\.mine\.reference=best beside metrics recall"
    ):
        EvaluationTask("next", query="query", target="item", reference="best").validate(
            "evaluation.tasks.mine"
        )


def test_a_reference_that_is_not_there_and_targets_that_nobody_knows_are_named(
    config: Config, tmp_path: Path
) -> None:
    def attempt(rank: int, world_size: int, task: EvaluationTask, shards: str | None) -> str:
        parallel = join_layout(1)
        if shards:
            config.data.sets["next"].shards = shards
        config.evaluation.tasks = {"mine": task}
        with pytest.raises(ConfigurationError) as caught:
            evaluate(
                RunContext(
                    config,
                    parallel,
                    build_encoder(config.model, config.parallel, parallel, seed=0),
                    {},
                    open_datasets(config),
                )
            )
        return str(caught.value)

    task = EvaluationTask(
        "ranked", query="query", target="item", metrics=["kendall"], reference="worst"
    )
    assert (
        "reference=worst: no record of 'ranked' has a list of candidates' ids"
        in run_ranks(attempt, 1, task, None)[0]
    )
    write_shards(
        [
            Record(
                {"id": "next/0", "split": "held_out", "history": ["things/000"], "target": "nobody"}
            )
        ],
        tmp_path / "next",
        "next",
        20,
    )
    asked = EvaluationTask("next", kind="sequence", query="history", target="item")
    assert (
        "no record of 'next' has a target and a history item"
        in run_ranks(attempt, 1, asked, str(tmp_path / "next"))[0]
    )


def test_histories_are_represented_a_few_at_a_time(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_ranks(run, 1, config, ["next"])[0]["tasks"]["next"]
    monkeypatch.setattr(sequences, "HISTORIES", 3)
    asked: list[int] = []
    take = sequences._items

    def items(*arguments: Any) -> Any:
        fused, valid = take(*arguments)
        asked.append(valid.numel())
        return fused, valid

    def counted(rank: int, world_size: int) -> tuple[dict[str, float], list[int]]:
        monkeypatch.setattr(sequences, "_items", items)
        return run(rank, world_size, config, ["next"])["tasks"]["next"], asked

    for found, sizes in run_ranks(counted, 2):
        assert found == pytest.approx(whole)
        length = config.data.sets["next"].history_length
        assert len(sizes) == 13 and max(sizes) == 3 * length, "39 histories"
