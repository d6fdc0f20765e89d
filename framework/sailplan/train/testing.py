"""Helpers for tests that use the `sailplan` command as a user does: real processes, a small job,
a time limit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from sailplan.config.fields import JsonObject

# Beginnings of values that depend on the clock, and on when a run was started again: no two runs
# have the same
MEASURED = (
    "time",
    "seconds",
    "rows_per_second",
    "data/wait_seconds",
    "data/wait_share",
    "tokens_per_second",
    "flop_per_",
    "mfu",
    "memory/",
    "phase/",
    "ranks/",
    "data/modality/",
    "alert/",
)

# The five stages of the quick start, a few small steps each.
SMALL = [
    "experiment=quickstart",
    "global_batch=32",
    "step.micro_batch=8",
    "step.kept_graphs=1",
    "optimizer.warmup_steps=1",
    "checkpoint.every_steps=2",
    "loggers.console.every=1",
    *(f"stages.{name}.steps=3" for name in ("diverse", "nearest", "hard", "seq2item", "id2item")),
    "stages.diverse.balance={sample: 48, clusters: 4}",
    "stages.nearest.subset.sets=[prompts]",
    "stages.hard.subset.sets=[prompts]",
    "stages.hard.hard_negatives.sample=256",
    "+stages.hard.hard_negatives.patterns.prompts=[speech_to_transcript]",
    "~stages.hard.hard_negatives.patterns.emoji",
    "~stages.hard.hard_negatives.patterns.icon_choices",
    "stages.nearest.data={prompts: 3, emoji: 1, icons: 0.001, icon_choices: 0.001}",
    "stages.hard.data={prompts: 3, emoji: 1, icon_choices: 0.001}",
    "stages.seq2item.data={icon_sequences: 3, emoji: 0.001, icon_choices: 0.001, prompts: 0.001}",
    "stages.id2item.data={icon_neighbours: 3, icon_sequences: 3, emoji: 0.001, icon_choices: 0.001, prompts: 0.001}",
    "stages.seq2item.global_batch=8",
    "stages.id2item.global_batch=8",
    "evaluation.benchmark=[speech_to_transcript]",
    *(
        f"~evaluation.tasks.{name}"
        for name in (
            "icon_choice",
            "set_completion",
            "emoji_subgroups",
            "emoji_keyword_to_image",
            "emoji_pair_order",
        )
    ),
]


def command(*arguments: str, ranks: int = 1) -> list[str]:
    """The command line of a user: `sailplan ARGUMENTS`, under torchrun for more than one rank."""
    if ranks == 1:
        return [sys.executable, "-m", "sailplan", *arguments]
    return [
        sys.executable,
        "-m",
        "sailplan.runtime.torchrun",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "sailplan",
        *arguments,
    ]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}


def run(
    *arguments: str, ranks: int = 1, timeout: float = 600, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end, in `folder` or here; never raises on a non-zero exit code."""
    return subprocess.run(
        command(*arguments, ranks=ranks),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        cwd=folder,
    )


def run_until(
    condition: Callable[[], bool],
    number: signal.Signals,
    *arguments: str,
    ranks: int,
    timeout: float = 600,
) -> int:
    """Start the command, sends a signal when `condition` holds (SIGKILL: to every process, else
    to the launcher); the exit code.
    """
    process = subprocess.Popen(
        command(*arguments, ranks=ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + timeout
    try:
        while not condition():
            if process.poll() is not None:
                raise AssertionError(
                    f"ended with {process.returncode} before it was to be "
                    f"stopped:\n{process.communicate()[0][-3000:]}"
                )
            if time.monotonic() > deadline:
                raise AssertionError(f"the awaited condition did not come within {timeout} s")
            time.sleep(0.02)
        if number == signal.SIGKILL:
            _kill_all(process)
        else:
            process.send_signal(number)
        process.communicate(timeout=timeout)
        return process.returncode
    finally:
        if process.poll() is None:
            _kill_all(process)


def _kill_all(process: subprocess.Popen[str]) -> None:
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        one.kill()


def metrics(folder: Path) -> list[JsonObject]:
    """The complete lines of a run's metrics.jsonl; [] before the first."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    return [
        json.loads(line)
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
