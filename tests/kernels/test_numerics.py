"""Numbers that must hold on every backend, with plain torch in float64 as the judge.

The bar is a gradient within 3e-3 of the definition computed in float64 from the same rounded inputs
where the inputs are bfloat16 (their gradient is rounded to 8 bits of mantissa: 2e-3 of it is that),
and within 1e-5 where they are float32.

Below temperatures of about 0.02 no float32 logit can promise 1e-5 on trained embeddings: it is a
cosine over the temperature, about 1 / t, and its float32 rounding, 6e-8 / t, is a relative error of
the softmax weight (1.2e-5 at t = 0.005), whatever is done after it. So scores are float64 there,
except Triton's. Their test computes the floor itself: the float64 definition with its logits, and
nothing else, replaced by those that plain torch makes in float32. The bar is four times the floor
of the embeddings' gradients. The temperature's gradient is a sum of differences between a
positive's and its negatives' cosines, on trained embeddings a tenth of the cosines themselves and
at t = 0.005 of a few rows only: its bar is ten roundings of a logit, 6e-7 / t.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sailplan_kernels import LossOptions, infonce, sigmoid
from sailplan_kernels.arguments import grouped
from sailplan_kernels.tiling.engines import why_no_triton

LEAVES = ("queries", "keys", "hard_negatives", "temperature")
# Every backend that is not the definition and can run on a CPU here (triton: with
# TRITON_INTERPRET=1 in the environment).
BACKENDS = (
    ("chunked",) if why_no_triton(torch.device("cpu"), torch.float32) else ("chunked", "triton")
)
TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1, 1.0)
HALF_PRECISION_BAR, FLOAT32_BAR = 3e-3, 1e-5


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative, in the norm."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-8))


def embeddings(kind: str, n: int, m: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [n, dim], [m, dim].

    "trained": topics, so that a query's nearest negatives have cosines close to its positive's
    (about 0.8 and 0.95) and its loss at low temperatures is tiny, but not nothing; "random": no
    structure at all."""
    g = torch.Generator().manual_seed(0)
    draw = lambda rows: torch.randn(rows, dim, generator=g, dtype=torch.float64)  # noqa: E731
    if kind == "random":
        return draw(n), draw(m)
    topics = draw(12)
    queries = topics[torch.arange(n) % 12] + 0.5 * draw(n)
    others = topics[torch.arange(m - n) % 12] + 0.5 * draw(m - n)
    return queries, torch.cat([queries + 0.3 * draw(n), others])


def floor_of_float32_logits(case: dict) -> dict[str, torch.Tensor]:
    """The definition's gradients in float64, of a plain InfoNCE whose logits alone are what
    float32 makes of them.
    """
    leaves = {
        name: case[name].double().requires_grad_() for name in ("queries", "keys", "temperature")
    }
    logits = F.normalize(leaves["queries"]) @ F.normalize(leaves["keys"]).T / leaves["temperature"]
    rounded = (
        F.normalize(case["queries"].float())
        @ F.normalize(case["keys"].float()).T
        / case["temperature"].float()
    )
    logits = logits + (rounded.double() - logits).detach()
    target = torch.arange(len(logits))
    loss = F.cross_entropy(logits, target)
    if case["symmetric"]:
        loss = (loss + F.cross_entropy(logits.T[: len(logits)], target)) / 2
    loss.backward()
    return {name: x.grad for name, x in leaves.items()}


