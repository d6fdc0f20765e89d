"""Matryoshka is an option of every loss: the weighted sum of the losses of cut vectors, whether
kernels do it in one pass or the loss is called for each size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sailplan.config.schema import StageConfig
from sailplan.errors import ConfigurationError
from sailplan.objective.protocol import (
    EncodedStep,
    EncodedView,
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
)
from sailplan.objective.registry import build_objectives, check_objectives
from sailplan.objective.temperature import Temperatures
from sailplan.parity.testing import WEIGHTS, global_batches, step_config
from sailplan_kernels.exchange import Local

# id2item projects whole vectors; the other two make vectors of whole ones, which are cut after that
OF_VECTORS = sorted(set(WEIGHTS) - {"id2item", "late_fusion", "seq2item"})


def encoded_steps() -> list[EncodedStep]:
    config, generator = step_config(), torch.Generator().manual_seed(2)
    steps = []
    for batch in global_batches(config, 1):
        views = {}
        for name, view in batch.views.items():
            fused, vision, text = (
                torch.randn(
                    len(view.ids), config.model.embedding, generator=generator, dtype=torch.float64
                )
                for _ in range(3)
            )
            views[name] = EncodedView(
                fused, view.valid, view.ids, view.group, {"vision": vision, "text": text}
            )
        step = EncodedStep(batch.dataset, views, batch.patterns, batch.scores)
        step.teacher_scores, step.labels = batch.teacher_scores, batch.labels
        steps.append(step)
    return steps


def objective(name: str, **options: Any) -> Objective:
    config = step_config()
    given = {**config.objectives[name], "matryoshka": False, **options}
    built = build_objectives({name: given}, config.model.embedding, config.data.sets)[name]
    assert isinstance(built, Objective)
    return built.double()


def place() -> ObjectiveContext:
    config = step_config()
    return ObjectiveContext(
        config.data.sets,
        Local(),
        Temperatures(config.data.sets).double(),
        tuple(config.model.prefixes),
        "chunked",
    )


@pytest.mark.parametrize("name", OF_VECTORS)
def test_of_several_sizes_a_loss_is_the_weighted_sum(name: str) -> None:
    context = place()
    sizes = context.prefixes
    assert len(sizes) > 1
    weights = {size: 0.5 + number for number, size in enumerate(sizes)}
    several, whole = objective(name, matryoshka=True, prefix_weights=weights), objective(name)
    applied = 0
    for step in encoded_steps():
        if not several.applies(context.datasets[step.dataset]):
            continue
        parts = {size: whole(step.cut(size), context).loss for size in sizes}
        if not any(parts.values()):  # pairs without a grade, which CoSENT has nothing to say about
            continue
        applied += 1
        expected = sum(weights[size] * part for size, part in parts.items())
        output = several(step, context)
        torch.testing.assert_close(output.loss, expected)
        assert len({float(part) for part in parts.values()}) == len(sizes)
        paid = {name: value for name, value in output.metrics.items() if f"loss@{sizes[0]}" in name}
        assert paid
        if several.prefix_support == "cut":
            assert paid == {f"loss@{sizes[0]}": parts[sizes[0]]}
    assert applied


class Own(Objective):
    """Somebody's loss that knows nothing of sizes."""

    def __init__(self, *, embedding: int, datasets: Any) -> None:
        super().__init__()

    def forward(self, encoded: EncodedStep, context: ObjectiveContext) -> ObjectiveOutput:
        (view,) = encoded.views.values()
        return ObjectiveOutput(view.fused.square().sum(), {"width": view.fused.sum() * 0 + 1})


def test_a_loss_of_ones_own_needs_no_word_about_it() -> None:
    built = build_objectives(
        {
            "own": {
                "_target_": f"{__name__}.Own",
                "matryoshka": True,
                "prefix_weights": {1: 1.0, 2: 0.0, 3: 10.0},
            }
        },
        3,
        {},
        allowed_targets=(__name__,),
    )["own"]
    fused = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    view = EncodedView(fused, torch.ones(1).bool(), torch.zeros(1).long())
    output = built(EncodedStep("any", {"view": view}, {}), replace(place(), prefixes=(1, 2, 3)))
    assert output.loss == 1 + 10 * (1 + 4 + 9)
    output.loss.backward()
    assert fused.grad.tolist() == [[22.0, 40.0, 60.0]]
    assert output.metrics.keys() == {"width", "loss@1", "loss@3"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("id2item", {"matryoshka": True}, r"objectives\.any\.matryoshka=True: ID2Item needs whole"),
        ("cosent", {"matryoshka": {8: 1.0}}, "expected true or false"),
        ("cosent", {"prefix_weights": {8: 1.0}}, "beside matryoshka=false"),
        ("micl", {"matryoshka": True, "prefix_weights": {8: 0.0}}, "one above 0"),
        ("micl", {"matryoshka": True, "prefix_weights": {8: float("nan")}}, "at least 0"),
        ("cosent", {"matrioshka": True}, "did you mean 'matryoshka'"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    config = step_config()
    target = {
        key: config.objectives[name][key]
        for key in ("_target_", "teachers")
        if key in config.objectives[name]
    }
    with pytest.raises(ConfigurationError, match=message) as failure:
        build_objectives({"any": target | options}, 16, config.data.sets)
    assert str(failure.value).startswith("objectives.any.")


def test_weights_of_other_sizes_are_refused_before_the_run() -> None:
    config = step_config()
    target = {"_target_": "sailplan.objective.cosent.CoSENT", "matryoshka": True}
    built = build_objectives({"any": {**target, "prefix_weights": {7: 1.0}}}, 16, config.data.sets)
    with pytest.raises(ConfigurationError, match=r"found sizes \[7\], expected model\.prefixes"):
        stage = StageConfig(data={"pairs": 1.0}, objectives={"any": 1.0})
        sets = {"pairs": replace(config.data.sets["pairs"], teacher_scores=None)}
        check_objectives(built, {"one": stage}, sets, config.model.prefixes)
