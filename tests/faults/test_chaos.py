"""Kills at random moments change nothing: not a bit of what a run leaves behind."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from chaos import Chaos, outcome, unlike

KILLS = 4  # each costs 5 s of CPU; 20 are a job of their own in the checks: make chaos N=20


def test_a_run_that_was_killed_again_and_again_equals_the_undisturbed_one(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, ranks=2, seed=7)
    report = chaos.run(KILLS)
    assert report.different == [] and sum(report.kills.values()) == KILLS, report
    assert report.runs >= 1
    # What the comparison must not pass over.
    whole = outcome(tmp_path / "whole" / "job")
    name, tensors, scalars = whole["parameters and optimizer"]
    key = next(name for name in tensors if name.startswith("optimizer."))
    other = tensors | {key: tensors[key] + 1e-7}
    lines = [*whole["metrics"][:-1], whole["metrics"][-1] | {"loss/total": 0.0}]
    changed = whole | {
        "parameters and optimizer": (name, other, scalars),
        "metrics": lines,
        "quarantine": whole["quarantine"][1:],
    }
    parts = [line.partition(":")[0] for line in unlike(changed, whole)]
    assert sorted(parts) == ["metrics", "parameters and optimizer", "quarantine"], parts
