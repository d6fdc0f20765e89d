"""The one object through which a run is watched: values go in, every sink gets them.

Rank 0 writes files, console and Weights & Biases; on all other ranks the list of sinks is empty, so the training loop
calls the same methods everywhere and never asks for its rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from sailplan.config.schema import TrackingConfig
from sailplan.observe.console import ConsoleSink
from sailplan.observe.run_files import RunFiles
from sailplan.observe.sink import Examples, Results, Sink, StageInfo, Value
from sailplan.observe.wandb_sink import WandbSink

__all__ = ["MetricWriter", "StageInfo"]


class MetricWriter:
    """Fans metrics out to the run folder, the console and Weights & Biases; does nothing on ranks other than 0.

    folder: runs/NAME. resumed_step: the checkpoint's step when a run is continued (records of later steps are dropped),
    None for a fresh start. settings: the resolved configuration, shown by Weights & Biases. console: for tests.
    Usable as a context manager, so that the terminal is restored on any exit.
    """

    def __init__(
        self,
        folder: str | Path,
        tracking: TrackingConfig,
        rank: int,
        *,
        resumed_step: int | None = None,
        settings: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ) -> None:
        self.stage: StageInfo | None = None
        self.finished = False
        self.sinks: list[Sink] = []
        if rank != 0:
            return
        folder = Path(folder)
        self.sinks.append(RunFiles(folder, resumed_step))
        self.sinks.append(ConsoleSink(tracking.log_every, console))
        if tracking.wandb != "disabled":
            self.sinks.append(WandbSink(folder, tracking, settings or {}))

    def start_stage(self, stage: StageInfo) -> None:
        """A stage begins or is continued."""
        self.stage = stage
        for sink in self.sinks:
            sink.start_stage(stage)

    def log_step(self, step: int, stage: str, values: Mapping[str, Value]) -> None:
        """Values of step `step` (counted from 1): "loss/total", "accuracy", "rows_per_second", "data/set" ..."""
        for sink in self.sinks:
            sink.log_step(step, stage, values)

    def log_evaluation(self, step: int, stage: str, results: Results, examples: Examples | None = None) -> None:
        """All tasks' results after step `step`; `examples` are nearest neighbours for the report."""
        for sink in self.sinks:
            sink.log_evaluation(step, stage, results, examples or {})

    def finish_stage(self) -> None:
        """The current stage's last step is done."""
        if self.stage is not None:
            for sink in self.sinks:
                sink.finish_stage(self.stage)
            self.finished = self.stage.index == self.stage.count
            self.stage = None

    def close(self) -> None:
        """Flushes and ends all sinks; safe to call twice."""
        for sink in self.sinks:
            sink.close(self.finished)
        self.sinks = []

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
