"""The chunked backend is repeatable, and computes no gradient that nobody asked for."""

from __future__ import annotations

import pytest
import torch

from sailplan_kernels import infonce
from sailplan_kernels.arguments import grouped

LEAVES = ("queries", "keys", "hard_negatives", "temperature")


@pytest.mark.parametrize(
    "options", [{"symmetric": True, "positives": True}, {"by_id": True, "query_negatives": True}]
)
def test_chunked_is_bitwise_repeatable(make_case, run, options):
    _, case = make_case(0, (64,), (64,), 16, dtype=torch.float32, hard=2, **options)
    one, other = (run(case, "chunked", torch.float32, memory_budget=10_000) for _ in range(2))
    assert torch.equal(one[0].loss, other[0].loss)
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize(
    "frozen", [("queries",), ("keys",), ("temperature",), ("queries", "temperature"), LEAVES]
)
def test_frozen_inputs_leave_other_gradients_alone(make_case, run, frozen):
    _, case = make_case(0, hard=2, symmetric=True, query_negatives=True, key_negatives=True)
    _, expected = run(case, "reference")
    leaves = {name: case[name].clone().requires_grad_(name not in frozen) for name in LEAVES}
    out = infonce(**grouped({**case, **leaves, "backend": "chunked"}))
    if frozen == LEAVES:
        assert not out.loss.requires_grad
        return
    out.loss.backward()
    for name, x in leaves.items():
        if name in frozen:
            assert x.grad is None
        else:
            torch.testing.assert_close(x.grad, expected[name])


def test_without_grad_there_is_no_graph(make_case):
    _, case = make_case(0)
    case["queries"].requires_grad_()
    with torch.no_grad():
        assert not infonce(**grouped(case)).loss.requires_grad


def test_a_second_backward_is_an_error(make_case):
    """The gradients are given away, not copied: a second time there are none."""
    _, case = make_case(0)
    queries = case["queries"].clone().requires_grad_()
    loss = infonce(**grouped({**case, "queries": queries, "backend": "chunked"})).loss
    loss.backward(retain_graph=True)
    first = queries.grad.clone()
    with pytest.raises(
        RuntimeError, match="infonce: found a second backward of one call, expected one"
    ):
        loss.backward()
    assert torch.equal(queries.grad, first)


@pytest.mark.parametrize(
    "scale",
    [1e-3, 1e3, 1e-9, 1e30],
    ids=["read as it is, short", "long", "copied, vanishing", "overflowing"],
)
def test_the_vectors_length_does_not_matter(make_case, run, scale):
    """Whether products read the vectors themselves or, where these might fail, a normalised
    copy.
    """
    _, case = make_case(4, (6,), (9,), 32, dtype=torch.float32, prefixes=(8, 32), symmetric=True)
    expected, expected_gradients = run(case, "chunked", torch.float32)
    scaled = {**case, "queries": case["queries"] * scale, "keys": case["keys"] * 3}
    out, gradients = run(scaled, "chunked", torch.float32)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradients["queries"] * scale, expected_gradients["queries"], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        gradients["keys"] * 3, expected_gradients["keys"], rtol=1e-4, atol=1e-5
    )
