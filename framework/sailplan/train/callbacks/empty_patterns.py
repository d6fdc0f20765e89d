"""Patterns that train on nothing end the run, instead of a flat loss days later."""

from __future__ import annotations

from collections.abc import Sequence

from sailplan.data.record import StepBatch
from sailplan.data.shares import stage_patterns
from sailplan.data.watch import PatternWatch
from sailplan.train.callback import Callback, Run, StageRun, StepDone


class EmptyPatterns(Callback):
    """Raise BadDataError for a pattern without a pair, or without a negative, in
    `data.empty_steps` steps in a row.
    """

    def __init__(self) -> None:
        self._watch: PatternWatch | None = None

    def start_stage(self, run: Run, stage: StageRun) -> None:
        readers, data = run.context.readers, run.config.data
        patterns = {
            name: list(stage_patterns(stage.settings, name, readers[name].config))
            for name in sorted(stage.state.weights)
        }
        limit = min(data.empty_steps, stage.span.steps)
        self._watch = PatternWatch(patterns, data.sets, limit)

    def flags(self, run: Run, stage: StageRun, batches: Sequence[StepBatch]) -> Sequence[bool]:
        assert self._watch is not None
        return self._watch.flags(batches, run.step - stage.span.first + 1)

    def after_step(self, run: Run, done: StepDone, flags: Sequence[bool]) -> None:
        assert self._watch is not None
        if not done.stopping:
            self._watch.note(done.batches, flags)
