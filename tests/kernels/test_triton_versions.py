"""The kernels with every version of Triton that an installation brings: what the table chooses
for it compiles, and means the same.

`make test` installs the versions of requirements/triton-*.txt beside the environment's own; without
it those are skipped.
The environment's own version goes through the interpreter in test_triton.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sailplan_kernels.aot import cases
from sailplan_kernels.tiling.engines import make_engine, why_no_triton
from sailplan_kernels.triton_kernels import versions
from sailplan_kernels.triton_kernels.configurations import persistent_configuration

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
PINS = {
    file.stem: file.read_text().split("==")[1].strip()
    for file in sorted((ROOT / "requirements").glob("triton-*.txt"))
}


def python(name: str, *arguments: str, **environment: str) -> str:
    """What Python says with that version first on its path."""
    folder = Path(sys.prefix, name)
    own = PINS[name] == triton.__version__
    if not own and not (folder / "triton").is_dir():
        pytest.skip(
            f"triton {PINS[name]} is not installed, so nothing was tested with it: `make test` "
            f"installs requirements/{name}.txt"
        )
    path = os.pathsep.join(
        [*([] if own else [str(folder)]), str(Path(__file__).parent / "interpreter"), *sys.path]
    )
    known = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=600,
        env={**known, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_every_version_of_the_table_is_tested_and_no_other():
    assert (
        {versions.version_of(version) for version in PINS.values()}
        == set(versions.SCHEDULES)
        >= {(3, 6), (3, 7)}
    )
    assert all(
        name == "triton-{}.{}".format(*versions.version_of(version))
        for name, version in PINS.items()
    )


def test_what_is_chosen_for_versions_that_nobody_tested(monkeypatch):
    assert versions.version_of("3.7.0+git1b2c3d4") == (3, 7)
    assert (
        versions.schedules((4, 0))
        == versions.schedules((3, 99))
        == versions.SCHEDULES[max(versions.SCHEDULES)]
    )
    assert (
        versions.why_not((3, 6)) is None
        and versions.schedules((3, 5)) == versions.schedules((2, 9)) == ()
    )
    monkeypatch.setattr(versions, "installed", lambda: (3, 5))
    words = "triton 3.5 is older than 3.6, the first that the kernels were compiled with"
    assert why_no_triton(torch.device("cuda"), torch.bfloat16) == words
    monkeypatch.setattr(versions, "installed", lambda: (3, 7))
    assert why_no_triton(torch.device("cuda"), torch.bfloat16) is None


def test_a_tile_that_a_version_spills_is_another_one_there(monkeypatch):
    widths = {}
    for version in ((3, 6), (3, 7), (3, 8)):
        monkeypatch.setattr(versions, "installed", lambda version=version: version)
        widths[version] = [
            persistent_configuration(torch.bfloat16, "plain", "ids", capability).BN
            for capability in (90, 100, 103)
        ]
    assert widths == {(3, 6): [128, 64, 64], (3, 7): [128, 32, 32], (3, 8): [128, 32, 32]}


def test_a_version_without_persistent_programs_begins_with_tiles(monkeypatch):
    assert [getattr(engine, "schedule", None) for engine in make_engine("triton").engines] == [
        "auto",
        "tiles",
        None,
    ]
    monkeypatch.setitem(versions.SCHEDULES, versions.installed(), ("tiles",))
    assert [getattr(engine, "schedule", None) for engine in make_engine("triton").engines] == [
        "tiles",
        None,
    ]
    assert {case.schedule for case in cases([90])} == {"tiles"}


@pytest.mark.parametrize(
    "name", [name for name, version in PINS.items() if version != triton.__version__]
)
def test_the_engine_in_the_interpreter(name):
    checks = [
        str(Path(__file__).parent / "interpreter" / file)
        for file in ("check_exact_interpreter.py", "check_triton_engine.py")
    ]
    said = python(
        name,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "exact_interpreter",
        *checks,
    )
    assert f"triton {PINS[name]}" in said


@pytest.mark.parametrize("name", PINS)
def test_what_the_version_chooses_compiles(name):
    said = python(name, str(Path(__file__).parent / "interpreter" / "check_compiles.py"))
    assert f"triton {PINS[name]}" in said and "REJECT" not in said
