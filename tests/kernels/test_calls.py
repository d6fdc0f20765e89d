"""A wrong call is refused in one line that names the argument."""

from __future__ import annotations

import re

import pytest
import torch

from sailplan_kernels import LossOptions, Masks, Negatives, infonce, rank_of, sigmoid, topk
from sailplan_kernels.arguments import grouped

Q, K = torch.randn(4, 8), torch.randn(5, 8)


@pytest.mark.parametrize(
    "argument, changes",
    [
        ("queries", {"queries": torch.randn(8)}),
        ("queries", {"queries": torch.zeros(4, 8, dtype=torch.int64)}),
        ("keys", {"keys": torch.randn(5, 7)}),
        ("keys", {"keys": torch.randn(5, 8).double()}),
        ("keys", {"keys": torch.randn(3, 8)}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": float("inf")}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": torch.ones(5)}),
        ("temperature", {"temperature": torch.ones(4, dtype=torch.int64)}),
        ("positives", {"positives": torch.tensor([0, 1, 2, 5])}),
        ("positives", {"positives": torch.tensor([0, 1, 2, -2])}),
        ("positives", {"positives": torch.tensor([0, 1, 2], dtype=torch.int64)}),
        ("masks.query_ids", {"query_ids": torch.zeros(4)}),
        ("masks.key_ids", {"key_ids": torch.zeros(4, dtype=torch.int64)}),
        ("masks.key_query_ids", {"key_query_ids": torch.zeros(5, dtype=torch.int64)}),
        ("masks.query_valid", {"query_valid": torch.ones(4)}),
        ("masks.key_valid", {"key_valid": torch.ones(4, dtype=torch.bool)}),
        ("negatives.hard", {"hard_negatives": torch.randn(3, 2, 8)}),
        ("negatives.hard", {"hard_negatives": torch.randn(4, 8)}),
        ("negatives.hard_valid", {"hard_negative_valid": torch.ones(4, 2, dtype=torch.bool)}),
        ("negatives.shared", {"shared_hard_negatives": True}),
        ("prefixes", {"prefixes": (4, 9)}),
        ("prefixes", {"prefixes": (4, 4)}),
        ("prefixes", {"prefixes": ()}),
        ("prefixes", {"prefixes": (4, 8), "prefix_weights": (1.0, -1.0)}),
        ("options.memory_budget", {"memory_budget": 0}),
        ("positives.ids", {"positive_ids": torch.zeros(4, dtype=torch.int64)}),
        (
            "positives.ids",
            {"positive_ids": torch.zeros(4), "key_ids": torch.zeros(5, dtype=torch.int64)},
        ),
        ("negatives.max_cosine", {"max_cosine": torch.ones(5)}),
        ("negatives.max_cosine", {"max_cosine": torch.ones(4, dtype=torch.int64)}),
        ("negatives.max_cosine", {"max_cosine": {4: 0.3}, "prefixes": (4, 8)}),
        ("negatives.max_cosine", {"max_cosine": {4: 0.3, 8: 0.2}}),
        ("options.score_dtype", {"score_dtype": torch.bfloat16}),
        ("options.backend", {"backend": "triton", "score_dtype": torch.float64}),
        ("options.backend", {"backend": "triton"}),
        ("options.backend", {"backend": "cuda"}),
    ],
)
def test_wrong_call(argument, changes):
    case = {"queries": Q, "keys": K, "temperature": 0.1, **changes}
    with pytest.raises(
        ValueError,
        match=rf"^{re.escape(argument)}: found .*, expected [^\n]*$|^{re.escape(argument)}: found .* expected [^\n]*$",
    ):
        infonce(**grouped(case))


def test_auto_is_chunked():
    assert infonce(Q, K, 0.1).backend == "chunked"


@pytest.mark.parametrize(
    "argument, call",
    [
        ("k", lambda: topk(Q, K, 0)),
        ("keys", lambda: topk(Q, K[:, :3], 1)),
        ("queries", lambda: topk(Q[0], K, 1)),
        ("tile", lambda: topk(Q, K, 1, tile=0)),
        ("exclude_ids", lambda: topk(Q, K, 1, exclude_ids=torch.zeros(4, dtype=torch.int64))),
        ("key_ids", lambda: topk(Q, K, 1, key_ids=torch.zeros(4, dtype=torch.int64))),
        ("positive_index", lambda: rank_of(Q, K, torch.tensor([0, 1, 2, 5]))),
        ("positive_offsets", lambda: rank_of(Q, K, torch.tensor([0, 1, 2]))),
    ],
)
def test_wrong_search(argument, call):
    with pytest.raises(ValueError, match=rf"^{argument}:"):
        call()


@pytest.mark.parametrize(
    "former, call",
    [
        ({"query_valid": torch.arange(4) != 1}, {"masks": Masks(query_valid=torch.arange(4) != 1)}),
        ({"max_negative_score": 0.1}, {"negatives": Negatives(max_cosine=0.1)}),
        ({"backend": "reference"}, {"options": LossOptions(backend="reference")}),
        ({"prefixes": (4, 8), "prefix_weights": (0.5, 2.0)}, {"prefixes": {4: 0.5, 8: 2.0}}),
    ],
)
def test_names_of_the_former_version_are_the_fields_of_the_groups(former, call):
    assert infonce(Q, K, 0.1, **former).loss == infonce(Q, K, 0.1, **call).loss
    assert infonce(Q, K, 0.1, **former).backend == infonce(Q, K, 0.1, **call).backend


def test_a_name_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"^query_valids: found as an argument, expected one of"):
        infonce(Q, K, 0.1, query_valids=None)
    with pytest.raises(TypeError, match=r"^positive_ids: found as an argument"):
        sigmoid(Q, K, 0.1, -1.0, positive_ids=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(
        TypeError, match=r"^masks: found beside query_valid, expected one of the two"
    ):
        infonce(Q, K, 0.1, masks=Masks(), query_valid=torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_row_of_nan_makes_the_loss_nan_unless_it_is_padding(backend):
    bad = Q.clone()
    bad[2] = torch.nan
    options = LossOptions(backend=backend)
    assert infonce(bad, K, 0.1, options=options).loss.isnan()
    masks = Masks(query_valid=torch.arange(4) != 2)
    assert infonce(bad, K, 0.1, masks=masks, options=options).loss.isfinite()
