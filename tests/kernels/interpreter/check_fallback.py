"""A kernel that the compiler or the device refuses costs one warning, never a run.

As check_triton_engine.py, by test_triton.py.
"""

from __future__ import annotations

import subprocess
import warnings

import pytest
import torch
from check_triton_engine import log_of, problem
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from sailplan_kernels import LossOptions, infonce, sigmoid
from sailplan_kernels.tiling import fallback
from sailplan_kernels.tiling.engines import make_engine, triton_schedule
from sailplan_kernels.tiling.tile import Coefficients
from sailplan_kernels.tiling.torch_engine import TorchEngine
from sailplan_kernels.tiling.triton_engine import TritonEngine, TritonTile

LAUNCH = TritonTile._launch
REFUSALS = [
    RuntimeError("PassManager::run failed"),
    OutOfResources(250_000, 232_448, "shared memory"),
    PTXASError("Internal Triton PTX codegen error"),
    CompilationError(None, None, "unsupported"),
    RuntimeError(
        "Failed to find C compiler. Please specify via CC environment variable or set "
        "triton.knobs.build.impl."
    ),
    RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    subprocess.CalledProcessError(1, ["gcc", "main.c"]),
]


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Every test is a process of its own, as far as what was refused goes."""
    monkeypatch.setattr(fallback, "_refused", set())
    monkeypatch.setattr(fallback, "_warned", False)


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that says no: ``refuse(error, schedules, kernels)``; how often it was asked
    stands in ``asked``.
    """

    class Compiler:
        def refuse(
            self, error, schedules=("persistent",), kernels=("statistics", "gradient", "sigmoid")
        ):
            self.asked = []

            def launch(tile, name, **given):
                if tile.config.schedule in schedules and name in kernels:
                    self.asked.append((tile.config.schedule, name))
                    raise error
                return LAUNCH(tile, name, **given)

            monkeypatch.setattr(TritonTile, "_launch", launch)

    return Compiler()


def engine():
    return make_engine("triton")


def answers(engine, kind="plain", prefixes=(64,), dtype=torch.bfloat16, cached=False):
    """What the engine says of one tile: log of sums, weights, moments."""
    moments, columns = kind != "plain", kind == "columns"
    rows, columns_, rule = problem(
        3,
        70,
        60,
        prefixes,
        dtype,
        columns,
        kind == "sigmoid",
        (0,),
        False,
        False,
        0.1,
        True,
        moments,
        behind=0,
    )
    tile = engine.tile(rows, columns_, rule, cached)
    found = tile.statistics()
    logs = found.row_sum if rule.sigmoid else log_of(found.row_maximum, found.row_sum)
    pushes = [
        torch.rand(len(prefixes), n, generator=torch.Generator().manual_seed(1)) for n in (70, 60)
    ]
    more = (log_of(found.column_maximum, found.column_sum), pushes[1]) if columns else ()
    gradient = tile.gradient(Coefficients(logs, pushes[0] * rows.valid, *more))
    return [
        logs,
        *gradient.weights,
        *((gradient.row_moment, gradient.column_moment) if moments else ()),
    ]


def warned(work):
    """What ``work`` returns, and the warnings of this kind."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = work()
    return found, [str(one.message) for one in told if one.category is RuntimeWarning]


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_a_refused_kernel_goes_one_program_a_tile_with_one_warning(compiler, error):
    right = answers(TritonEngine("tiles"))
    compiler.refuse(error)
    found, told = warned(lambda: [answers(engine()), answers(engine())])
    assert (
        len(told) == 1
        and "does not compile or start here" in told[0]
        and "going on with schedule 'tiles'" in told[0]
    )
    assert compiler.asked == [
        ("persistent", "statistics")
    ]  # once: that tile's gradient and all later ones do not ask
    for one in found:
        assert all(torch.equal(a, b) for a, b in zip(one, right, strict=True))


@pytest.mark.parametrize(
    "kind, prefixes",
    [("plain", (64,)), ("moments", (32, 64)), ("columns", (64,)), ("sigmoid", (32, 64))],
)
@pytest.mark.parametrize("kernels", [("statistics",), ("gradient", "sigmoid")], ids="-".join)
@pytest.mark.parametrize("refused", ["persistent", "tiles"])
def test_statistics_of_one_engine_and_the_gradient_of_another_fit_together(
    compiler, refused, kernels, kind, prefixes
):
    """From persistent to tiles in bfloat16; from tiles, which float32 begins with, to torch."""
    dtype, other = (
        (torch.bfloat16, TritonEngine("tiles"))
        if refused == "persistent"
        else (torch.float32, TorchEngine())
    )
    right = answers(other, kind, prefixes, dtype)
    compiler.refuse(RuntimeError("PassManager::run failed"), {refused}, kernels)
    found, told = warned(
        lambda: [answers(engine(), kind, prefixes, dtype, cached) for cached in (False, True)]
    )
    assert len(told) == len(compiler.asked) == 1
    for one in found:
        for a, b in zip(one, right, strict=True):
            assert float((a.double() - b.double()).norm() / b.double().norm()) <= (
                5e-3 if dtype == torch.bfloat16 else 1e-5
            )


@pytest.mark.parametrize(
    "loss, kernels, ran",
    [
        (infonce, ("statistics", "gradient"), "chunked"),
        (infonce, ("gradient",), "chunked + triton"),
        (sigmoid, ("sigmoid",), "chunked"),
    ],
)
def test_a_loss_without_a_kernel_is_torchs_and_says_so(compiler, loss, kernels, ran):
    def step(backend):
        leaves = [
            x.clone().requires_grad_()
            for x in torch.randn(2, 70, 64, generator=torch.Generator().manual_seed(2))
        ]
        out = loss(
            *leaves,
            0.05,
            **({"bias": -2.0} if loss is sigmoid else {}),
            prefixes=(32, 64),
            options=LossOptions(backend=backend, memory_budget=20_000),
        )
        out.loss.backward()
        return out.backend, out.loss.detach(), *(x.grad for x in leaves)

    _, *right = step("chunked")
    compiler.refuse(
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        ("tiles",),
        kernels,
    )
    (backend, *found), told = warned(lambda: step("triton"))
    assert backend == ran and len(told) == 1 and "going on with backend 'chunked'" in told[0]
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("shape"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_other_errors_are_raised_as_they_are(compiler, error):
    compiler.refuse(error)
    with pytest.raises(type(error)) as raised:
        answers(engine())
    assert raised.value is error and len(compiler.asked) == 1


def test_a_schedule_that_was_asked_for_is_not_replaced(compiler):
    compiler.refuse(OutOfResources(250_000, 232_448, "shared memory"), ("tiles",))
    with triton_schedule("tiles"), pytest.raises(OutOfResources):
        answers(engine())
