"""A small training job with every phase, and faults that strike a rank when it enters one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sailplan.config.compose import compose
from sailplan.config.schema import Config, HardNegativeConfig, StageConfig
from sailplan.curriculum.testing import pack_config
from sailplan.errors import BadDataError
from sailplan.runtime.watch import Watch
from sailplan.step.config import StageOptimizerConfig

LIMIT = 6.0  # a busy machine takes seconds from one beat to the next


def job(pack: Path, runs: Path, **changes: Any) -> Config:
    """Two stages of three steps with mining, evaluation and saves, over `write_pack`'s data
    sets.
    """
    config = pack_config(pack)
    config.runs, config.name, config.resume, config.global_batch = str(runs), "job", "auto", 8
    config.data.sets = {name: config.data.sets[name] for name in ("things", "choices")}
    config.evaluation.tasks = {name: config.evaluation.tasks[name] for name in ("names", "choice")}
    config.evaluation.benchmark = []
    config.evaluation.at_stage_end = True
    config.objectives = {"infonce": {"_target_": compose([]).objectives["infonce"]["_target_"]}}
    mined = HardNegativeConfig(per_query=1, patterns={"things": ["image_to_name"]})
    common: dict[str, Any] = {
        "steps": 3,
        "data": {"things": 1.0},
        "objectives": {"infonce": 1.0},
        "optimizer": StageOptimizerConfig(warmup_steps=1),
    }
    config.order, config.stages = (
        ["first", "second"],
        {"first": StageConfig(**common), "second": StageConfig(**common, hard_negatives=mined)},
    )
    config.loggers, config.step.micro_batch = {}, 4
    config.parallel.timeout_seconds, config.parallel.threads = LIMIT, 1
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        setattr(getattr(config, part) if part else config, name, value)
    return config


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _sleep() -> None:
    time.sleep(1000)


def _bad_data() -> None:
    raise BadDataError("shard things-00.tar: made up damage")


def _bug() -> None:
    raise ZeroDivisionError("made up")


def _signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


FAULTS: dict[str, Callable[[], None]] = {
    "stop": _stop,
    "kill": _kill,
    "sleep": _sleep,
    "bad data": _bad_data,
    "bug": _bug,
    "signal": _signal,
}


def strike(phase: str, fault: str, turn: int = 1) -> None:
    """From now on, do the fault when this process enters a phase of that name for the `turn`-th
    time.
    """
    former, seen = Watch.phase, [0]

    @contextmanager
    def entered(self: Watch, name: str, local: bool = False) -> Iterator[None]:
        with former(self, name, local):
            if name == phase:
                seen[0] += 1
                if seen[0] == turn:
                    FAULTS[fault]()
            yield

    Watch.phase = entered  # type: ignore[method-assign]
