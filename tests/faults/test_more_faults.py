"""Faults of run folders, signals, limits and clocks that a cluster's daily life has: each ends in time,
with its code, and where it is said, in one line.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sailplan.cli.launched import Ended, launch
from sailplan.curriculum.testing import write_pack
from sailplan.data.datasets import open_datasets
from sailplan.train.run import train
from sailplan.train.testing import metrics

sys.path.insert(0, str(Path(__file__).parent))
from jobs import FAULTS, LIMIT, job, strike

Harm = Callable[[Path], object]
STEPS = list(range(1, 7))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("pack")
    open_datasets(write_pack(root), names=["things", "choices"])
    return root


@pytest.fixture(scope="module")
def stopped(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders with a run that was stopped after three steps."""
    runs: Path = tmp_path_factory.mktemp("stopped")
    ended = start(pack, runs, "preparing second", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert set(ended.codes) == {75}, ended.said
    return runs


def start(
    pack: Path,
    runs: Path,
    phase: str = "",
    fault: Callable[[], object] | None = None,
    **more: object,
) -> Ended:
    """Start the job; rank 1 does the fault when it enters the phase."""
    config = job(pack, runs, checkpoint__every_steps=1, **more)

    def work(rank: int) -> None:
        if rank == 1 and fault is not None:
            FAULTS["given"] = fault  # type: ignore[assignment]
            strike(phase, "given")
        train(config)

    return launch(work, 2, timeout=60)


def twice(kind: int) -> Callable[[], None]:
    def send() -> None:
        os.kill(os.getpid(), kind)
        time.sleep(0.3)
        os.kill(os.getpid(), kind)

    return send


def clock_jumps() -> None:
    former = time.time
    time.time = lambda: former() + 7200.0  # type: ignore[assignment]


def small_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


RUNNING: dict[str, tuple[str, Callable[[], object], int, str]] = {
    "a stop signal twice": ("step", twice(signal.SIGTERM), 75, "stop"),
    "an interrupt of one rank": ("step", lambda: os.kill(os.getpid(), signal.SIGINT), 75, "stop"),
    "the clock jumps by two hours": ("step", clock_jumps, 0, ""),
    "no file may grow (EFBIG)": ("saving", small_files, 1, "File too large"),
}


@pytest.mark.parametrize("name", RUNNING)
def test_a_fault_under_a_running_job(pack: Path, tmp_path: Path, name: str) -> None:
    phase, fault, code, words = RUNNING[name]
    ended = start(pack, tmp_path, phase, fault)
    told = [line for line in ended.said if words in line]
    assert set(ended.codes) == {code}, ended.said
    assert ended.seconds < LIMIT + 10 + 12 and (told or not words), ended.said
    assert not any("Traceback" in line for line in ended.said), ended.said


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 20)


FOUND: dict[str, tuple[Harm, int, str]] = {
    "running.json is binary": (
        lambda run: (run / "running.json").write_bytes(bytes(range(256))),
        0,
        "",
    ),
    "another host's record, no more written": (
        lambda run: (run / "running.json").write_text('{"host": "gone", "pid": 1}'),
        0,
        "",
    ),
    "the last line of metrics.jsonl is cut": (
        lambda run: cut(run / "metrics.jsonl"),
        0,
        "found 2 lines",
    ),
    "metrics.jsonl is gone": (lambda run: (run / "metrics.jsonl").unlink(), 0, "found 0 lines"),
    "a line of half a record after metrics.jsonl": (
        lambda run: (run / "metrics.jsonl").open("a").write('{"step": 4, "lo'),
        0,
        "",
    ),
    "foreign files among the checkpoints": (
        lambda run: [
            (run / "checkpoints" / "notes.txt").write_text("mine"),
            (run / "checkpoints" / "step-final").mkdir(),
            (run / "checkpoints" / "step-00000099").write_text("a file"),
        ],
        0,
        "",
    ),
    "a newer checkpoint of nobody": (
        lambda run: shutil.copytree(
            run / "checkpoints/step-00000003",
            run / "checkpoints/step-00000004",
            ignore=shutil.ignore_patterns("COMPLETE"),
        ),
        0,
        "",
    ),
    "config.yaml is gone": (lambda run: (run / "config.yaml").unlink(), 64, "config.yaml"),
    "quarantine.jsonl is binary": (
        lambda run: (run / "quarantine.jsonl").write_bytes(bytes(range(256))),
        64,
        "quarantine.jsonl",
    ),
    "checkpoints is a file": (
        lambda run: [shutil.rmtree(run / "checkpoints"), (run / "checkpoints").write_text("")],
        64,
        "checkpoints",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_run_folder_that_was_harmed(pack: Path, stopped: Path, tmp_path: Path, name: str) -> None:
    harm, code, words = FOUND[name]
    shutil.copytree(stopped, tmp_path / "runs")
    harm(tmp_path / "runs" / "job")
    ended = start(pack, tmp_path / "runs")
    # A rank that only lost the first one says so, and quotes it.
    told = [line for line in ended.said if words in line and "sailplan: left" not in line]
    assert set(ended.codes) == {code}, ended.said
    assert ended.seconds < 40 and (len(told) == 1 or not words), ended.said
    assert not any("Traceback" in line for line in ended.said), ended.said
    if code == 0:
        kept = int(words.split()[1]) if words else 3
        steps = [line["step"] for line in metrics(tmp_path / "runs" / "job")]
        assert steps == STEPS[:kept] + STEPS[3:]
