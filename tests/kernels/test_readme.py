"""The README of the kernels tells the truth: its example runs, its tables are what the programs
make, its files exist.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "kernels/README.md"
PATHS = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}


def python(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        env=PATHS,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs_and_prints_what_it_says():
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    said = re.search(r"print\(.*\)  # (.*)", example).group(1)
    assert python("-c", example).strip() == said


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the column of Triton needs triton"
)
def test_the_option_matrix_is_current(tmp_path):
    copy = tmp_path / "README.md"
    shutil.copy(README, copy)
    python("-m", "sailplan_kernels.options", "--write", copy)
    assert copy.read_text() == README.read_text(), (
        "run python -m sailplan_kernels.options --write kernels/README.md"
    )
    assert "WRONG" not in copy.read_text()


def test_the_measurements_are_the_results_file(tmp_path):
    copy = tmp_path / "README.md"
    shutil.copy(README, copy)
    python(
        ROOT / "benchmarks/kernels.py",
        "table",
        "--results",
        ROOT / "benchmarks/results/kernels_cpu.json",
        "--readme",
        copy,
    )
    assert copy.read_text() == README.read_text(), "run python benchmarks/kernels.py table"


def test_named_files_exist():
    for name in re.findall(r"`((?:benchmarks|tests|requirements)/[\w/.]+)`", README.read_text()):
        assert (ROOT / name).exists(), name
