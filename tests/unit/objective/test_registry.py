"""Objectives from configuration: every shipped file builds, weights are equal on all ranks,
mistakes are one clear line.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sailplan.config.components import validate
from sailplan.config.compose import compose
from sailplan.config.schema import DataConfig, DatasetConfig, PatternConfig, PatternKey, ViewConfig
from sailplan.errors import ConfigurationError
from sailplan.objective.protocol import Objective
from sailplan.objective.registry import build_objectives, check_objectives
from sailplan.objective.temperature import Temperatures

DATASETS = {"items": DatasetConfig()}


class Mine(Objective):
    """A user's own loss."""

    def __init__(
        self, *, embedding: int, datasets: dict[str, DatasetConfig], strength: float
    ) -> None:
        super().__init__()
        self.strength = strength


def build(options: dict[str, Any], **more: Any) -> Any:
    return build_objectives({"mine": options}, 16, DATASETS, **more)["mine"]


def test_every_shipped_objective_builds() -> None:
    config = compose([])
    objectives = build_objectives(config.objectives, config.model.embedding, config.data.sets)
    assert set(objectives) == {"infonce", "cosent", "micl", "late_fusion", "seq2item", "id2item"}
    others = ("sigmoid", "multi_positive", "score_distillation", "late_interaction")
    more = compose([f"+objective=[{','.join(others)}]"])
    built = build_objectives(more.objectives, more.model.embedding, more.data.sets)
    assert set(built) == {*objectives, *others}
    changed = compose(
        [
            "objectives.seq2item.pooling=encoder",
            "objectives.id2item.form=relational",
            "objectives.id2item.hidden=8",
        ]
    )
    assert len(list(build_objectives(changed.objectives, 16, {})["seq2item"].parameters())) > 10


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    options = {"_target_": "sailplan.objective.late_fusion.LateFusion"}
    weights = []
    for outer, seed in ((1, 0), (2, 0), (2, 7)):
        torch.manual_seed(outer)
        weights.append(build(options, seed=seed).gate.weight)
        torch.manual_seed(outer)
        expected = torch.rand(1)
        torch.manual_seed(outer)
        build(options)
        assert torch.rand(1) == expected  # the outer generator is left alone
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_users_own_loss_needs_its_module_allowed() -> None:
    target = {"_target_": f"{__name__}.Mine", "strength": 2.0}
    with pytest.raises(ConfigurationError, match="allowed_targets"):
        build(target)
    assert build(target, allowed_targets=("sailplan.", __name__)).strength == 2.0
    with pytest.raises(ConfigurationError, match=r"objectives\.mine\.strength: missing"):
        build({"_target_": f"{__name__}.Mine"}, allowed_targets=(__name__,))


INFONCE, COSENT = "sailplan.objective.infonce.InfoNCE", "sailplan.objective.cosent.CoSENT"
MICL, SEQ2ITEM, ID2ITEM = (
    "sailplan.objective.micl.MICL",
    "sailplan.objective.seq2item.Seq2Item",
    "sailplan.objective.id2item.ID2Item",
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "_target_: found None"),
        ({"_target_": "os.system"}, "expected a class below sailplan"),
        ({"_target_": "sailplan.objective.nothing.Nothing"}, "importable"),
        ({"_target_": "sailplan.objective.infonce.Nothing"}, "importable"),
        ({"_target_": "sailplan.errors.SailplanError"}, "subclass of"),
        ({"_target_": INFONCE, "margin_absolut": 0.1}, "did you mean 'margin_absolute'"),
        ({"_target_": INFONCE, "margin_absolute": -1.0}, "margin_absolute=-1.0"),
        ({"_target_": INFONCE, "margin_relative": 0.0}, "margin_relative=0.0"),
        ({"_target_": INFONCE, "matryoshka": False, "prefix_weights": {16: 1.0}}, "prefix_weights"),
        ({"_target_": INFONCE, "prefix_weights": {8: 0.0, 16: 0.0}}, "one above 0"),
        ({"_target_": COSENT, "temperature": 0.0}, "temperature=0.0"),
        ({"_target_": MICL, "text_weight": 0.0, "vision_weight": 0.0}, "not both 0"),
        ({"_target_": SEQ2ITEM, "pooling": "max"}, "expected one of mean, encoder"),
        ({"_target_": SEQ2ITEM, "positions": True}, "pooling=encoder"),
        ({"_target_": SEQ2ITEM, "pooling": "encoder", "heads": 5}, "heads=5"),
        ({"_target_": ID2ITEM}, "teachers"),
        ({"_target_": ID2ITEM, "teachers": {"svd": 4}, "form": "l1"}, "form=l1"),
        ({"_target_": ID2ITEM, "teachers": {"svd": 4}, "sets": ["nope"]}, "found nope"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as failure:
        build(options)
    assert "\n" not in str(failure.value) and str(failure.value).startswith("objectives.")


def test_temperatures_refuse_what_cannot_work() -> None:
    shown = {"views": {"": ViewConfig(fields=["title"])}}
    with pytest.raises(ConfigurationError, match=r"data\.sets\.items\.temperature=3\.0"):
        validate(
            DataConfig(
                sets={
                    "items": DatasetConfig(
                        temperature=3.0, patterns={"a": PatternConfig()}, **shown
                    )
                }
            ),
            "data",
        )
    for name, wrong in (("v1.0", "a dot"), ("a/b", "a slash")):
        for sets in (
            {name: DatasetConfig()},
            {"items": DatasetConfig(patterns={name: PatternConfig()}, **shown)},
        ):
            with pytest.raises(ConfigurationError, match=wrong):
                validate(DataConfig(sets=sets), "data")
    with pytest.raises(ConfigurationError, match="expected one of items/a"):
        Temperatures({"items": DatasetConfig(patterns={"a": PatternConfig()})}).get(
            PatternKey("items", "b")
        )


def test_a_stage_without_a_loss_for_one_of_its_data_sets_is_told_before_it_runs() -> None:
    config = compose(["experiment=quickstart"])
    objectives = build_objectives(config.objectives, config.model.embedding, config.data.sets)
    check_objectives(objectives, config.stages, config.data.sets)
    config.stages["id2item"].artifacts = ["interests", "co_occurrence"]
    with pytest.raises(
        ConfigurationError,
        match=r"stages\.id2item\.objectives: ID2Item learns from the artifact teachers",
    ):
        check_objectives(objectives, {"id2item": config.stages["id2item"]}, config.data.sets)
    config.stages["seq2item"].objectives["infonce"] = 0.0
    with pytest.raises(
        ConfigurationError, match=r"stages\.seq2item\.objectives: none of .* applies to 'emoji'"
    ):
        check_objectives(objectives, config.stages, config.data.sets)
