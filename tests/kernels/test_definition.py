"""The reference is right: against the definition in plain loops, and its gradient against
differences.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sailplan_kernels import infonce
from sailplan_kernels.arguments import grouped


def loops(case: dict) -> tuple[float, int, float]:
    """Loss, valid rows and accuracy, a pair at a time, from the words of the API."""
    n, m = len(case["queries"]), len(case["keys"])
    p = case["positives"].tolist()
    temperature = case["temperature"].expand(n).tolist()
    key_ids = case["key_ids"].tolist() if "key_ids" in case else [-1] * m
    query_ids = case["query_ids"].tolist() if "query_ids" in case else [-1] * n
    paired = [-1] * m
    for i in range(n):
        if p[i] >= 0:
            paired[p[i]] = max(paired[p[i]], query_ids[i])
    if "key_query_ids" in case:
        paired = case["key_query_ids"].tolist()
    query_ok = case["query_valid"].tolist() if "query_valid" in case else [True] * n
    key_ok = case["key_valid"].tolist() if "key_valid" in case else [True] * m
    counted = [i for i in range(n) if p[i] >= 0 and query_ok[i] and key_ok[p[i]]]
    hard = (
        case["hard_negatives"]
        if "hard_negatives" in case
        else torch.zeros(n, 0, case["queries"].shape[1])
    )
    hard_ok = (
        case["hard_negative_valid"]
        if "hard_negative_valid" in case
        else torch.ones(hard.shape[:2], dtype=torch.bool)
    )

    max_cosine = case.get("max_cosine")

    def kept(cosine: float, start: float, below: float) -> bool:
        return (
            cosine < below
            and not (
                case.get("margin_absolute") is not None and cosine > start + case["margin_absolute"]
            )
            and not (
                case.get("margin_relative") is not None and cosine > start * case["margin_relative"]
            )
        )

    log_probability = (
        case["key_log_probability"].tolist() if "key_log_probability" in case else [0.0] * m
    )

    def loss_of(positive: float, negatives: list[float]) -> float:
        if not negatives:
            return 0.0
        top = max(negatives)
        gap = top + math.log(sum(math.exp(x - top) for x in negatives)) - positive
        return max(gap, 0.0) + math.log1p(math.exp(-abs(gap)))

    def same(a: int, b: int) -> bool:
        return a >= 0 and a == b

    total, right = 0.0, 0
    dim = case["queries"].shape[1]
    prefixes = case.get("prefixes") or (dim,)
    for prefix, weight in zip(
        prefixes, case.get("prefix_weights") or [1.0] * len(prefixes), strict=True
    ):
        unit = torch.nn.functional.normalize
        q, k, h = (
            unit(x[..., :prefix], dim=-1)
            for x in (case["queries"], case["keys"], hard.to(case["queries"]))
        )
        highest = max_cosine[prefix] if isinstance(max_cosine, dict) else max_cosine
        highest = (
            highest.tolist()
            if isinstance(highest, torch.Tensor)
            else [math.inf if highest is None else highest] * n
        )
        losses, right = [], 0
        for i in counted:
            positive_id = key_ids[p[i]]
            start = float(q[i] @ k[p[i]])
            negatives = []
            for j in range(m):
                if (
                    key_ok[j]
                    and j != p[i]
                    and not same(positive_id, key_ids[j])
                    and not same(query_ids[i], paired[j])
                ):
                    negatives.append((float(q[i] @ k[j]), log_probability[j]))
                    if case.get("key_negatives"):
                        negatives.append((float(k[p[i]] @ k[j]), log_probability[j]))
            for j in range(n if case.get("query_negatives") else 0):
                other_id = key_ids[p[j]] if p[j] >= 0 else -1
                if (
                    query_ok[j]
                    and p[j] != p[i]
                    and not same(positive_id, other_id)
                    and not same(query_ids[i], query_ids[j])
                ):
                    negatives.append((float(q[i] @ q[j]), 0.0))
            for j in range(n) if case.get("shared_hard_negatives") else [i]:
                negatives += [
                    (float(q[i] @ h[j, x]), 0.0)
                    for x in range(hard.shape[1])
                    if hard_ok[j, x] and query_ok[j]
                ]
            logits = [
                x / temperature[i] - correction
                for x, correction in negatives
                if kept(x, start, highest[i])
            ]
            own = start / temperature[i] - log_probability[p[i]]
            right += all(own > x for x in logits)
            losses.append(loss_of(own, logits))
            if case.get("symmetric"):
                sharing = [x for x in counted if p[x] == p[i]]
                best = max(float(q[x] @ k[p[i]]) for x in sharing)
                lowest = min(highest[x] for x in sharing)
                t = len(sharing) / sum(1 / temperature[x] for x in sharing)
                negatives = []
                for j in range(n):
                    other_id = key_ids[p[j]] if p[j] >= 0 else -1
                    if (
                        query_ok[j]
                        and p[j] != p[i]
                        and not same(positive_id, other_id)
                        and not same(paired[p[i]], query_ids[j])
                    ):
                        negatives.append(float(q[j] @ k[p[i]]))
                losses[-1] = (
                    losses[-1]
                    + loss_of(start / t, [x / t for x in negatives if kept(x, best, lowest)])
                ) / 2
        total += weight * (sum(losses) / max(len(counted), 1))
    return total, len(counted), right / max(len(counted), 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reference_equals_the_definition_in_loops(make_case, data):
    draw = lambda strategy: data.draw(strategy)  # noqa: E731
    rows = draw(st.integers(1, 6))
    flags = {
        name: draw(st.booleans())
        for name in (
            "ids",
            "query_ids",
            "masks",
            "positives",
            "per_row_temperature",
            "sampling",
            "symmetric",
            "query_negatives",
            "key_negatives",
        )
    }
    hard = draw(st.integers(0, 2))
    threshold = draw(
        st.sampled_from([{}, {"max_cosine": 0.3}, {"max_cosine": 0.9}, {"per_row_threshold": True}])
    )
    _, case = make_case(
        draw(st.integers(0, 10**6)),
        (rows,),
        (rows + draw(st.integers(0, 3)),),
        hard=hard,
        shared_hard_negatives=hard > 0 and draw(st.booleans()),
        **threshold,
        margin_absolute=draw(st.sampled_from([None, 0.1])),
        margin_relative=draw(st.sampled_from([None, 0.95])),
        prefixes=draw(st.sampled_from([None, (7,), (2, 5), (3, 7)])),
        **flags,
    )
    if case["prefixes"] and len(case["prefixes"]) == 2:
        case["prefix_weights"] = (0.3, 1.0)
        if "max_cosine" not in case and draw(st.booleans()):
            case["max_cosine"] = dict(zip(case["prefixes"], (0.5, 0.2), strict=True))
    out = infonce(**grouped(case | {"backend": "reference"}))
    loss, valid, accuracy = loops(case)
    assert out.valid_rows == valid
    assert out.loss.item() == pytest.approx(loss, rel=1e-10, abs=1e-12)
    assert out.accuracy.item() == pytest.approx(accuracy)
    if case["prefixes"] is None:
        assert out.prefix_losses.tolist() == pytest.approx([loss])


def loops_by_id(case: dict) -> tuple[float, int, float]:
    """As loops, of a row whose positives are all keys with the id it wants; one prefix, no ids
    of queries.
    """
    n, m = len(case["queries"]), len(case["keys"])
    q, k = (torch.nn.functional.normalize(case[name]) for name in ("queries", "keys"))
    wanted, ids = case["positive_ids"].tolist(), case["key_ids"].tolist()
    query_ok = case["query_valid"].tolist() if "query_valid" in case else [True] * n
    key_ok = case["key_valid"].tolist() if "key_valid" in case else [True] * m
    log_probability = (
        case["key_log_probability"].tolist() if "key_log_probability" in case else [0.0] * m
    )
    total, right, counted = 0.0, 0, 0
    for i in range(n):
        t = float(case["temperature"].expand(n)[i])
        mine = [
            j
            for j in range(m)
            if query_ok[i] and key_ok[j] and wanted[i] >= 0 and ids[j] == wanted[i]
        ]
        if not mine:
            continue
        counted += 1
        best = max(float(q[i] @ k[j]) for j in mine)
        others = [
            (float(q[i] @ k[j]), log_probability[j])
            for j in range(m)
            if key_ok[j] and ids[j] != wanted[i]
        ]
        if case.get("query_negatives"):
            others += [
                (float(q[i] @ q[j]), 0.0)
                for j in range(n)
                if j != i and query_ok[j] and wanted[j] != wanted[i]
            ]
        if "hard_negatives" in case:
            others += [
                (float(q[i] @ torch.nn.functional.normalize(x, dim=0)), 0.0)
                for x in case["hard_negatives"][i]
            ]
        if case.get("margin_absolute") is not None:
            others = [x for x in others if x[0] <= best + case["margin_absolute"]]
        logits = [x / t - correction for x, correction in others]
        own = [float(q[i] @ k[j]) / t - log_probability[j] for j in mine]
        beaten, losses = list(logits), []
        for j, z in zip(mine, own, strict=True):
            against = list(logits)
            if case.get("key_negatives"):
                between = [
                    (float(k[j] @ k[x]), log_probability[x])
                    for x in range(m)
                    if key_ok[x] and ids[x] != wanted[i]
                ]
                if case.get("margin_absolute") is not None:
                    between = [x for x in between if x[0] <= best + case["margin_absolute"]]
                against += [x / t - correction for x, correction in between]
            beaten += against
            losses.append(math.log1p(sum(math.exp(x - z) for x in against)))
            if case.get("symmetric"):
                asking = [x for x in range(n) if query_ok[x] and wanted[x] == wanted[i]]
                start = max(float(q[x] @ k[j]) for x in asking)
                t_column = len(asking) / sum(
                    1 / float(case["temperature"].expand(n)[x]) for x in asking
                )
                others = [
                    float(q[x] @ k[j]) for x in range(n) if query_ok[x] and wanted[x] != wanted[i]
                ]
                if case.get("margin_absolute") is not None:
                    others = [x for x in others if x <= start + case["margin_absolute"]]
                losses[-1] += math.log1p(
                    sum(math.exp((x - float(q[i] @ k[j])) / t_column) for x in others)
                )
                losses[-1] /= 2
        right += all(max(own) > x for x in beaten)
        total += sum(losses) / len(losses)
    return total / max(counted, 1), counted, right / max(counted, 1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_several_positives_by_id_equal_loops(make_case, data):
    flags = {
        name: data.draw(st.booleans())
        for name in (
            "masks",
            "per_row_temperature",
            "sampling",
            "query_negatives",
            "key_negatives",
            "symmetric",
        )
    }
    rows, margin = data.draw(st.integers(1, 8)), data.draw(st.sampled_from([None, 0.1]))
    hard = 0 if flags["masks"] else data.draw(st.integers(0, 2))
    seed, keys = data.draw(st.integers(0, 10**6)), data.draw(st.integers(0, 12))
    _, case = make_case(
        seed, (rows,), (max(rows, keys),), by_id=True, hard=hard, margin_absolute=margin, **flags
    )
    out = infonce(**grouped(case | {"backend": "reference"}))
    loss, valid, accuracy = loops_by_id(case)
    assert out.valid_rows == valid
    assert out.loss.item() == pytest.approx(loss, rel=1e-10, abs=1e-12)
    assert out.accuracy.item() == pytest.approx(accuracy)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "by_id": True,
            "query_negatives": True,
            "per_row_temperature": True,
            "prefixes": (2, 4),
            "sampling": True,
        },
        {
            "by_id": True,
            "symmetric": True,
            "key_negatives": True,
            "per_row_temperature": True,
            "masks": True,
        },
        {"symmetric": True, "positives": True, "per_row_temperature": True, "masks": True},
        {
            "hard": 2,
            "shared_hard_negatives": True,
            "query_negatives": True,
            "key_negatives": True,
            "ids": True,
        },
        {
            "hard": 2,
            "prefixes": (2, 4),
            "prefix_weights": (0.5, 1.0),
            "margin_absolute": 0.1,
            "symmetric": True,
        },
    ],
)
def test_reference_gradient_by_differences(make_case, options):
    _, case = make_case(3, (4,), (5,), 4, temperature=0.3, **options)
    names = [name for name in ("queries", "keys", "temperature", "hard_negatives") if name in case]

    def loss(*tensors):
        return infonce(
            **grouped({**case, **dict(zip(names, tensors, strict=True)), "backend": "reference"})
        ).loss

    inputs = [case[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(loss, inputs, rtol=1e-5, atol=1e-7)


def test_plain_loss_is_cross_entropy():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(16, 8, generator=g), torch.randn(16, 8, generator=g)
    scores = torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(k).T / 0.07
    target = torch.arange(16)
    one = torch.nn.functional.cross_entropy(scores, target)
    other = torch.nn.functional.cross_entropy(scores.T, target)
    assert infonce(q, k, 0.07).loss.item() == pytest.approx(one.item(), rel=1e-5)
    assert infonce(q, k, 0.07, symmetric=True).loss.item() == pytest.approx(
        (one + other).item() / 2, rel=1e-5
    )
