"""The sigmoid loss: reference against a plain loop and differences, chunked against reference,
ranks against one.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sailplan_kernels import EXCHANGES, Local, LossOptions, sigmoid, sigmoid_sum
from sailplan_kernels.arguments import grouped
from sailplan_kernels.testing import run_ranks

LEAVES = ("queries", "keys", "temperature", "bias")


def call(case: dict, frozen=(), dtype=torch.float64, **more):
    case = {"bias": torch.tensor(-3.0), **case}
    for name in LEAVES:
        case[name] = case[name].detach().to(dtype).clone().requires_grad_(name not in frozen)
    out = sigmoid(**grouped(case | more))
    (out.loss * 0.7).backward()
    return out, {name: case[name].grad for name in LEAVES}


def test_reference_equals_a_loop_over_pairs(make_case):
    _, case = make_case(0, (5,), (7,), ids=True, masks=True)
    q, k = (torch.nn.functional.normalize(case[name]) for name in ("queries", "keys"))
    total, rows = 0.0, 0
    for i, p in enumerate(case["positives"].tolist()):
        if not (case["query_valid"][i] and case["key_valid"][p]):
            continue
        rows += 1
        for j in range(7):
            same_id = case["key_ids"][j] >= 0 and case["key_ids"][j] == case["key_ids"][p]
            if j == p or (case["key_valid"][j] and not same_id):
                z = float(q[i] @ k[j]) / 0.1 - 3.0
                total += math.log1p(math.exp(-z if j == p else z))
    out = sigmoid(**grouped(case | {"bias": -3.0, "backend": "reference"}))
    assert out.valid_rows == rows > 0
    assert out.loss.item() == pytest.approx(total / rows, rel=1e-10)


def test_reference_gradient_by_differences(make_case):
    _, case = make_case(
        0, (4,), (5,), 4, temperature=0.3, per_row_temperature=True, prefixes=(2, 4)
    )
    case["bias"] = torch.tensor(-1.0, dtype=torch.float64)
    inputs = [case[name].clone().requires_grad_() for name in LEAVES]

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(LEAVES, tensors, strict=True))
        return sigmoid(**grouped({**case, **given, "backend": "reference"})).loss

    assert torch.autograd.gradcheck(loss, inputs, rtol=1e-5, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_chunked_equals_reference(make_case, data):
    names = ("ids", "query_ids", "masks", "positives", "per_row_temperature")
    flags = {name: data.draw(st.booleans()) for name in names}
    rows = data.draw(st.integers(1, 8))
    _, case = make_case(
        data.draw(st.integers(0, 10**6)),
        (rows,),
        (rows + 2,),
        prefixes=data.draw(st.sampled_from([None, (3, 7)])),
        **flags,
    )
    expected, expected_gradients = call(case, backend="reference")
    for dtype, near in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        out, gradients = call(
            case,
            dtype=dtype,
            backend="chunked",
            memory_budget=data.draw(st.sampled_from([1, 1000, None])),
        )
        torch.testing.assert_close(out.loss.double(), expected.loss, rtol=near, atol=near)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(
                gradients[name].double(),
                gradient,
                rtol=near,
                atol=near * max(1.0, float(gradient.abs().max())),
            )


@pytest.mark.parametrize(
    "world_size, backend, kind",
    [(2, "reference", "all_gather"), *((4, "chunked", kind) for kind in EXCHANGES)],
)
def test_ranks_equal_one_process(make_case, world_size, backend, kind):
    shapes = ((5, 3, 2, 0)[:world_size], (7, 3, 4, 1)[:world_size])
    cases = [
        make_case(i, *shapes, **flags)
        for i, flags in enumerate(
            [{}, {"ids": True, "masks": True, "prefixes": (3, 7)}, {"positives": True}]
        )
    ]

    def work(rank, _):
        results = []
        for ranks, _ in cases:
            for frozen in ((), ("keys",) if rank == 0 else ("queries",)):
                out, gradients = call(
                    ranks[rank],
                    frozen,
                    exchange=EXCHANGES[kind](),
                    backend=backend,
                    memory_budget=1500,
                )
                results.append((out.loss.detach(), out.prefix_losses, gradients))
        return results

    parts = list(zip(*run_ranks(work, world_size), strict=True))[::2]
    for part, (_, whole) in zip(parts, cases, strict=True):
        expected, gradients = call(whole, backend="reference")
        torch.testing.assert_close(
            torch.stack([x[0] for x in part]).mean(), expected.loss.detach(), rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(
            torch.stack([x[1] for x in part]).mean(0),
            expected.prefix_losses,
            rtol=1e-10,
            atol=1e-12,
        )
        for name, gradient in gradients.items():
            mine = [x[2][name] for x in part]
            together = torch.cat(mine) / world_size if gradient.dim() else torch.stack(mine).mean(0)
            torch.testing.assert_close(together, gradient, rtol=1e-10, atol=1e-11)


def counted(exchange, name):
    """Let an exchange note the calls of one of its methods; return the notes."""
    calls, inner = [], getattr(exchange, name)

    def noted(parts):
        calls.append(len(parts))
        return inner(parts)

    setattr(exchange, name, noted)
    return calls


@pytest.mark.parametrize("kind", EXCHANGES)
def test_a_sum_of_losses_is_one_exchange_with_their_gradients(kind):
    """Three losses, two of which share their keys, beside each by itself."""
    weights = [1.0, 0.0, 0.5]

    def work(rank, _):
        g = torch.Generator().manual_seed(rank)
        rows = (5, 3, 2, 4)[rank]
        given = [torch.randn(rows, 8, generator=g, dtype=torch.float64) for _ in range(5)]
        results = []
        for together in (False, True):
            queries, more, other, keys, others = (x.clone().requires_grad_() for x in given)
            temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
            bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
            exchange = EXCHANGES[kind]()
            asked = [counted(exchange, x) for x in ("gather_parts", "reduce_scatter_parts")]
            options = LossOptions(backend="chunked", memory_budget=1500)
            calls = [
                {"queries": queries, "keys": keys, "prefixes": (4, 8)},
                {"queries": more, "keys": keys},
                {"queries": other, "keys": others, "prefixes": {8: 2.0}},
            ]
            for one in calls:
                one |= {"temperature": temperature, "bias": bias, "options": options}
            if together:
                total, found = sigmoid_sum(calls, weights, exchange=exchange)
            else:
                found = [sigmoid(**one, exchange=exchange) for one in calls]
                total = sum(w * one.loss for w, one in zip(weights, found, strict=True))
            total.backward()
            gradients = [x.grad for x in (queries, more, other, keys, others, temperature, bias)]
            losses = [one.loss.detach() for one in found]
            scores = [one.positive_score for one in found]
            results.append(((total.detach(), losses, scores, gradients), asked))
        return results

    for (alone, times), (together, once) in run_ranks(work, 4):
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
        gathered, brought_home = zip(times, once, strict=True)
        assert list(map(len, gathered)) == [3, 1]
        assert len(brought_home[1]) <= 1 and len(brought_home[0]) <= 3


def test_a_sum_without_losses_or_of_two_backends_is_refused():
    with pytest.raises(ValueError, match=r"^calls: found 0"):
        sigmoid_sum([])
    call = {"queries": torch.randn(2, 3), "keys": torch.randn(2, 3), "temperature": 1.0, "bias": 0}
    others = call | {"options": LossOptions(backend="reference")}
    with pytest.raises(ValueError, match=r"^calls: found backends chunked, reference"):
        sigmoid_sum([call | {"options": LossOptions(backend="chunked")}, others])


def test_wrong_bias():
    with pytest.raises(ValueError, match=r"^bias: found"):
        sigmoid(torch.randn(2, 3), torch.randn(2, 3), 0.1, torch.zeros(2))


def test_a_rank_may_want_the_bias_alone(make_case):
    """Then its tiles still give the other ranks' keys their gradient."""
    ranks, whole = make_case(0, (5, 3), (7, 4), prefixes=(3, 7))
    frozen = ("queries", "keys", "temperature")
    parts = run_ranks(
        lambda rank, _: call(
            ranks[rank],
            frozen if rank else ("bias",),
            exchange=EXCHANGES["ring"](),
            backend="chunked",
        )[1],
        2,
    )
    _, expected = call(whole, backend="reference")
    torch.testing.assert_close(parts[0]["keys"] / 2, expected["keys"][:7], rtol=1e-10, atol=1e-11)
    alone = call(whole, frozen, backend="chunked", exchange=Local())[1]
    torch.testing.assert_close(alone["bias"], expected["bias"], rtol=1e-10, atol=1e-11)
    assert alone["keys"] is None and parts[1]["keys"] is None and parts[1]["bias"] is not None
