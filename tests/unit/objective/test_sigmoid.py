"""The sigmoid loss against its formula: which pairs are asked, what is learned, and how it starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, logsigmoid

from sailplan.config.schema import PatternKey
from sailplan.errors import ConfigurationError
from sailplan.objective.sigmoid import Sigmoid

sys.path.insert(0, str(Path(__file__).parent))
from loss_inputs import DATASETS, ROWS, D, context, step, view


def naive(queries: Tensor, keys: Tensor, counts: Tensor, is_key: Tensor, same: Tensor) -> Tensor:
    """Mean over the rows that count of the losses of all their pairs, at t = 0.1, b = -10; same
    [N, N]: another row's key that is no negative.
    """
    losses = []
    for i in range(len(queries)):
        if counts[i]:
            for j in range(len(keys)):
                score = cosine_similarity(queries[i], keys[j], dim=0) / 0.1 - 10.0
                if i == j:
                    losses.append(-logsigmoid(score))
                elif is_key[j] and not same[i, j]:
                    losses.append(-logsigmoid(-score))
    return torch.stack(losses).sum() / counts.sum()


def objective(**options: Any) -> Sigmoid:
    return Sigmoid(embedding=D, datasets=DATASETS, **options).double()


def test_every_pair_of_the_batch_is_asked_but_those_of_the_same_document() -> None:
    views = {"image": view(1), "name": view(2), "item": view(3)}
    views["image"].valid[2] = False  # no query, its name is still everybody's negative
    views["name"].ids[5] = views["name"].ids[0]
    same = torch.zeros(ROWS, ROWS, dtype=torch.bool)
    same[0, 5] = same[5, 0] = True
    everyone = torch.ones(ROWS, dtype=torch.bool)
    found = objective()(step("items", views), context())
    names, items = views["name"].fused, views["item"].fused
    expected = 2.0 * naive(views["image"].fused, names, views["image"].valid, everyone, same)
    expected += 0.5 * naive(names, items, everyone, everyone, same)
    torch.testing.assert_close(found.loss, expected)
    unmasked = objective(mask_same_ids=False)(step("items", views), context()).loss
    assert unmasked > found.loss
    assert found.metrics["image_to_name/bias"] == -10.0
    torch.testing.assert_close(
        found.metrics["name_to_item/temperature"].item(), 0.1, rtol=1e-6, atol=0
    )
    cosines = cosine_similarity(views["image"].fused, names)[views["image"].valid]
    torch.testing.assert_close(found.metrics["image_to_name/positive_score"], cosines.mean())


def test_pairs_graded_as_unrelated_are_no_positives() -> None:
    views = {"query": view(1), "item": view(2)}
    scores = torch.tensor([0.5, 0.0, 0.2, 0.0, float("nan"), 0.1])
    found = objective()(step("pairs", views, scores=scores), context()).loss
    counts, everyone = torch.tensor([1, 0, 1, 0, 1, 1]).bool(), torch.ones(ROWS).bool()
    none = torch.zeros(ROWS, ROWS, dtype=torch.bool)
    expected = naive(views["query"].fused, views["item"].fused, counts, everyone, none)
    torch.testing.assert_close(found, expected)


def test_scale_and_bias_are_learned_for_each_pattern_or_each_pair_of_modalities() -> None:
    views = {"image": view(1), "name": view(2), "item": view(3)}
    by_pattern, by_modality = objective(), objective(by="modality")
    assert {name for name, _ in by_pattern.named_parameters()} == {
        f"{kind}.{dataset}/{pattern}"
        for kind in ("temperatures.logarithms", "biases.biases")
        for dataset, declared in DATASETS.items()
        for pattern in declared.patterns
    }
    assert set(by_modality.biases.biases) == {
        "vision_to_text",
        "text_to_text+vision",
        "text+vision_to_text+vision",  # of pairs, and of histories
    }
    for module in (by_pattern, by_modality):
        module(step("items", views), context()).loss.backward()
        used = [PatternKey("items", name) for name in DATASETS["items"].patterns]
        assert all(module.biases.get(key).grad != 0 for key in used)
        assert module.biases.get(PatternKey("pairs", "item_to_item")).grad is None
    shared, apart = by_modality.biases.biases, by_pattern.biases.biases
    torch.testing.assert_close(
        shared["vision_to_text"].grad, apart["items/image_to_name"].grad, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"by": "step"}, "by=step"),
        ({"temperature": 2.0}, "temperature=2.0"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        objective(**options)
