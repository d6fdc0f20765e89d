"""The wheels alone train: installed in an environment that knows nothing of this repository,
started in an empty folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def call(*line: str | Path, folder: Path, **environment: str) -> str:
    """Return what a command prints, outside any environment of this test run; fail with its
    errors.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "SAILPLAN_CONF", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        [str(part) for part in line],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the wheels of the framework and its kernels, built from copies, as building leaves
    files beside the sources.
    """
    folder = tmp_path_factory.mktemp("wheels")
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in files.stdout.decode().split("\0"):
        source = ROOT / name
        if (
            name.startswith(("framework/", "kernels/", "pyproject.toml", "README.md", "LICENSE"))
            and source.is_file()
        ):
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "copy" / name).write_bytes(source.read_bytes())
    copy = folder / "copy"
    call(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        copy,
        copy / "kernels",
        folder=folder,
    )
    return sorted(folder.glob("*.whl"))


def test_the_wheels_hold_the_configuration_and_no_tests_or_builders(wheels: list[Path]) -> None:
    names = {name for wheel in wheels for name in zipfile.ZipFile(wheel).namelist()}
    ours = {
        str(path.relative_to(ROOT / "framework"))
        for path in (ROOT / "framework" / "sailplan" / "conf").rglob("*.yaml")
    }
    assert ours and ours <= names
    assert "sailplan/py.typed" in names and any(
        name.startswith("sailplan_kernels/") for name in names
    )
    assert not {name for name in names if name.startswith(("tests/", "tools/", "quickstart_data"))}


def test_they_train_in_an_empty_environment_and_folder(wheels: list[Path], tmp_path: Path) -> None:
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    call(sys.executable, "-m", "venv", "--without-pip", environment, folder=empty)
    python = environment / "bin" / "python"
    call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        *wheels,
        folder=empty,
    )
    # What the pins install, without this repository's own packages, which stand there as links that
    # a path entry does not follow.
    [site] = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = call(
        python,
        "-c",
        "import sailplan, sailplan_kernels; print(sailplan.__file__, sailplan_kernels.__file__)",
        folder=empty,
    )
    assert where.count(str(environment)) == 2, where

    command = environment / "bin" / "sailplan"
    assert "experiment=quickstart" in call(command, "list", folder=empty)
    settings = [
        "order=[diverse]",
        "stages.diverse.steps=2",
        "stages.diverse.balance=null",
        "evaluation=none",
        "logger=[console]",
    ]
    data = f"data.root={ROOT / 'data' / 'quickstart'}"
    call(
        command,
        "train",
        "experiment=quickstart",
        data,
        "global_batch=32",
        "step.micro_batch=16",
        *settings,
        folder=empty,
        OMP_NUM_THREADS="1",
    )
    lines = [
        json.loads(line)
        for line in (empty / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 2 and (empty / "runs" / "quickstart" / "report.html").is_file()
