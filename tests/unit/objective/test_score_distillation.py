"""Score distillation against its formulas: candidates without a score are left out, the number of
negatives varies, mined ones take no part.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

from sailplan.data.record import HardNegatives
from sailplan.errors import ConfigurationError
from sailplan.objective.score_distillation import ScoreDistillation

sys.path.insert(0, str(Path(__file__).parent))
from loss_inputs import DATASETS, PAIRS, D, context, step, view

NAN = float("nan")
SCORED = {**DATASETS, "pairs": replace(PAIRS, negatives=2, teacher_scores="scores")}
SCORES = torch.tensor(
    [
        [5.0, 1.0, -2.0],
        [4.0, NAN, 3.0],  # one negative was not scored
        [NAN, 1.0, 2.0],  # the target was not: the row does not count
        [2.0, NAN, NAN],  # nothing to compare with
        [1.0, 3.0, 0.5],  # the teacher prefers a negative; the record has one only
        [0.0, 0.0, 0.0],
    ]
)
CANDIDATES = {0: [0, 1, 2], 1: [0, 2], 4: [0, 1], 5: [0, 1, 2]}


def inputs(mined: int = 0) -> tuple[dict[Any, Any], Tensor]:
    """Views of pairs with `mined` negatives before each row's own two, and all candidates' cosines
    [rows, 3].
    """
    views = {"query": view(1), "item": view(2), HardNegatives("item_to_item"): view(3, 2 + mined)}
    negatives = views[HardNegatives("item_to_item")]
    negatives.valid[4 * (2 + mined) + mined + 1] = False
    own = negatives.fused.view(-1, 2 + mined, D)[:, mined:]
    keys = torch.cat([views["item"].fused[:, None], own], 1)
    return views, cosine_similarity(views["query"].fused[:, None], keys, dim=2)


def distil(views: dict[Any, Any], **options: Any) -> Any:
    return ScoreDistillation(embedding=D, datasets=SCORED, **options)(
        step("pairs", views, teacher_scores=SCORES), replace(context(), datasets=SCORED)
    )


@pytest.mark.parametrize("mined", [0, 3])
def test_kl_from_the_teachers_softmax_to_the_students(mined: int) -> None:
    views, cosines = inputs(mined)
    found = distil(views, temperature=0.1, teacher_temperature=2.0)
    expected = [
        kl_div(
            (cosines[row, kept] / 0.1).log_softmax(0),
            (SCORES[row, kept].double() / 2.0).softmax(0),
            reduction="sum",
        )
        for row, kept in CANDIDATES.items()
    ]
    torch.testing.assert_close(found.loss, torch.stack(expected).mean())
    assert found.metrics["item_to_item/scored_rows"] == 4
    agree = [
        cosines[row, kept].argmax() == SCORES[row, kept].argmax()
        for row, kept in CANDIDATES.items()
    ]
    assert found.metrics["item_to_item/teacher_agreement"] == sum(agree) / 4


def test_margin_mse() -> None:
    views, cosines = inputs()
    expected = []
    for row, (_, *kept) in CANDIDATES.items():
        student = (cosines[row, 0] - cosines[row, kept]) / 0.5
        teacher = SCORES[row, 0] - SCORES[row, kept]
        expected.append((student - teacher).square().mean())
    found = distil(views, form="margin_mse", temperature=0.5).loss
    torch.testing.assert_close(found, torch.stack(expected).mean())


@pytest.mark.parametrize("form", ["kl", "margin_mse"])
def test_rows_that_do_not_count_get_no_gradient_and_no_nan(form: Any) -> None:
    views, _ = inputs()
    views["query"].fused.requires_grad_()
    views[HardNegatives("item_to_item")].fused.requires_grad_()
    distil(views, form=form).loss.backward()
    gradient = views["query"].fused.grad
    assert gradient.isfinite().all()
    assert gradient.any(1).tolist() == [True, True, False, False, True, True]
    of_negatives = views[HardNegatives("item_to_item")].fused.grad.view(-1, 2, D).any(2)
    assert of_negatives.tolist() == [
        [True, True],
        [False, True],
        [False, False],
        [False, False],
        [True, False],
        [True, True],
    ]


def test_without_scores_or_with_senseless_options_it_is_refused() -> None:
    objective = ScoreDistillation(embedding=D, datasets=SCORED)
    assert objective.applies(SCORED["pairs"]) and not objective.applies(PAIRS)
    with pytest.raises(ConfigurationError, match=r"data\.sets\.pairs\.teacher_scores"):
        objective(step("pairs", inputs()[0]), context())
    for options in ({"form": "l1"}, {"temperature": 0.0}, {"teacher_temperature": -1.0}):
        with pytest.raises(ConfigurationError, match=f"{next(iter(options))}="):
            ScoreDistillation(embedding=D, datasets=SCORED, **options)  # type: ignore[arg-type]
