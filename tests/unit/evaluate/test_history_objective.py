"""Risk: an objective whose entry has another name is passed over, and set completion scores its own
baseline as the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sailplan.config.schema import Config, StageConfig
from sailplan.curriculum.testing import write_pack
from sailplan.data.datasets import open_datasets
from sailplan.embed.context import RunContext
from sailplan.evaluate.runner import evaluate
from sailplan.evaluate.sequences import history_objective
from sailplan.model.build import build_encoder
from sailplan.model.testing import join_layout
from sailplan.objective.registry import build_objectives
from sailplan_kernels.testing import run_ranks

TARGET = {"_target_": "sailplan.objective.seq2item.Seq2Item"}
# As in a run whose stage trains an entry of one's own beside the default one, which lies there.
ENTRIES = {"seq2item": TARGET, "basket": {**TARGET, "pooling": "encoder", "layers": 1}}


def completion(
    rank: int, world_size: int, config: Config, weights: dict[str, float]
) -> dict[str, float]:
    config.order, config.stages = ["one"], {"one": StageConfig(objectives=weights)}
    only = {name: task for name, task in config.evaluation.tasks.items() if task.kind == "sequence"}
    config.evaluation.tasks = only
    parallel = join_layout(1)
    objectives = build_objectives(ENTRIES, config.model.embedding, config.data.sets)
    torch.manual_seed(0)
    for parameter in objectives.parameters():
        torch.nn.init.normal_(parameter)
    encoder = build_encoder(config.model, config.parallel, parallel, seed=0)
    context = RunContext(config, parallel, encoder, objectives, open_datasets(config))
    (found,) = evaluate(context).tasks.values()
    return found


def test_set_completion_asks_the_objective_that_is_trained_whatever_it_is_called(
    tmp_path: Path,
) -> None:
    config = write_pack(tmp_path)
    (trained,) = run_ranks(completion, 1, config, {"basket": 1.0, "seq2item": 0.0})
    (beside,) = run_ranks(completion, 1, config, {"seq2item": 1.0})
    assert trained["mean_rank"] != trained["content_mean/mean_rank"]
    assert beside["mean_rank"] == beside["content_mean/mean_rank"]  # the mean of the items
    assert trained["content_mean/mean_rank"] == beside["content_mean/mean_rank"]


def chosen(stages: dict[str, dict[str, float]], **objectives: Any) -> Any:
    built = build_objectives(objectives, 8, {})
    config = Config(
        order=list(stages),
        stages={name: StageConfig(objectives=weights) for name, weights in stages.items()},
    )
    found = history_objective(RunContext(config, None, None, built, {}))  # type: ignore[arg-type]
    return next((name for name, each in built.items() if each is found), None)


@pytest.mark.parametrize(
    ("stages", "name"),
    [
        ({"one": {"b": 1.0}}, "b"),
        ({"one": {"b": 1.0}, "two": {"a": 0.1}}, "a"),  # the last stage's
        ({"one": {"b": 1.0}, "two": {"a": 0.0, "other": 1.0}}, "b"),
        ({"one": {"a": 0.5, "b": 1.0}}, "b"),  # the heavier one
        ({"one": {"other": 1.0}}, "a"),
    ],
)
def test_of_several_it_is_the_one_that_was_trained_last(
    stages: dict[str, dict[str, float]], name: str
) -> None:
    other = {"_target_": "sailplan.objective.cosent.CoSENT"}
    assert chosen(stages, other=other, a=TARGET, b=TARGET) == name
    assert chosen(stages, other=other) is None
