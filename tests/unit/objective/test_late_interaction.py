"""MaxSim against its formula: which tokens and which rows count, and that scores made block by block
are the same.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sailplan.data.record import HardNegatives
from sailplan.errors import ConfigurationError
from sailplan.objective import late_interaction
from sailplan.objective.late_interaction import LateInteraction
from sailplan.objective.protocol import EncodedView
from sailplan.objective.registry import build_objectives, check_objectives

sys.path.insert(0, str(Path(__file__).parent))
from loss_inputs import DATASETS, ROWS, D, context, step, view

from sailplan.config.schema import StageConfig


def with_tokens(one: EncodedView, seed: int, length: int) -> EncodedView:
    generator = torch.Generator().manual_seed(seed)
    rows = len(one.ids)
    one.tokens = torch.randn(rows, length, D, generator=generator, dtype=torch.float64)
    one.token_mask = torch.rand(rows, length, generator=generator) < 0.7
    one.token_mask[:, 1] = True
    one.tokens.requires_grad_()
    return one


def inputs() -> dict[Any, EncodedView]:
    views = {
        "image": with_tokens(view(1), 11, 4),
        "name": with_tokens(view(2), 12, 3),
        "item": with_tokens(view(3), 13, 5),
        HardNegatives("image_to_name"): with_tokens(view(4, 2), 14, 6),
    }
    views["image"].valid[2] = False
    views["name"].valid[3] = False
    views["name"].ids[5] = views["name"].ids[0]
    views["name"].token_mask[4] = False  # no token: neither a positive nor a negative
    views[HardNegatives("image_to_name")].valid[1] = False
    views[HardNegatives("image_to_name")].ids[2] = views["name"].ids[1]
    return views


def score(query: EncodedView, i: int, key: EncodedView, j: int, weight: Tensor) -> Tensor:
    found = []
    for a in range(query.tokens.shape[1]):
        if query.token_mask[i, a]:
            found.append(
                torch.stack(
                    [
                        cosine_similarity(
                            weight @ query.tokens[i, a], weight @ key.tokens[j, b], dim=0
                        )
                        for b in range(key.tokens.shape[1])
                        if key.token_mask[j, b]
                    ]
                ).max()
            )
    return torch.stack(found).mean()


def naive(query: EncodedView, key: EncodedView, hard: EncodedView | None, weight: Tensor) -> Tensor:
    losses = []
    usable = [bool(key.valid[j] and key.token_mask[j].any()) for j in range(ROWS)]
    for i in range(ROWS):
        if not (query.valid[i] and query.token_mask[i].any() and usable[i]):
            continue
        scores = [score(query, i, key, i, weight)]
        scores += [
            score(query, i, key, j, weight)
            for j in range(ROWS)
            if j != i and usable[j] and key.ids[j] != key.ids[i] and query.ids[j] != query.ids[i]
        ]
        for place in (2 * i, 2 * i + 1) if hard is not None else ():
            if hard.valid[place] and hard.ids[place] not in (key.ids[i], query.ids[i]):
                scores.append(score(query, i, hard, place, weight))
        losses.append(-(torch.stack(scores) / 0.1).log_softmax(0)[0])
    return torch.stack(losses).mean()


def test_each_query_token_goes_to_the_nearest_token_of_a_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective = LateInteraction(embedding=D, datasets=DATASETS, dimension=5).double()
    views = inputs()
    leaves = [one.tokens for one in views.values()] + [objective.projection.weight]
    found = objective(step("items", views), context())
    weight = objective.projection.weight
    expected = 2.0 * naive(
        views["image"], views["name"], views[HardNegatives("image_to_name")], weight
    ) + 0.5 * naive(views["name"], views["item"], None, weight)
    torch.testing.assert_close(found.loss, expected)
    true = torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(torch.autograd.grad(found.loss, leaves), true)
    assert 0 <= found.metrics["image_to_name/accuracy"] <= 1
    for scores in (1, 200):  # a target at a time, and some
        monkeypatch.setattr(late_interaction, "SCORES", scores)
        parts = objective(step("items", views), context())
        torch.testing.assert_close(parts.loss, expected)
        torch.testing.assert_close(torch.autograd.grad(parts.loss, leaves), true)


def test_a_step_without_any_valid_row_costs_nothing_and_gives_no_nan() -> None:
    objective = LateInteraction(embedding=D, datasets=DATASETS).double()
    views = inputs()
    for one in views.values():
        one.valid[:] = False
        one.token_mask[:] = False
    found = objective(step("items", views), context())
    assert found.loss == 0
    found.loss.backward()
    assert all((one.tokens.grad == 0).all() for one in views.values())


def test_it_is_refused_where_no_tokens_come() -> None:
    objective = LateInteraction(embedding=D, datasets=DATASETS).double()
    views = {"image": view(1), "name": view(2), "item": view(3)}
    with pytest.raises(ConfigurationError, match="found no vectors of tokens"):
        objective(step("items", views), context())
    target = {"_target_": "sailplan.objective.late_interaction.LateInteraction"}
    built = build_objectives({"tokens": target}, D, DATASETS)
    stages = {"one": StageConfig(data={"items": 1.0}, objectives={"tokens": 1.0})}
    datasets = {"items": DATASETS["items"]}
    check_objectives(built, stages, datasets)
    with pytest.raises(
        ConfigurationError, match=r"stages\.one\.objectives: LateInteraction scores"
    ):
        check_objectives(built, stages, datasets, gives_tokens=False)
    with pytest.raises(ConfigurationError, match=r"objectives\.tokens\.dimension=0"):
        build_objectives({"tokens": {**target, "dimension": 0}}, D, DATASETS)
    with pytest.raises(ConfigurationError, match="needs whole vectors"):
        build_objectives({"tokens": {**target, "matryoshka": True}}, D, DATASETS)