@pytest.mark.parametrize("symmetric", [False, True], ids=["rows", "symmetric"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", ["random", "trained"])
@pytest.mark.parametrize("backend", BACKENDS)
class TestGradientError:
    def test_of_bfloat16_inputs(self, run, backend, kind, temperature, symmetric):
        queries, keys = (x.bfloat16() for x in embeddings(kind, 96, 128, 64))
        case = {
            "queries": queries,
            "keys": keys,
            "temperature": torch.tensor(temperature),
            "symmetric": symmetric,
        }
        _, expected = run(case, "reference")
        leaves = {
            name: x.clone().requires_grad_()
            for name, x in case.items()
            if isinstance(x, torch.Tensor)
        }
        out = infonce(
            **grouped(
                leaves | {"symmetric": symmetric, "backend": backend, "memory_budget": 20_000}
            )
        )
        out.loss.backward()
        assert out.loss.isfinite()
        for name, gradient in expected.items():
            assert leaves[name].grad.isfinite().all()
            assert relative(leaves[name].grad, gradient) <= HALF_PRECISION_BAR, name

    def test_of_float32_inputs(self, run, backend, kind, temperature, symmetric):
        queries, keys = (x.float() for x in embeddings(kind, 96, 128, 64))
        case = {
            "queries": queries,
            "keys": keys,
            "temperature": torch.tensor(temperature),
            "symmetric": symmetric,
        }
        expected_out, expected = run(case, "reference")
        out, gradients = run(case, backend, torch.float32, memory_budget=20_000)
        rounded = floor_of_float32_logits(case)
        floor = max(relative(rounded[name], expected[name]) for name in ("queries", "keys"))
        assert distance(out.loss, expected_out.loss) <= 1e-4
        for name, gradient in expected.items():
            assert gradients[name].isfinite().all()
            bar = FLOAT32_BAR
            if backend == "triton" and temperature < 0.02 and kind == "trained":
                bar = max(bar, 6e-7 / temperature if name == "temperature" else 4 * floor)
            assert relative(gradients[name], gradient) <= bar, name


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", ["random", "trained"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradient_error_of_the_sigmoid_loss(backend, kind, temperature):
    embedded = embeddings(kind, 96, 128, 64)
    found = {}
    for dtype, of in ((torch.float64, "reference"), (torch.float32, backend)):
        leaves = [
            x.float().to(dtype).requires_grad_()
            for x in (*embedded, torch.tensor(temperature), torch.tensor(-0.9 / temperature))
        ]
        sigmoid(*leaves, options=LossOptions(backend=of, memory_budget=20_000)).loss.backward()
        found[dtype] = [x.grad for x in leaves]
    for a, b in zip(found[torch.float32], found[torch.float64], strict=True):
        assert a.dtype is torch.float32 and relative(a, b) <= FLOAT32_BAR


def test_score_dtype_is_chosen_and_heeded():
    """Float32 scores have the error that float64 ones are for; outputs and gradients are float32
    either way.
    """
    queries, keys = (x.float() for x in embeddings("trained", 96, 128, 64))

    def error_of(temperature: float, score_dtype: torch.dtype | None) -> float:
        gradients = []
        for dtype, asked in ((torch.float64, None), (torch.float32, score_dtype)):
            leaves = [x.detach().clone().to(dtype).requires_grad_() for x in (queries, keys)]
            out = infonce(*leaves, temperature, options=LossOptions(score_dtype=asked))
            out.loss.backward()
            assert {
                x.dtype
                for x in (
                    out.loss,
                    out.prefix_losses,
                    out.positive_score,
                    out.accuracy,
                    leaves[0].grad,
                )
            } == {dtype}
            gradients.append(leaves[0].grad)
        return relative(gradients[1], gradients[0])

    assert (
        error_of(0.01, None)
        == error_of(0.01, torch.float64)
        < 5e-7
        < 1.5e-6
        < error_of(0.01, torch.float32)
    )
    assert (
        error_of(0.05, torch.float64)
        < 5e-7
        < 1e-6
        < error_of(0.05, torch.float32)
        == error_of(0.05, None)
    )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """As distance, without mercy for gradients that are tiny altogether."""
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_options_equal_the_reference(make_case, run, backend, data):
    draw = lambda strategy: data.draw(strategy)  # noqa: E731
    rows, hard = draw(st.integers(1, 9)), draw(st.integers(0, 2))
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
    threshold = draw(st.sampled_from([{}, {"max_cosine": 0.3}, {"per_row_threshold": True}]))
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
    if not threshold and case["prefixes"] and draw(st.booleans()):
        case["max_cosine"] = {size: 0.6 - 0.05 * size for size in case["prefixes"]}
    budget = draw(st.sampled_from([1, 2000, 5000, None]))
    expected, expected_gradients = run(case, "reference", upstream=0.7)
    out, gradients = run(case, backend, upstream=0.7, memory_budget=budget)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.prefix_losses, expected.prefix_losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.positive_score, expected.positive_score, rtol=1e-10, atol=1e-12)
    assert out.accuracy == expected.accuracy and out.valid_rows == expected.valid_rows
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name],
            gradient,
            rtol=1e-9,
            atol=1e-10,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    # In float32 a score next to a threshold may fall on its other side; look at the values without
    # thresholds.
    case.update(dict.fromkeys((*filters, "max_cosine")))
    expected, expected_gradients = run(
        {**case, **{n: case[n].float() for n in LEAVES if n in case}}, "reference"
    )
    out, gradients = run(case, backend, torch.float32, memory_budget=budget)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    # Of one cosine, as the temperature's gradient shows it. That is a difference of sums over pairs
    # and prefixes: of 300 draws of one kind the definition itself, in float32, is up to 20
    # roundings away.
    rounding = 6e-8 / float(case["temperature"].min()) ** 2
    for name, gradient in expected_gradients.items():
        near = max(
            1e-5 * max(1.0, float(gradient.abs().max())),
            40 * rounding if name == "temperature" else 0.0,
        )
        torch.testing.assert_close(gradients[name].double(), gradient, rtol=1e-4, atol=near)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_several_positives_by_id_equal_reference(make_case, run, backend, data):
    draw = lambda strategy: data.draw(strategy)  # noqa: E731
    names = (
        "query_ids",
        "masks",
        "per_row_temperature",
        "sampling",
        "query_negatives",
        "key_negatives",
        "symmetric",
        "per_row_threshold",
    )
    flags = {name: draw(st.booleans()) for name in names}
    rows, prefixes = draw(st.integers(1, 9)), draw(st.sampled_from([None, (7,), (2, 5), (3, 7)]))
    margins = {
        "margin_absolute": draw(st.sampled_from([None, 0.1])),
        "margin_relative": draw(st.sampled_from([None, 0.95])),
    }
    _, case = make_case(
        draw(st.integers(0, 10**6)),
        (rows,),
        (rows + draw(st.integers(0, 9)),),
        by_id=True,
        hard=draw(st.integers(0, 1)),
        prefixes=prefixes,
        **flags,
        **margins,
    )
    frozen = draw(st.sampled_from([(), ("queries",), ("keys",), ("temperature",)]))
    budget = draw(st.sampled_from([1, 2000, None]))
    expected, expected_gradients = run(case, "reference", frozen=frozen)
    out, gradients = run(case, backend, frozen=frozen, memory_budget=budget)
    for name in ("loss", "prefix_losses", "positive_score", "accuracy"):
        torch.testing.assert_close(
            getattr(out, name), getattr(expected, name), rtol=1e-10, atol=1e-12
        )
    for name, gradient in expected_gradients.items():
        if name not in frozen:
            torch.testing.assert_close(
                gradients[name],
                gradient,
                rtol=1e-9,
                atol=1e-10,
                msg=lambda m, name=name: f"{name}: {m}",
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("noise", [0.3, 3.0], ids=["trained", "untrained"])
@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_float32_gradient_error_at_any_temperature(
    make_case, run, backend, temperature, noise, symmetric
):
    """Gradient within 1e-4 of float64 (the bar for every backend is 3e-3), finite, also where
    the loss is tiny.
    """
    _, case = make_case(
        0,
        (128,),
        (160,),
        64,
        temperature=temperature,
        noise=noise,
        symmetric=symmetric,
        dtype=torch.float32,
    )
    expected, expected_gradients = run(case, "reference")
    out, gradients = run(case, backend, torch.float32, memory_budget=20_000)
    assert out.loss.isfinite()
    assert distance(out.loss, expected.loss) < 1e-4
    for name, gradient in expected_gradients.items():
        assert gradients[name].isfinite().all()
        assert distance(gradients[name], gradient) < 1e-4, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_losses_are_not_rounded_to_zero(make_case, run, backend):
    _, case = make_case(0, (32,), (32,), 256, temperature=0.02, noise=0.1, dtype=torch.float32)
    expected, expected_gradients = run(case, "reference")
    out, gradients = run(case, backend, torch.float32)
    assert 0 < expected.loss < 1e-10
    assert distance(out.loss, expected.loss) < 1e-3
    assert (
        distance(gradients["keys"], expected_gradients["keys"]) < 1e-2
        or expected_gradients["keys"].norm() < 1e-8
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(make_case, run, backend, dtype):
    _, case = make_case(1, (24,), (30,), 32, hard=2, dtype=dtype)
    case["temperature"] = torch.tensor(0.05)
    expected, expected_gradients = run(case, "reference")
    leaves = {
        name: case[name].clone().requires_grad_() for name in ("queries", "keys", "hard_negatives")
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = infonce(**grouped({**case, **leaves, "backend": backend}))
    (out.loss * 4096).backward()  # loss scaling, as float16 gradients need
    assert out.loss.dtype is torch.float32
    assert distance(out.loss, expected.loss) < 1e-4
    for name, x in leaves.items():
        assert x.grad.dtype is dtype
        assert distance(x.grad.double() / 4096, expected_gradients[name]) < 5e-3


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("symmetric", [False, True])
class TestDegenerate:
    def test_rows_without_negatives_cost_nothing(self, run, backend, symmetric):
        q = torch.randn(4, 8)
        case = {
            "queries": q,
            "keys": q + 1,
            "temperature": torch.tensor(0.01),
            "key_ids": torch.zeros(4, dtype=torch.int64),
        }
        out, gradients = run(case, backend, torch.float32, symmetric=symmetric)
        assert out.loss == 0 and out.accuracy == 1 and out.valid_rows == 4
        assert all((g == 0).all() for g in gradients.values())

    def test_no_valid_row_gives_zero_and_zero_gradients(self, run, backend, symmetric):
        case = {
            "queries": torch.randn(3, 8),
            "keys": torch.randn(3, 8),
            "temperature": torch.tensor(0.1),
        }
        case["query_valid"] = torch.zeros(3, dtype=torch.bool)
        out, gradients = run(case, backend, torch.float32, symmetric=symmetric)
        assert out.loss == 0 and out.valid_rows == 0 and out.accuracy == 0
        assert all((g == 0).all() for g in gradients.values())

    def test_nothing_at_all(self, run, backend, symmetric):
        case = {
            "queries": torch.randn(0, 8),
            "keys": torch.randn(0, 8),
            "temperature": torch.tensor(0.1),
        }
        out, gradients = run(case, backend, torch.float32, symmetric=symmetric)
        assert out.loss == 0 and out.valid_rows == 0
        assert gradients["temperature"] == 0

    def test_padding_may_hold_nan(self, run, backend, symmetric):
        q, k = torch.randn(4, 8), torch.randn(5, 8)
        valid, key_valid = torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 1, 1, 0, 0]).bool()
        case = {
            "queries": q[:3],
            "keys": k[:3],
            "temperature": torch.tensor(0.1),
            "hard_negatives": torch.randn(3, 2, 8),
        }
        expected, expected_gradients = run(case, backend, torch.float32, symmetric=symmetric)
        q[3], k[3:] = torch.nan, torch.inf
        case["hard_negatives"] = torch.cat(
            [case["hard_negatives"], torch.full((1, 2, 8), torch.nan)]
        )
        case.update(queries=q, keys=k, query_valid=valid, key_valid=key_valid)
        out, gradients = run(case, backend, torch.float32, symmetric=symmetric)
        torch.testing.assert_close(out.loss, expected.loss)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(
                gradients[name][:3] if gradient.dim() else gradients[name], gradient
            )

    @pytest.mark.parametrize("temperature", [0.005, 1.0])
    def test_zero_vectors_duplicates_and_huge_norms_stay_finite(
        self, run, backend, symmetric, temperature
    ):
        q = torch.randn(6, 8)
        q[0], q[1], q[2], q[3] = 0, q[4], q[4] * 1e30, q[4] * 1e-30
        case = {"queries": q, "keys": q.clone(), "temperature": torch.tensor(temperature)}
        out, gradients = run(case, backend, torch.float32, symmetric=symmetric)
        assert out.loss.isfinite() and all(g.isfinite().all() for g in gradients.values())
        assert (gradients["queries"][0] == 0).all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_prefix_has_its_own_highest_cosine(make_case, run, backend, symmetric, dtype):
    _, case = make_case(4, (12,), (12,), 8, symmetric=symmetric, dtype=dtype)
    highest = {4: 0.35, 8: 0.1}
    out, gradients = run(case, backend, dtype, prefixes=(4, 8), max_cosine=highest)
    alone = [run(case, backend, dtype, prefixes=(d,), max_cosine=x) for d, x in highest.items()]
    close = {"rtol": 2e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(
        out.prefix_losses, torch.cat([one.prefix_losses for one, _ in alone]), **close
    )
    for name, found in gradients.items():
        torch.testing.assert_close(found, sum(each[name] for _, each in alone), **close)
    other = run(case, backend, dtype, prefixes=(4, 8), max_cosine=0.1)[0]
    assert (other.prefix_losses[0] - out.prefix_losses[0]).abs() > 0.05  # the full size's is lower
