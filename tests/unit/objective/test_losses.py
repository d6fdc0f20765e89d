"""Each loss against its formula written naively, on small float64 batches; masks, absent sides
and senseless options.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from sailplan.config.fields import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from sailplan.config.schema import PatternKey
from sailplan.data.negatives import MatchThreshold
from sailplan.data.record import HardNegatives, TeacherKey
from sailplan.errors import ConfigurationError
from sailplan.objective.cosent import CoSENT, cosent
from sailplan.objective.id2item import ID2Item
from sailplan.objective.infonce import InfoNCE
from sailplan.objective.late_fusion import LateFusion
from sailplan.objective.micl import MICL
from sailplan.objective.protocol import Objective
from sailplan.objective.seq2item import Seq2Item
from sailplan.objective.temperature import Temperatures

sys.path.insert(0, str(Path(__file__).parent))
from loss_inputs import DATASETS, ITEMS, PAIRS, ROWS, SEQUENCES, D, context, step, view


def naive_infonce(
    queries: Tensor,
    keys: Tensor,
    valid: Tensor,
    allowed: Tensor | None = None,
    hard: Tensor | None = None,
) -> Tensor:
    """Mean over valid rows of -log softmax at temperature 0.1; allowed [N, N]: which keys may be
    negatives.
    """
    losses = []
    for i in range(len(queries)):
        if not valid[i]:
            continue
        logits = [cosine_similarity(queries[i], keys[i], dim=0)]
        others = [
            j
            for j in range(len(keys))
            if j != i and valid[j] and (allowed is None or allowed[i, j])
        ]
        logits += [cosine_similarity(queries[i], keys[j], dim=0) for j in others]
        logits += (
            [] if hard is None else [cosine_similarity(queries[i], key, dim=0) for key in hard[i]]
        )
        losses.append(-(torch.stack(logits) / 0.1).log_softmax(0)[0])
    return torch.stack(losses).mean()


def test_infonce_sums_patterns_prefixes_and_hard_negatives() -> None:
    views = {
        "image": view(1),
        "name": view(2),
        "item": view(3),
        HardNegatives("image_to_name"): view(4, 2),
    }
    views["image"].valid[2] = False
    views["name"].ids[5] = views["name"].ids[0]  # rows 0 and 5 have the same target
    views[HardNegatives("image_to_name")].ids[2] = views["name"].ids[
        1
    ]  # row 1's first hard negative is its own target
    hard = [
        list(views[HardNegatives("image_to_name")].fused[2 * i : 2 * i + 2]) for i in range(ROWS)
    ]
    hard[1] = hard[1][1:]
    allowed = torch.ones(ROWS, ROWS, dtype=torch.bool)
    allowed[0, 5] = allowed[5, 0] = False
    expected = torch.zeros((), dtype=torch.float64)
    for prefix in (4, D):
        cut = [[key[:prefix] for key in row] for row in hard]
        both = views["image"].valid & views["name"].valid
        # An item whose picture is missing is no query, but its name is still everybody's negative.
        losses = []
        for i in range(ROWS):
            if both[i]:
                keys = [views["name"].fused[i, :prefix]]
                keys += [
                    views["name"].fused[j, :prefix] for j in range(ROWS) if j != i and allowed[i, j]
                ] + cut[i]
                scores = torch.stack(
                    [
                        cosine_similarity(views["image"].fused[i, :prefix], key, dim=0)
                        for key in keys
                    ]
                )
                losses.append(-(scores / 0.1).log_softmax(0)[0])
        expected += 2.0 * torch.stack(losses).mean()
        # Rows 0 and 5 are the same query here.
        expected += 0.5 * naive_infonce(
            views["name"].fused[:, :prefix],
            views["item"].fused[:, :prefix],
            torch.ones(ROWS).bool(),
            allowed,
        )
    output = InfoNCE(embedding=D, datasets=DATASETS)(step("items", views), context())
    torch.testing.assert_close(output.loss, expected)
    assert set(output.metrics) >= {
        "image_to_name/accuracy",
        "image_to_name/loss@4",
        "name_to_item/positive_score",
    }


def test_infonce_masks_by_threshold_and_weights_prefixes() -> None:
    views = {"image": view(1), "name": view(2), "item": view(3)}
    scores = normalize(views["image"].fused, dim=1) @ normalize(views["name"].fused, dim=1).T
    encoded = replace(step("items", views), patterns={"image_to_name": 1.0})
    objective = InfoNCE(embedding=D, datasets=DATASETS).pay_at(True, {4: 0.0, D: 1.0})
    output = objective(
        encoded,
        context(
            thresholds={
                PatternKey("items", "image_to_name"): MatchThreshold(0.2, {4: -1.0}),
                PatternKey("items", "name_to_item"): MatchThreshold(-1.0, {4: -1.0}),
            }
        ),
    )
    expected = naive_infonce(
        views["image"].fused, views["name"].fused, torch.ones(ROWS).bool(), scores < 0.2
    )
    torch.testing.assert_close(output.loss, expected)


def test_each_prefix_masks_by_its_own_threshold() -> None:
    views = {"image": view(1), "name": view(2), "item": view(3)}
    encoded = replace(step("items", views), patterns={"image_to_name": 1.0})
    thresholds = {PatternKey("items", "image_to_name"): MatchThreshold(0.2, {4: 0.5})}
    output = InfoNCE(embedding=D, datasets=DATASETS)(encoded, context(thresholds=thresholds))
    expected = torch.zeros((), dtype=torch.float64)
    for prefix, highest in ((4, 0.5), (D, 0.2)):
        left, right = (normalize(views[one].fused[:, :prefix], dim=1) for one in ("image", "name"))
        allowed = left @ right.T < highest
        expected += naive_infonce(left, right, torch.ones(ROWS).bool(), allowed)
    torch.testing.assert_close(output.loss, expected)


def test_symmetric_is_the_data_sets_choice_unless_the_objective_says() -> None:
    views = {"image": view(1), "name": view(2), "item": view(3)}
    encoded = replace(step("items", views), patterns={"image_to_name": 1.0})
    one_way = naive_infonce(views["image"].fused, views["name"].fused, torch.ones(ROWS).bool())
    other_way = naive_infonce(views["name"].fused, views["image"].fused, torch.ones(ROWS).bool())
    options: dict[str, Any] = {"embedding": D, "datasets": DATASETS}
    torch.testing.assert_close(InfoNCE(**options).pay_at(False)(encoded, context()).loss, one_way)
    torch.testing.assert_close(
        InfoNCE(**options, symmetric=True).pay_at(False)(encoded, context()).loss,
        (one_way + other_way) / 2,
    )


def test_pairs_graded_as_unrelated_are_no_positives() -> None:
    views = {"query": view(1), "item": view(2)}
    scores = torch.tensor([0.5, 0.0, 0.2, 0.0, float("nan"), 0.1])  # nan: not graded
    objective = InfoNCE(embedding=D, datasets=DATASETS).pay_at(False)
    output = objective(step("pairs", views, scores=scores), context())
    similarities = normalize(views["query"].fused, dim=1) @ normalize(views["item"].fused, dim=1).T
    expected = -(similarities / 0.1).log_softmax(1).diagonal()[[0, 2, 4, 5]].mean()
    torch.testing.assert_close(output.loss, expected)


def test_cosent_is_the_sum_over_all_ordered_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    cosines = (2 * torch.rand(40, generator=generator, dtype=torch.float64) - 1).requires_grad_()
    scores = torch.randint(0, 5, (40,), generator=generator) / 4  # with ties
    terms = [
        (cosines[k] - cosines[i]) / 0.05
        for i in range(40)
        for k in range(40)
        if scores[i] > scores[k]
    ]
    naive = torch.stack([torch.zeros((), dtype=torch.float64), *terms]).logsumexp(0)
    fast = cosent(cosines, scores, 0.05)
    torch.testing.assert_close(fast, naive)
    torch.testing.assert_close(
        torch.autograd.grad(fast, cosines), torch.autograd.grad(naive, cosines)
    )
    assert cosent(cosines, torch.ones(40), 0.05) == 0
    assert cosent(cosines[:0], scores[:0], 0.05) == 0


def test_cosent_leaves_out_rows_without_a_score_or_a_side() -> None:
    views = {"query": view(1), "item": view(2)}
    views["item"].valid[0] = False
    scores = torch.tensor([0.1, 0.9, 0.2, float("nan"), 0.7, 0.4])
    output = CoSENT(embedding=D, datasets=DATASETS)(step("pairs", views, scores=scores), context())
    kept = [1, 2, 4, 5]
    expected = cosent(
        cosine_similarity(views["query"].fused, views["item"].fused)[kept], scores[kept], 0.05
    )
    torch.testing.assert_close(output.loss, expected)
    assert output.metrics["item_to_item/graded_pairs"] == 4
    assert CoSENT(embedding=D, datasets=DATASETS)(step("pairs", views), context()).loss == 0


def test_micl_weighs_the_modalities_that_both_sides_have() -> None:
    views = {"image": view(1), "name": view(2), "item": view(3), "query": view(4)}
    views["query"].by_modality["vision"][1] = 0.0  # the encoder's answer where there is no picture
    objective = MICL(embedding=D, datasets=DATASETS)
    everyone = torch.ones(ROWS).bool()
    names = step("items", views)
    expected = (
        0.5
        * 0.9
        * naive_infonce(
            views["name"].by_modality["text"], views["item"].by_modality["text"], everyone
        )
    )
    torch.testing.assert_close(objective(names, context()).loss, expected)
    seen = torch.tensor([True, False, True, True, True, True])
    losses = []
    for i in range(ROWS):
        if seen[i]:
            query, item = (views[side].by_modality["vision"] for side in ("query", "item"))
            scores = torch.stack([cosine_similarity(query[i], item[j], dim=0) for j in range(ROWS)])
            losses.append(-(scores / 0.1).log_softmax(0)[i])
    expected = 0.1 * torch.stack(losses).mean() + 0.9 * naive_infonce(
        views["query"].by_modality["text"], views["item"].by_modality["text"], everyone
    )
    torch.testing.assert_close(objective(step("pairs", views), context()).loss, expected)
    assert (
        objective.applies(ITEMS) and objective.applies(PAIRS) and not objective.applies(SEQUENCES)
    )


def test_late_fusion_gates_the_picture_into_the_fused_vector() -> None:
    views = {"image": view(1), "name": view(2), "item": view(3)}
    views["item"].by_modality["vision"][2] = 0.0
    objective = LateFusion(embedding=D, datasets=DATASETS).double()
    item = views["item"]
    gate = torch.sigmoid(
        torch.cat([item.by_modality["vision"], item.fused], 1) @ objective.gate.weight.T
        + objective.gate.bias
    )
    mixed = gate * item.by_modality["vision"] + (1 - gate) * item.fused
    mixed = torch.stack([item.fused[i] if i == 2 else mixed[i] for i in range(ROWS)])
    expected = 0.5 * naive_infonce(views["name"].fused, mixed, torch.ones(ROWS).bool())
    torch.testing.assert_close(objective(step("items", views), context()).loss, expected)


@pytest.mark.parametrize("options", [{}, {"pooling": "encoder", "layers": 2, "heads": 2}])
def test_seq2item_does_not_see_absent_items_and_starts_from_the_mean(
    options: dict[str, Any],
) -> None:
    objective = Seq2Item(embedding=D, datasets=DATASETS, **options).double()
    history = view(1, 3)
    history.valid[[2, 3, 4, 5]] = False  # row 0 lacks one item, row 1 all
    found = objective.represent(history.fused, history.valid, 3)
    torch.testing.assert_close(found[0], normalize(history.fused[:2], dim=1).mean(0))
    assert found.isfinite().all() and (found[1] == 0).all()
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    before = objective.represent(history.fused, history.valid, 3)
    history.fused[[2, 3, 4, 5]] = torch.nan
    torch.testing.assert_close(objective.represent(history.fused, history.valid, 3), before)
    if not options:  # a set: order does not matter
        swapped = history.fused.view(ROWS, 3, D)[:, [1, 0, 2]].reshape(-1, D)
        valid = history.valid.view(ROWS, 3)[:, [1, 0, 2]].reshape(-1)
        torch.testing.assert_close(objective.represent(swapped, valid, 3), before)


def test_seq2item_masks_rows_without_history() -> None:
    objective = Seq2Item(embedding=D, datasets=DATASETS).pay_at(False)
    views = {"history": view(1, 3), "item": view(2)}
    views["history"].valid[3:6] = False
    output = objective(step("sequences", views), context())
    represented = objective.represent(views["history"].fused, views["history"].valid, 3)
    losses = []
    for i in (0, 2, 3, 4, 5):
        scores = torch.stack(
            [cosine_similarity(represented[i], views["item"].fused[j], dim=0) for j in range(ROWS)]
        )
        losses.append(-(scores / 0.1).log_softmax(0)[i])
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_seq2item_sampling_correction(gamma: float) -> None:
    objective = Seq2Item(embedding=D, datasets=DATASETS, sampling_correction=gamma).pay_at(False)
    views = {"history": view(1, 3), "item": view(2)}
    probability = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    found = objective(
        step("sequences", views, target_log_probability=probability.log()), context()
    ).loss
    represented = objective.represent(views["history"].fused, views["history"].valid, 3)
    scores = (
        cosine_similarity(represented[:, None], views["item"].fused[None], dim=-1) / 0.1
        - gamma * probability.log()
    )
    torch.testing.assert_close(found, -scores.log_softmax(1).diagonal().mean())
    with pytest.raises(ConfigurationError, match="target_probability"):
        objective(step("sequences", views), context())
    with pytest.raises(ConfigurationError, match="sampling_correction"):
        Seq2Item(embedding=D, datasets=DATASETS, sampling_correction=1.5)


def test_seq2item_takes_the_records_negatives_of_all_rows() -> None:
    objective = Seq2Item(embedding=D, datasets=DATASETS, sampling_correction=1.0).pay_at(False)
    views = {"history": view(1, 3), "item": view(2), HardNegatives("history_to_item"): view(3, 2)}
    negatives = views[HardNegatives("history_to_item")]
    negatives.valid[3] = False
    probability = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    found = objective(
        step("sequences", views, target_log_probability=probability.log()), context()
    ).loss
    represented = objective.represent(views["history"].fused, views["history"].valid, 3)
    scores = (
        cosine_similarity(represented[:, None], views["item"].fused[None], dim=-1) / 0.1
        - probability.log()
    )
    against = (
        cosine_similarity(represented[:, None], negatives.fused[negatives.valid][None], dim=-1)
        / 0.1
    )
    torch.testing.assert_close(
        found, -torch.cat([scores, against], 1).log_softmax(1).diagonal().mean()
    )


@pytest.mark.parametrize("form", ["cosine", "mse", "relational"])
def test_id2item_forms(form: str) -> None:
    objective = ID2Item(
        embedding=D,
        datasets=DATASETS,
        teachers={"svd": 4},
        form=form,
        **({"similarity_temperature": 0.5} if form == "relational" else {}),
    ).double()
    views = {"image": view(1), "name": view(2), "item": view(3)}
    views["item"].valid[1] = False
    teacher = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    teacher[4] = 0.0  # unknown
    kept = [0, 2, 3, 5]
    projected = objective.projections["svd"](normalize(views["item"].fused, dim=1))
    if form == "cosine":
        expected = (1 - cosine_similarity(projected, teacher))[kept].mean()
    elif form == "mse":
        expected = (projected - teacher).square().mean(1)[kept].mean()
    else:
        rows = []
        for i in kept:
            others = [j for j in kept if j != i]
            mine = (
                torch.stack([cosine_similarity(projected[i], projected[j], dim=0) for j in others])
                / 0.5
            )
            theirs = (
                torch.stack([cosine_similarity(teacher[i], teacher[j], dim=0) for j in others])
                / 0.5
            )
            rows.append((theirs.softmax(0) * (theirs.log_softmax(0) - mine.log_softmax(0))).sum())
        expected = torch.stack(rows).mean()
    output = objective(
        step(
            "items",
            views,
            teachers={TeacherKey("item", "svd"): teacher, TeacherKey("item", "other"): teacher},
        ),
        context(),
    )
    torch.testing.assert_close(output.loss, expected)
    assert output.metrics["item/svd/rows"] == 4
    nobody = objective(
        step("items", views, teachers={TeacherKey("item", "svd"): torch.zeros(ROWS, 4)}), context()
    )
    assert nobody.loss == 0
    assert objective(step("items", views), context()).loss == 0


@pytest.mark.parametrize("objective", [InfoNCE, CoSENT, MICL, LateFusion])
def test_a_step_without_any_valid_row_costs_nothing_and_gives_no_nan(
    objective: type[Objective],
) -> None:
    name = "pairs"
    views = {"query": view(1, valid=torch.zeros(ROWS, dtype=torch.bool)), "item": view(2)}
    views["query"].fused.requires_grad_()
    output = objective(embedding=D, datasets=DATASETS).double()(
        step(name, views, scores=torch.rand(ROWS)), context()
    )
    assert output.loss == 0
    output.loss.backward()
    assert views["query"].fused.grad is None or (views["query"].fused.grad == 0).all()


def test_temperatures_start_as_configured_stay_in_bounds_and_can_come_back() -> None:
    temperatures = Temperatures(DATASETS)
    assert temperatures.values()["items/image_to_name"] == pytest.approx(0.1)
    parameter = temperatures.logarithms["items/image_to_name"]
    for value, bound in ((-20.0, LOWEST_TEMPERATURE), (5.0, HIGHEST_TEMPERATURE)):
        with torch.no_grad():
            parameter.fill_(value)
        assert temperatures.get(PatternKey("items", "image_to_name")).item() == pytest.approx(bound)
        temperatures.clamp_()
        parameter.grad = None
        temperatures.get(PatternKey("items", "image_to_name")).backward()
        assert parameter.grad is not None and parameter.grad != 0
        assert math.isclose(temperatures.values()["items/image_to_name"], bound, rel_tol=1e-4)


def test_temperatures_are_of_patterns_or_of_pairs_of_modalities() -> None:
    by_modality = Temperatures(DATASETS, "modality")
    assert by_modality.names == [
        "vision_to_text",
        "text_to_text+vision",
        "text+vision_to_text+vision",
    ]
    pairs, histories = (
        PatternKey("pairs", "item_to_item"),
        PatternKey("sequences", "history_to_item"),
    )
    assert by_modality.group(pairs) == by_modality.group(histories)
    assert Temperatures(DATASETS).group(pairs) != Temperatures(DATASETS).group(histories)
    (by_modality.get(pairs) + by_modality.get(histories)).backward()
    both = by_modality.logarithms["text+vision_to_text+vision"]
    assert both.grad is not None
    torch.testing.assert_close(both.grad.item(), 2 * 0.1, rtol=1e-5, atol=0)
    other = {**DATASETS, "pairs": replace(PAIRS, temperature=0.2)}
    with pytest.raises(ConfigurationError, match=r"data\.sets\.sequences\.temperature=0\.1.* 0\.2"):
        Temperatures(other, "modality")
    Temperatures(other, "pattern")


def test_an_objective_steps_with_one_temperature_for_patterns_of_the_same_modalities() -> None:
    views = {"query": view(1), "item": view(2), "image": view(3), "name": view(4)}
    temperatures = Temperatures(DATASETS, "modality").double()
    with torch.no_grad():
        temperatures.logarithms["text+vision_to_text+vision"].fill_(math.log(0.3))
    found = InfoNCE(embedding=D, datasets=DATASETS).pay_at(False)(
        step("pairs", views), replace(context(), temperatures=temperatures)
    )
    scores = normalize(views["query"].fused, dim=1) @ normalize(views["item"].fused, dim=1).T
    torch.testing.assert_close(found.loss, -(scores / 0.3).log_softmax(1).diagonal().mean())
