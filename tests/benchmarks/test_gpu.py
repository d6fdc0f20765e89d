"""Risks: a contender that hangs, dies or is killed takes the run or another's row with it, and a
run that was cut short begins again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import os, signal, sys, time
from pathlib import Path
import gpu, kernels

def hangs(q, k, case): time.sleep(1000)
def exits(q, k, case): os._exit(3)
def crashes(q, k, case): os.kill(os.getpid(), signal.SIGSEGV)
def killed_in_its_second_turn(q, k, case):
    if len(q) == case["rows"]:
        marker = Path(sys.argv[-1], "turns"); marker.open("a").write(".")
        if len(marker.read_text()) > 20: os.kill(os.getpid(), signal.SIGKILL)
    kernels.naive(q, k, case)
def raises(q, k, case): raise RuntimeError("no such kernel")
def kills_the_driver_once(q, k, case):
    marker = Path(sys.argv[-1], "killed")
    if not marker.exists():
        marker.touch(); os.kill(os.getppid(), signal.SIGKILL); time.sleep(1000)
    kernels.naive(q, k, case)

table = {f.__name__: (f, None, False) for f in (hangs, exits, crashes, killed_in_its_second_turn, raises)}
table["fine"] = kernels.CONTENDERS["infonce"]["naive torch"]
table["not there"] = (kernels.naive, "no_such_package", False)
kernels.ERROR_SIZE = 8
kernels.CONTENDERS["infonce"] = table
kernels.CONTENDERS["sigmoid"] = {"kills the driver once": (kills_the_driver_once, None, False)}
folder = sys.argv.pop()
sys.argv.append(folder)
sys.argv[1:] = ["--device", "cpu", "--quick", "--out", folder + "/gpu.json", "--parts", *sys.argv[1:-1], folder]
sys.exit(gpu.main(sys.argv[1:-1]))
"""


def run(folder: Path, *parts: str) -> int:
    path = os.pathsep.join(str(ROOT / name) for name in ("benchmarks", "framework", "kernels"))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, *parts, str(folder)]
    return subprocess.run(
        command, env=environment, timeout=300, stdout=subprocess.DEVNULL
    ).returncode


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        key.split("/", 2)[2]: row
        for key, row in json.loads((folder / "gpu.json").read_text())["rows"].items()
        if key.startswith("kernels/infonce")
    }


def test_a_lost_contender_costs_its_own_row_and_a_second_call_resumes(tmp_path: Path) -> None:
    assert (
        run(tmp_path, "kernels", "--limit", "10", "--only", "kernels/infonce", "kernels/sigmoid")
        == -9
    )  # the driver was killed, in its second workload
    first = rows(tmp_path)
    expected = {
        "hangs": "hung: no answer within 10 s, at gradient error",
        "exits": "died: exit code 3, at gradient error",
        "crashes": "died: signal 11 (SIGSEGV), at gradient error",
        "killed_in_its_second_turn": "died: signal 9 (SIGKILL), at a turn",
        "raises": "RuntimeError: no such kernel, at gradient error",
        "not there": "not installed: no_such_package",
    }
    assert {name: row.get("error") for name, row in first.items()} == expected | {"fine": None}
    assert (
        first["fine"]["median_seconds"] > 0
        and len(first["fine"]["seconds"]) == 2
        and first["fine"]["gradient_error"] < 1e-4
    )
    assert first["killed_in_its_second_turn"]["seconds"], "the turns before its end stay"

    assert (
        run(tmp_path, "kernels", "--limit", "10", "--only", "kernels/infonce", "kernels/sigmoid")
        == 0
    )
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert rows(tmp_path) == first, "rows that were there were run again"
    (last,) = (row for key, row in record["rows"].items() if key.endswith("/kills the driver once"))
    assert last["median_seconds"] > 0 and len(record["header"]["calls"]) == 2
    assert not list(tmp_path.glob("*.new"))


def test_the_other_parts_leave_rows(tmp_path: Path) -> None:
    """One row of each that a machine without a GPU can make; the option's gradients are compared
    with float64.
    """
    only = (
        "--limit",
        "100",
        "--only",
        "infonce/chunked/bfloat16/`symmetric`",
        "training/bfloat16/vision+audio",
        "split/matrix",
        "ours, chunked",
    )
    assert run(tmp_path, "correctness", "training", "split", *only) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    option = found["correctness/infonce/chunked/bfloat16/`symmetric`"]
    assert (
        option["comparisons"] == 4
        and not option["above_the_bar"]
        and 0 < option["worst"]["queries"] < 1e-2
    )
    training = found["training/bfloat16/vision+audio"]
    assert all(
        abs(x - 1) < 0.1
        for kept in (0, 1, -1)
        for x in training[f"of float32's, kept graphs {kept}"]
    )
    assert any("products" in row.get("by_kind", {}) for row in found.values()) and any(
        "flops" in row for row in found.values()
    )
