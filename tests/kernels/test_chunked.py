"""The chunked backend equals the reference, keeps its numbers at any temperature, and stays within its memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sailplan_kernels import infonce

LEAVES = ("queries", "keys", "hard_negatives", "temperature")


def run(case: dict, backend: str, dtype=torch.float64, upstream=1.0, frozen=(), **more):
    """The output and the gradients of all leaves."""
    case = dict(case)
    for name in LEAVES:
        if isinstance(case.get(name), torch.Tensor):
            case[name] = case[name].detach().to(dtype).clone().requires_grad_(name not in frozen)
    out = infonce(**case, backend=backend, **more)
    (out.loss * upstream).backward()
    return out, {name: case[name].grad for name in LEAVES if isinstance(case.get(name), torch.Tensor)}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative, in the norm."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-8))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_chunked_equals_reference(make_case, data):
    draw = lambda strategy: data.draw(strategy)  # noqa: E731
    rows, hard = draw(st.integers(1, 9)), draw(st.integers(0, 2))
    flags = {
        name: draw(st.booleans())
        for name in ("ids", "query_ids", "masks", "positives", "per_row_temperature", "sampling", "symmetric", "query_negatives", "key_negatives")
    }
    threshold = draw(st.sampled_from([{}, {"max_negative_score": 0.3}, {"per_row_threshold": True}]))
    filters = {
        "margin_absolute": draw(st.sampled_from([None, 0.1])),
        "margin_relative": draw(st.sampled_from([None, 0.95])),
    }
    _, case = make_case(
        draw(st.integers(0, 10**6)),
        (rows,),
        (rows + draw(st.integers(0, 4)),),
        hard=hard,
        shared_hard_negatives=hard > 0 and draw(st.booleans()),
        prefixes=draw(st.sampled_from([None, (7,), (2, 5), (3, 7)])),
        temperature=draw(st.sampled_from([0.05, 0.2, 1.0])),
        **flags,
        **filters,
        **threshold,
    )
    budget = draw(st.sampled_from([1, 2000, 5000, None]))
    expected, expected_gradients = run(case, "reference", upstream=0.7)
    out, gradients = run(case, "chunked", upstream=0.7, memory_budget=budget)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.prefix_losses, expected.prefix_losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.positive_score, expected.positive_score, rtol=1e-10, atol=1e-12)
    assert out.accuracy == expected.accuracy and out.valid_rows == expected.valid_rows
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    # In float32 a score next to a threshold may fall on its other side; look at the values without thresholds.
    case.update(dict.fromkeys((*filters, "max_negative_score")))
    expected, expected_gradients = run({**case, **{n: case[n].float() for n in LEAVES if n in case}}, "reference")
    out, gradients = run(case, "chunked", torch.float32, memory_budget=budget)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name].double(), gradient, rtol=1e-4, atol=1e-5 * max(1.0, float(gradient.abs().max())))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_several_positives_by_id_equal_reference(make_case, data):
    draw = lambda strategy: data.draw(strategy)  # noqa: E731
    flags = {name: draw(st.booleans()) for name in ("query_ids", "masks", "per_row_temperature", "sampling", "query_negatives", "per_row_threshold")}
    rows, prefixes = draw(st.integers(1, 9)), draw(st.sampled_from([None, (7,), (2, 5), (3, 7)]))
    margins = {"margin_absolute": draw(st.sampled_from([None, 0.1])), "margin_relative": draw(st.sampled_from([None, 0.95]))}
    _, case = make_case(
        draw(st.integers(0, 10**6)), (rows,), (rows + draw(st.integers(0, 9)),), by_id=True, hard=draw(st.integers(0, 1)), prefixes=prefixes, **flags, **margins
    )
    frozen = draw(st.sampled_from([(), ("queries",), ("keys",), ("temperature",)]))
    budget = draw(st.sampled_from([1, 2000, None]))
    expected, expected_gradients = run(case, "reference", frozen=frozen)
    out, gradients = run(case, "chunked", frozen=frozen, memory_budget=budget)
    for name in ("loss", "prefix_losses", "positive_score", "accuracy"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-10, atol=1e-12)
    for name, gradient in expected_gradients.items():
        if name not in frozen:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("noise", [0.3, 3.0], ids=["trained", "untrained"])
@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_float32_gradient_error_at_any_temperature(make_case, temperature, noise, symmetric):
    """Gradient within 1e-4 of float64 (the bar for every backend is 3e-3), finite, also where the loss is tiny."""
    _, case = make_case(0, (128,), (160,), 64, temperature=temperature, noise=noise, symmetric=symmetric, dtype=torch.float32)
    expected, expected_gradients = run(case, "reference")
    out, gradients = run(case, "chunked", torch.float32, memory_budget=20_000)
    assert out.loss.isfinite()
    assert distance(out.loss, expected.loss) < 1e-4
    for name, gradient in expected_gradients.items():
        assert gradients[name].isfinite().all()
        assert distance(gradients[name], gradient) < 1e-4, name


def test_tiny_losses_are_not_rounded_to_zero(make_case):
    _, case = make_case(0, (32,), (32,), 256, temperature=0.02, noise=0.1, dtype=torch.float32)
    expected, expected_gradients = run(case, "reference")
    out, gradients = run(case, "chunked", torch.float32)
    assert 0 < expected.loss < 1e-10
    assert distance(out.loss, expected.loss) < 1e-3
    assert distance(gradients["keys"], expected_gradients["keys"]) < 1e-2 or expected_gradients["keys"].norm() < 1e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(make_case, dtype):
    _, case = make_case(1, (24,), (30,), 32, hard=2, dtype=dtype)
    case["temperature"] = torch.tensor(0.05)
    expected, expected_gradients = run(case, "reference")
    leaves = {name: case[name].clone().requires_grad_() for name in ("queries", "keys", "hard_negatives")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = infonce(**{**case, **leaves}, backend="chunked")
    (out.loss * 4096).backward()  # loss scaling, as float16 gradients need
    assert out.loss.dtype is torch.float32
    assert distance(out.loss, expected.loss) < 1e-4
    for name, x in leaves.items():
        assert x.grad.dtype is dtype
        assert distance(x.grad.double() / 4096, expected_gradients[name]) < 5e-3


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("symmetric", [False, True])
class TestDegenerate:
    def test_rows_without_negatives_cost_nothing(self, backend, symmetric):
        q = torch.randn(4, 8)
        case = {"queries": q, "keys": q + 1, "temperature": torch.tensor(0.01), "key_ids": torch.zeros(4, dtype=torch.int64)}
        out, gradients = run(case, backend, torch.float32, symmetric=symmetric)
        assert out.loss == 0 and out.accuracy == 1 and out.valid_rows == 4
        assert all((g == 0).all() for g in gradients.values())

    def test_no_valid_row_gives_zero_and_zero_gradients(self, backend, symmetric):
        case = {"queries": torch.randn(3, 8), "keys": torch.randn(3, 8), "temperature": torch.tensor(0.1)}
        case["query_valid"] = torch.zeros(3, dtype=torch.bool)
        out, gradients = run(case, backend, torch.float32, symmetric=symmetric)
        assert out.loss == 0 and out.valid_rows == 0 and out.accuracy == 0
        assert all((g == 0).all() for g in gradients.values())

    def test_nothing_at_all(self, backend, symmetric):
        case = {"queries": torch.randn(0, 8), "keys": torch.randn(0, 8), "temperature": torch.tensor(0.1)}
        out, gradients = run(case, backend, torch.float32, symmetric=symmetric)
        assert out.loss == 0 and out.valid_rows == 0
        assert gradients["temperature"] == 0

    def test_padding_may_hold_nan(self, backend, symmetric):
        q, k = torch.randn(4, 8), torch.randn(5, 8)
        valid, key_valid = torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 1, 1, 0, 0]).bool()
        case = {"queries": q[:3], "keys": k[:3], "temperature": torch.tensor(0.1), "hard_negatives": torch.randn(3, 2, 8)}
        expected, expected_gradients = run(case, backend, torch.float32, symmetric=symmetric)
        q[3], k[3:] = torch.nan, torch.inf
        case["hard_negatives"] = torch.cat([case["hard_negatives"], torch.full((1, 2, 8), torch.nan)])
        case.update(queries=q, keys=k, query_valid=valid, key_valid=key_valid)
        out, gradients = run(case, backend, torch.float32, symmetric=symmetric)
        torch.testing.assert_close(out.loss, expected.loss)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name][:3] if gradient.dim() else gradients[name], gradient)

    @pytest.mark.parametrize("temperature", [0.005, 1.0])
    def test_zero_vectors_duplicates_and_huge_norms_stay_finite(self, backend, symmetric, temperature):
        q = torch.randn(6, 8)
        q[0], q[1], q[2], q[3] = 0, q[4], q[4] * 1e30, q[4] * 1e-30
        case = {"queries": q, "keys": q.clone(), "temperature": torch.tensor(temperature)}
        out, gradients = run(case, backend, torch.float32, symmetric=symmetric)
        assert out.loss.isfinite() and all(g.isfinite().all() for g in gradients.values())
        assert (gradients["queries"][0] == 0).all()


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"query_negatives": True, "key_negatives": True}])
def test_chunked_never_holds_an_n_by_m_matrix(make_case, options):
    n, m, d, budget = 1024, 2048, 16, 1 << 20
    _, case = make_case(0, (n,), (m,), d, dtype=torch.float32, ids=True, query_ids=True, margin_absolute=0.1, **options)
    with LargestStorage() as memory:
        run(case, "chunked", torch.float32, memory_budget=budget)
    assert memory.largest <= budget / 2 < n * m * 4 / 8


@pytest.mark.parametrize("options", [{"symmetric": True, "positives": True}, {"by_id": True, "query_negatives": True}])
def test_chunked_is_bitwise_repeatable(make_case, options):
    _, case = make_case(0, (64,), (64,), 16, dtype=torch.float32, hard=2, **options)
    one, other = (run(case, "chunked", torch.float32, memory_budget=10_000) for _ in range(2))
    assert torch.equal(one[0].loss, other[0].loss)
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize("frozen", [("queries",), ("keys",), ("temperature",), ("queries", "temperature"), LEAVES])
def test_frozen_inputs_leave_other_gradients_alone(make_case, frozen):
    _, case = make_case(0, hard=2, symmetric=True, query_negatives=True, key_negatives=True)
    _, expected = run(case, "reference")
    leaves = {name: case[name].clone().requires_grad_(name not in frozen) for name in LEAVES}
    out = infonce(**{**case, **leaves}, backend="chunked")
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
        assert not infonce(**case).loss.requires_grad
