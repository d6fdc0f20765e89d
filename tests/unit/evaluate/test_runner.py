"""The evaluation on a made-up pack: equal on 1, 2 and 3 ranks with sharded weights, right
answers told by ids, clear errors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sailplan.config.schema import Config, EvaluationTask
from sailplan.curriculum.testing import write_pack
from sailplan.data.datasets import open_datasets
from sailplan.embed.context import RunContext
from sailplan.embed.embedding import embed_view
from sailplan.errors import ConfigurationError
from sailplan.evaluate.runner import evaluate
from sailplan.model.build import build_encoder
from sailplan.model.testing import join_layout
from sailplan.objective.registry import build_objectives
from sailplan_kernels.testing import run_ranks

SEQ2ITEM = {
    "seq2item": {
        "_target_": "sailplan.objective.seq2item.Seq2Item",
        "pooling": "encoder",
        "layers": 1,
    }
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    found = write_pack(tmp_path_factory.mktemp("pack"))
    found.parallel.dtype = "float64"  # so that no rounding can change an order
    return found


def everything(rank: int, world_size: int, config: Config, tensor: int) -> dict[str, Any]:
    parallel = join_layout(tensor)
    encoder = build_encoder(config.model, config.parallel, parallel, seed=0)
    readers = open_datasets(config)
    objectives = build_objectives(SEQ2ITEM, config.model.embedding, config.data.sets)
    found = evaluate(RunContext(config, parallel, encoder, objectives, readers))
    positions = np.arange(len(readers["things"]))
    image = embed_view(
        encoder,
        readers["things"],
        "item",
        positions,
        parallel=parallel,
        config=config,
        per_modality=True,
    )
    few = embed_view(
        encoder, readers["things"], "image", positions[:1], parallel=parallel, config=config
    )  # fewer rows than ranks
    vectors = [image.fused, *image.by_modality.values(), few.fused]
    return {
        "tasks": found.tasks,
        "examples": found.examples,
        "vectors": vectors,
        "training": encoder.training,
    }


@pytest.fixture(scope="module")
def alone(config: Config) -> dict[str, Any]:
    return run_ranks(everything, 1, config, 1)[0]


@pytest.mark.parametrize(("world_size", "tensor"), [(2, 1), (3, 1), (2, 2)])
def test_any_number_of_ranks_gives_the_same_result(
    config: Config, alone: dict[str, Any], world_size: int, tensor: int
) -> None:
    for found in run_ranks(everything, world_size, config, tensor, timeout=120):
        assert found["training"]
        for name, metrics in alone["tasks"].items():
            assert found["tasks"][name] == pytest.approx(metrics, abs=1e-6), name
        for mine, theirs in zip(found["vectors"], alone["vectors"], strict=True):
            assert torch.allclose(mine, theirs, atol=1e-6)
        assert [e["query"]["text"] for e in found["examples"]["choice"]] == [
            e["query"]["text"] for e in alone["examples"]["choice"]
        ]


def test_every_task_counts_what_it_should(alone: dict[str, Any]) -> None:
    tasks = alone["tasks"]
    assert (
        tasks["names"]["queries"] == 48
        and 0 <= tasks["names"]["recall@1"] <= tasks["names"]["recall@5"] <= 1
    )
    assert (
        0 < tasks["names"]["prefix_4/neighbours@10"] < 1
        and tasks["names"]["prefix_4/neighbours@10"] <= tasks["names"]["prefix_8/neighbours@10"]
    )
    assert {"prefix_4/recall@5", "prefix_8/recall@1"} <= set(
        tasks["names"]
    ) and "prefix_16/recall@5" not in tasks["names"]
    assert tasks["tags"]["queries"] == 48 and tasks["tags"]["candidates"] == 48
    assert tasks["tags"]["recall@1"] in (
        0.0,
        1 / 3,
        2 / 3,
        1.0,
    )  # equal texts share all their items: three answers exist
    assert tasks["choice"]["queries"] == 5 and tasks["choice"]["candidates"] == 48
    assert (
        -1 <= tasks["choice"]["kendall"] <= 1
    )  # over all ten graded pairs; the five with score 0 ask for nothing
    assert tasks["labels"]["candidates"] == 4  # each label text once
    assert tasks["groups"]["clusters"] == 4
    assert tasks["completion"]["queries"] == 4 * 5  # four held-out users, five targets each
    assert {"popularity/recall@5", "content_mean/recall@5"} <= set(tasks["completion"])


def test_examples_show_pictures_scores_and_right_answers(alone: dict[str, Any]) -> None:
    for example in alone["examples"]["choice"]:
        assert example["query"]["text"].startswith("want")
        assert all(
            result["image"].startswith("data:image/webp;base64,") for result in example["results"]
        )
        scores = [result["score"] for result in example["results"]]
        assert scores == sorted(scores, reverse=True) and len(scores) == 5
    assert alone["examples"]["tags"][0]["query"]["text"] in ("low", "middle", "high")


def test_impossible_tasks_are_named(config: Config) -> None:
    def attempt(rank: int, world_size: int, task: EvaluationTask) -> str:
        parallel = join_layout(1)
        broken = Config(data=config.data, model=config.model, parallel=config.parallel)
        broken.evaluation.tasks = {"mine": task}
        with pytest.raises(ConfigurationError) as caught:
            evaluate(
                RunContext(
                    broken,
                    parallel,
                    build_encoder(config.model, config.parallel, parallel, seed=0),
                    {},
                    open_datasets(config),
                )
            )
        return str(caught.value)

    def message(task: EvaluationTask) -> str:
        return run_ranks(attempt, 1, task)[0]

    assert "evaluation.tasks.mine.kind=guess" in message(EvaluationTask("things", kind="guess"))
    assert "metrics.0=accuracy" in message(
        EvaluationTask("things", query="image", target="name", metrics=["accuracy"])
    )
    assert "train, held_out" in message(
        EvaluationTask("things", query="image", target="name", split="tomorrow")
    ).replace("held_out, train", "train, held_out")
    assert "expected sequences" in message(
        EvaluationTask("things", kind="sequence", query="image", target="name")
    )
    assert "no record of 'things' has this key" in message(
        EvaluationTask("things", kind="clustering", query="item", label="nothing")
    )
