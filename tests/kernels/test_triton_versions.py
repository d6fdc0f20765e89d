"""The kernels with every version of Triton that an installation brings: what the table chooses for it compiles, and means the same.

`make test` installs the versions of requirements/triton-*.txt beside the environment's own; without it those are skipped.
The environment's own version goes through the interpreter in test_triton.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
PINS = {file.stem: file.read_text().split("==")[1].strip() for file in sorted((ROOT / "requirements").glob("triton-*.txt"))}


def python(name: str, *arguments: str, **environment: str) -> str:
    """What Python says with that version first on its path."""
    folder = Path(sys.prefix, name)
    own = PINS[name] == triton.__version__
    if not own and not (folder / "triton").is_dir():
        pytest.skip(f"triton {PINS[name]} is not installed, so nothing was tested with it: `make test` installs requirements/{name}.txt")
    path = os.pathsep.join([*([] if own else [str(folder)]), str(Path(__file__).parent / "interpreter"), *sys.path])
    known = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=600,
        env={**known, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_there_are_versions_to_test():
    assert PINS["triton-3.6"] == "3.6.0" and PINS["triton-3.7"] == "3.7.1"


@pytest.mark.parametrize("name", [name for name, version in PINS.items() if version != triton.__version__])
def test_the_engine_in_the_interpreter(name):
    checks = [str(Path(__file__).parent / "interpreter" / file) for file in ("check_exact_interpreter.py", "check_triton_engine.py")]
    said = python(name, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "exact_interpreter", *checks)
    assert f"triton {PINS[name]}" in said


@pytest.mark.parametrize("name", PINS)
def test_what_the_version_chooses_compiles(name):
    said = python(name, str(Path(__file__).parent / "interpreter" / "check_compiles.py"))
    assert f"triton {PINS[name]}" in said and "REJECT" not in said
