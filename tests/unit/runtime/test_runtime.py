"""Seeds are stable names, stop signals set a flag once, the watchdog ends a silent process, exit
codes pass through torchrun.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from sailplan.errors import EXIT_HANG
from sailplan.runtime import session as sessions
from sailplan.runtime.config import ParallelConfig
from sailplan.runtime.seeds import derive, generator
from sailplan.runtime.signals import STOP_SIGNALS, stop_flag
from sailplan.runtime.watch import beat, watching


def test_seeds_are_stable_and_parts_do_not_run_together() -> None:
    assert derive(0, "stage", 1) == derive(0, "stage", 1) == 8870527940734463394
    assert (
        len(
            {
                derive("1", 2),
                derive(1, 2),
                derive(12),
                derive("12"),
                derive("1", "2"),
                derive(1, "2"),
            }
        )
        == 6
    )
    assert generator(1, "a").integers(1 << 30) == generator(1, "a").integers(1 << 30)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_sets_the_flag_and_does_not_interrupt(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_flag() as flag:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert flag.name == number.name
    assert signal.getsignal(number) is before


def test_the_watchdog_leaves_a_working_process_alone() -> None:
    with stop_flag() as flag, watching(0.5, flag):
        for _ in range(8):
            time.sleep(0.1)
            beat()


def test_the_watchdog_ends_a_hung_process_with_its_own_code() -> None:
    code = (
        "import time\nfrom sailplan.runtime.signals import StopFlag\nfrom sailplan.runtime.watch "
        "import watching\n"
        "with watching(0.3, StopFlag()):\n    time.sleep(30)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == EXIT_HANG
    assert "no progress" in result.stderr and "time.sleep" not in result.stdout


@pytest.mark.parametrize("code", [0, 65, 75])
def test_a_ranks_exit_code_comes_out_of_torchrun(tmp_path, code: int) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        f"import os, sys, time\nsys.exit({code}) if os.environ['RANK'] == '1' or {code} in (0, 75) "
        "else time.sleep(60)\n"
    )
    command = [
        sys.executable,
        "-m",
        "sailplan.runtime.torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == code


@pytest.mark.parametrize(("limit", "threads"), [("1", 1), ("3", 2), ("", 2), ("0", 2), ("x", 2)])
def test_no_more_threads_are_asked_for_than_openmp_may_start(
    limit: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a limit of one, a run with two threads waited in its first step for ever."""
    seen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setenv("OMP_THREAD_LIMIT", limit)
    sessions._device(ParallelConfig(threads=2), world_size=1)
    assert seen == [threads]
