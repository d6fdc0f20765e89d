"""The Triton backend without a GPU: its arithmetic in the interpreter, in a process of its own (see interpreter/), and a
part of the ahead-of-time compilation; the whole table is `python -m sailplan_kernels.aot`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sailplan_kernels.triton_kernels.configurations import persistent_configuration, persistent_prefixes_configuration

pytest.importorskip("triton")


# As if on other processors: the kernels that numpy's BLAS, numpy and torch choose there.
PROCESSORS = {
    "Haswell": {"OPENBLAS_CORETYPE": "Haswell", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "SkylakeX": {"OPENBLAS_CORETYPE": "SkylakeX"},
}


def interpreted(*checks: str, **environment: str) -> str:
    """What pytest says of files in interpreter/, in a process with Triton's interpreter."""
    folder = Path(__file__).parent / "interpreter"
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "exact_interpreter", *(str(folder / name) for name in checks)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("processor", PROCESSORS)
def test_engine_in_the_interpreter(processor):
    if processor == "SkylakeX" and not torch.cpu._is_avx512_supported():
        pytest.skip("this processor has no AVX-512: the interpreter's tests ran as on Haswell alone, not as on SkylakeX")
    said = interpreted("check_exact_interpreter.py", "check_triton_engine.py", **PROCESSORS[processor])
    assert f"openblas for {processor}" in said  # else a library that does not know the variable passed as another


def test_a_refused_kernel_never_ends_a_run():
    interpreted("check_fallback.py")


@pytest.mark.parametrize("table", [persistent_configuration, persistent_prefixes_configuration])
def test_persistent_kernels_are_for_the_devices_they_were_compiled_for(table):
    wanted = torch.bfloat16, "columns", "few"
    assert [table(*wanted, capability) for capability in (80, 86, 89, 120)] == [None] * 4
    assert table(*wanted, 90) is not None and table(*wanted, 100) == table(*wanted, 103)
    assert table(torch.float32, "columns", "few", 90) is None


def compiling(*arguments: str) -> None:
    """Python with the interpreter off."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_kernels_compile_for_their_targets():
    """The widest of each kernel where spills come first, and what the judge says of a tile that spills or is not specialised."""
    compiling("-c", COMPILE)


def test_a_launch_compiles_what_was_judged():
    compiling(str(Path(__file__).parent / "interpreter" / "check_launches.py"))


COMPILE = """
from dataclasses import replace

import torch
from sailplan_kernels.aot import Case, compile_case
from sailplan_kernels.triton_kernels.configurations import Configuration

half, full = torch.bfloat16, torch.float32
for case in (
    Case("statistics", half, "plain", "few", 90, keep=True),
    Case("gradient", half, "plain", "few", 90),
    Case("gradient", half, "columns", "all", 90),
    Case("rescale", half, "plain", "few", 90),
    Case("gradient", full, "columns", "all", 90),
    Case("gradient", half, "moments", "odd", 80),
    Case("gradient", half, "moments", "few", 80),
    Case("gradient", half, "moments", "few", 100),
    Case("sigmoid", half, "sigmoid", "few", 90),
    Case("sigmoid", half, "sigmoid moments", "all", 90),
):
    verdict = compile_case(case)
    print(case, verdict)
    assert not verdict.reason, verdict.reason
for case, groups in (
    (Case("statistics", half, "plain", "few", 90, True, "persistent"), 3),
    (Case("gradient", half, "plain", "few", 90, False, "persistent"), 3),
    (Case("statistics", torch.float16, "plain", "all", 90, True, "persistent"), 3),
    (Case("gradient", half, "columns", "all", 90, False, "persistent"), 1),
    (Case("sigmoid", half, "sigmoid", "few", 90, False, "persistent"), 3),
    (Case("gradient", half, "plain", "few", 100, False, "persistent"), 3),
    (Case("gradient", half, "columns", "few", 100, False, "persistent"), 3),
    (Case("gradient", half, "columns", "all", 90, False, "persistent prefixes"), 1),
):
    verdict = compile_case(case)
    print(case, verdict)
    assert not verdict.reason and verdict.tma and verdict.groups == groups
case = Case("gradient", half, "plain", "few", 90, False, "persistent")
for lost in (replace(case.configuration, warps=8), replace(case.configuration, FLATTEN=True)):  # the compiler drops it without a word
    verdict = compile_case(case, lost)
    assert "not specialised" in verdict.reason and verdict.groups == 1, verdict
wide = compile_case(Case("gradient", half, "columns", "all", 90), Configuration(128, 128, 64, 8, 8, 3))
assert "spills" in wide.reason, wide
assert compile_case(Case("gradient", full, "plain", "few", 90)).wgmma == 0
"""
