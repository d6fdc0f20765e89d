"""The multi-positive loss against its formula: whose rows are positives, and who takes no part."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sailplan.config.schema import PatternConfig, StageConfig
from sailplan.errors import ConfigurationError
from sailplan.objective.multi_positive import MultiPositive
from sailplan.objective.protocol import ObjectiveContext

sys.path.insert(0, str(Path(__file__).parent))
from loss_inputs import DATASETS, ITEMS, PAIRS, ROWS, D, context, step, view

LABELLED = {**DATASETS, "items": replace(ITEMS, label="class")}


def naive(
    queries: Tensor, keys: Tensor, labels: Tensor, query_valid: Tensor, key_valid: Tensor
) -> Tensor:
    """Equation 2 of Khosla et al. with denominators of one positive and all other classes."""
    scores = cosine_similarity(queries[:, None], keys[None], dim=2) / 0.1
    rows = []
    for i in range(ROWS):
        positives = [j for j in range(ROWS) if labels[j] == labels[i] and key_valid[j]]
        others = [
            j for j in range(ROWS) if labels[j] != labels[i] and labels[j] >= 0 and key_valid[j]
        ]
        if labels[i] >= 0 and query_valid[i] and positives:
            rows.append(
                torch.stack([-scores[i, [p, *others]].log_softmax(0)[0] for p in positives]).mean()
            )
    return torch.stack(rows).mean()


def labelled(**changes: object) -> ObjectiveContext:
    return replace(context(), datasets=LABELLED, **changes)


def test_rows_of_one_label_are_each_others_positives_and_rows_without_one_take_no_part() -> None:
    views = {"image": view(1), "name": view(2), "item": view(3)}
    views["image"].valid[0] = False
    views["name"].valid[4] = False
    labels = torch.tensor([7, 7, 3, 7, 3, -1])
    objective = MultiPositive(embedding=D, datasets=LABELLED)
    found = objective(step("items", views, labels=labels), labelled())
    everyone = torch.ones(ROWS, dtype=torch.bool)
    names, items = views["name"].fused, views["item"].fused
    expected = 2.0 * naive(
        views["image"].fused, names, labels, views["image"].valid, views["name"].valid
    ) + 0.5 * naive(names, items, labels, views["name"].valid, everyone)
    torch.testing.assert_close(found.loss, expected)
    assert found.metrics["labelled_rows"] == 5
    cut = objective.pay_at(True, {4: 2.0, D: 0.0})(step("items", views, labels=labels), labelled())
    views = {name: replace(one, fused=one.fused[:, :4]) for name, one in views.items()}
    whole = objective.pay_at(False)(step("items", views, labels=labels), labelled())
    torch.testing.assert_close(cut.loss, 2.0 * whole.loss)


def test_where_every_label_is_alone_it_is_infonce() -> None:
    views = {"image": view(1), "name": view(2), "item": view(3)}
    encoded = replace(
        step("items", views, labels=torch.arange(ROWS)), patterns={"image_to_name": 1.0}
    )
    scores = cosine_similarity(views["image"].fused[:, None], views["name"].fused, dim=2) / 0.1
    found = MultiPositive(embedding=D, datasets=LABELLED)(encoded, labelled()).loss
    torch.testing.assert_close(found, -scores.log_softmax(1).diagonal().mean())


def test_a_step_without_any_label_costs_nothing() -> None:
    views = {"image": view(1), "name": view(2), "item": view(3)}
    views["image"].fused.requires_grad_()
    objective = MultiPositive(embedding=D, datasets=LABELLED)
    found = objective(step("items", views, labels=torch.full((ROWS,), -1)), labelled())
    assert found.loss == 0 and found.metrics["labelled_rows"] == 0
    found.loss.backward()
    assert (views["image"].fused.grad == 0).all()


def test_it_is_for_data_sets_that_name_a_label_and_patterns_of_two_views() -> None:
    objective = MultiPositive(embedding=D, datasets=LABELLED)
    assert objective.applies(LABELLED["items"]) and not objective.applies(PAIRS)
    stage = StageConfig(data={"items": 1.0}, objectives={"classes": 1.0})
    objective.check_use("objectives.classes", [stage], LABELLED)
    same = replace(LABELLED["items"], patterns={"again": PatternConfig("image", "image")})
    with pytest.raises(ConfigurationError, match=r"patterns\.again: found the view 'image' on"):
        objective.check_use("objectives.classes", [stage], {"items": same})
