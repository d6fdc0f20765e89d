"""Every step's numbers to the run's loggers: files, console, trackers.

Which loggers there are is `loggers` of the configuration (`sailplan.observe.logger`). The line of a
step is written before anything else is done after it, so that no checkpoint is newer than the
records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch

from sailplan.config.schema import PatternKey
from sailplan.objective.backends import planned_backends
from sailplan.objective.protocol import Objective
from sailplan.observe.logger import Value
from sailplan.observe.metrics import StageInfo
from sailplan.train.callback import Callback, Run, StageRun, StepDone
from sailplan.train.schedule import spans


class Metrics(Callback):
    """Log loss, accuracy, rates, temperatures and seconds of each step, and the stages."""

    def running(self, run: Run) -> AbstractContextManager[object]:
        # A run that was done before has no stage to finish.
        run.writer.finished = run.step >= spans(run.config)[-1].last
        return nullcontext()

    def start_stage(self, run: Run, stage: StageRun) -> None:
        config, settings, span = run.config, stage.settings, stage.span
        used = {
            name: cast(Objective, run.bundle.objectives[name])
            for name, weight in settings.objectives.items()
            if weight
        }
        backends = planned_backends(
            used,
            config.step.backend,
            run.parallel.device,
            getattr(torch, config.parallel.dtype),
        )
        rates = (settings.optimizer.learning_rate, settings.optimizer.final_learning_rate)
        run.writer.start_stage(
            StageInfo(
                span.name,
                span.index + 1,
                len(config.order),
                span.first,
                span.last,
                stage.state.weights,
                settings.objectives,
                rates,
                backends,
            )
        )

    def values(self, run: Run, done: StepDone) -> Mapping[str, Value]:
        batches, result, seconds = done.batches, done.result, done.seconds
        rows = sum(sum(batch.rank_rows or (len(batch.record_ids),)) for batch in batches)
        values: dict[str, Value] = {
            "data/set": "+".join(batch.dataset for batch in batches),
            "data/digest": "+".join(dict.fromkeys(batch.digest for batch in batches)),
            "data/wait_seconds": round(done.waited, 4),
            "data/wait_share": round(done.waited / seconds, 4),
            "loss/total": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": done.learning_rate,
            "rows_per_second": rows / seconds,
            "seconds": round(seconds, 4),
        }
        values |= {f"loss/{name}": value for name, value in result.losses.items()}
        values |= {f"backend/{name}": backend for name, backend in result.backends.items()}
        values |= result.metrics
        values |= {f"seconds/{phase}": round(spent, 4) for phase, spent in result.seconds.items()}
        accuracies = [value for name, value in result.metrics.items() if name.endswith("/accuracy")]
        if accuracies:
            values["accuracy"] = sum(accuracies) / len(accuracies)
        if result.skipped:
            values["skipped"] = 1
        for batch in batches:
            keys = [PatternKey(batch.dataset, pattern) for pattern in batch.patterns]
            groups = [run.bundle.temperatures.group(key) for key in keys]
            values |= {f"temperature/{group}": result.temperatures[group] for group in groups}
        return values

    def after_step(self, run: Run, done: StepDone, flags: Sequence[bool]) -> None:
        run.writer.log_step(run.step, done.stage.span.name, done.values)

    def finish_stage(self, run: Run, stage: StageRun) -> None:
        run.writer.finish_stage()
