"""The Triton backend without a GPU: its arithmetic in the interpreter, in a process of its own
(see interpreter/), and a part of the ahead-of-time compilation; the whole table is `python -m
sailplan_kernels.aot`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sailplan_kernels import sass
from sailplan_kernels.triton_kernels.configurations import persistent_configuration

pytest.importorskip("triton")


# As if on other processors: the kernels that numpy's BLAS, numpy and torch choose there.
PROCESSORS = {
    "Haswell": {
        "OPENBLAS_CORETYPE": "Haswell",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "SkylakeX": {"OPENBLAS_CORETYPE": "SkylakeX"},
}


def interpreted(*checks: str, **environment: str) -> str:
    """What pytest says of files in interpreter/, in a process with Triton's interpreter."""
    folder = Path(__file__).parent / "interpreter"
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-p",
            "exact_interpreter",
            *(str(folder / name) for name in checks),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("processor", PROCESSORS)
def test_engine_in_the_interpreter(processor):
    if processor == "SkylakeX" and not torch.cpu._is_avx512_supported():
        pytest.skip(
            "this processor has no AVX-512: the interpreter's tests ran as on Haswell alone, not "
            "as on SkylakeX"
        )
    said = interpreted(
        "check_exact_interpreter.py", "check_triton_engine.py", **PROCESSORS[processor]
    )
    assert (
        f"openblas for {processor}" in said
    )  # else a library that does not know the variable passed as another


def test_a_refused_kernel_never_ends_a_run():
    interpreted("check_fallback.py")


def test_persistent_kernels_are_for_the_devices_they_were_compiled_for():
    wanted = torch.bfloat16, "symmetric", "ids"
    assert [persistent_configuration(*wanted, capability) for capability in (80, 86, 89, 120)] == [
        None
    ] * 4
    assert persistent_configuration(*wanted, 90) is not None
    assert persistent_configuration(*wanted, 100) == persistent_configuration(*wanted, 103)
    assert persistent_configuration(torch.float32, "symmetric", "ids", 90) is None


def test_instructions_are_counted_along_the_cheapest_way():
    """A program with a loop over tiles, in it one over prefixes, in it one of products and a
    branch around masks; and a loop that sums.
    """
    lines = [
        ("", "MOV R0, RZ"),
        ("", "IADD3 R1, R1, 1"),  # 0x10: the loop over tiles
        # 0x20 prefixes, 0x30 products
        ("", "FADD R2, R2, R3"),
        ("", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24"),
        ("@P0", "BRA 0x30"),
        # masks
        ("@P1", "BRA 0x90"),
        ("", "FSEL R2, R2, R3, P3"),
        ("", "FSEL R2, R2, R3, P3"),
        ("", "FSEL R2, R2, R3, P3"),
        ("", "MUFU.EX2 R2, R2"),
        ("@P2", "BRA 0x20"),  # 0x90
        *[("", "LDG.E R4, [R2.64]")] * 17,
        ("@!P3", "BRA 0xb0"),  # 0xb0 sums
        ("@P4", "BRA 0x10"),
        ("", "EXIT"),
        ("", "BRA 0x1f0"),
    ]
    text = "\n".join(
        f"        /*{16 * i:04x}*/  {guard} {line} ;   /* 0x0 */"
        for i, (guard, line) in enumerate(lines)
    )
    assert sass.count(text, pairs=1, levels=2) == (
        4 + 18,
        2,
    )  # FADD, BRA, MUFU, BRA and the sums; IADD3 and BRA
    assert sass.count(text.replace("HGMMA", "FFMA"), 1, 2) is None
    assert sass.share((20.0, 4.0), 90) == pytest.approx(0.75 / (0.75 + 0.5))


def compiling(*arguments: str) -> None:
    """Python with the interpreter off."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_kernels_compile_for_their_targets():
    """The widest of each kernel where spills come first, and what the judge says of a tile that
    spills.
    """
    compiling("-c", COMPILE)


def test_the_recipes_kernels_take_no_more_instructions_than_they_did():
    """Symmetric and rows alone, ids, several prefixes: what a pair costs beside its products,
    see sass.py. A compiler may be a little better or worse.
    """
    compiling("-c", COUNT)


def test_a_launch_compiles_what_was_judged():
    compiling(str(Path(__file__).parent / "interpreter" / "check_launches.py"))


COMPILE = """
import torch
from sailplan_kernels.aot import Case, compile_case
from sailplan_kernels.triton_kernels.configurations import Configuration

half, full = torch.bfloat16, torch.float32
for case in (
    Case("statistics", half, "plain", "ids", 90, cached=True),
    Case("rescale", half, "plain", "ids", 90),
    Case("gradient", full, "columns", "limits", 90),
    Case("gradient", half, "columns", "odd", 80),
    Case("gradient", half, "symmetric", "ids", 80),
    Case("sigmoid", half, "sigmoid moments", "ids", 90),
    Case("statistics", half, "plain", "ids", 90, True, "persistent"),
    Case("gradient", half, "columns", "limits", 90, False, "persistent"),
    Case("gradient", half, "symmetric", "ids", 100, False, "persistent"),
):
    verdict = compile_case(case)
    print(case, verdict)
    assert not verdict.reason, verdict.reason
    assert (case.schedule == "persistent") == bool(verdict.tma)
wide = compile_case(Case("gradient", half, "columns", "limits", 90), Configuration(128, 128, 64, 8, 8, 3))
assert "spills" in wide.reason, wide
assert compile_case(Case("gradient", full, "plain", "ids", 90)).wgmma == 0
"""

COUNT = """
import torch
from sailplan_kernels.aot import Case, compile_case

for kernel, kind, most in (
    ("statistics", "symmetric", 21),
    ("gradient", "symmetric", 33.5),
    ("statistics", "moments", 17),
    ("gradient", "moments", 31),
):
    case = Case(kernel, torch.bfloat16, kind, "ids", 90, False, "persistent")
    verdict = compile_case(case)
    print(case, verdict)
    assert not verdict.reason, verdict.reason
    assert verdict.a_prefix <= most, f"{kernel} {kind}: {verdict.a_prefix:.1f} instructions a pair and prefix, committed {most}"
"""
