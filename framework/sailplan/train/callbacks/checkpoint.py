"""Checkpoints: by steps, by the clock, at a stage's end and at a stop, as `checkpoint` says.

The clock is rank 0's alone; it travels as a flag of the step, so that all ranks save at the same
one. A stage's end is saved before its evaluation, which may fail or take long.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sailplan.checkpoint.background import Saver
from sailplan.checkpoint.store import folder_of
from sailplan.config.compose import config_hash, identity
from sailplan.data.record import StepBatch
from sailplan.runtime.watch import phase
from sailplan.train.callback import Callback, Run, StageRun, StepDone


class Checkpoint(Callback):
    """Save model, optimizer, step and the callbacks' own state below runs/NAME/checkpoints."""

    def __init__(self) -> None:
        self._saver: Saver | None = None
        self._saved_at = time.monotonic()

    @contextmanager
    def running(self, run: Run) -> Iterator[None]:
        options = run.config.checkpoint
        with Saver(run.parallel, asynchronous=options.asynchronous, keep=options.keep) as saver:
            self._saver, self._saved_at = saver, time.monotonic()
            yield
            self.join(run)

    def flags(self, run: Run, stage: StageRun, batches: Sequence[StepBatch]) -> Sequence[bool]:
        minutes = (time.monotonic() - self._saved_at) / 60
        return (run.parallel.is_main and minutes > run.config.checkpoint.every_minutes,)

    def after_step(self, run: Run, done: StepDone, flags: Sequence[bool]) -> None:
        every = run.config.checkpoint.every_steps
        due = flags[0] or (every and run.step % every == 0)
        if due and not done.is_last:  # a stage's end is saved in any case
            self.save(run)

    def finish_stage(self, run: Run, stage: StageRun) -> None:
        self.save(run)

    def interrupted(self, run: Run) -> None:
        if run.stage is not None:
            self.save(run)

    def join(self, run: Run) -> None:
        assert self._saver is not None
        with phase("waiting for the save"):
            self._saver.wait()

    def save(self, run: Run) -> None:
        """Save the state after `run.step`, unless it is saved already. Collective."""
        assert self._saver is not None and run.stage is not None
        if run.saved_step == run.step:
            return
        extra = {
            "step": run.step,
            "stage": run.stage.span.name,
            "identity": identity(run.config),
            "config_hash": config_hash(run.config),
            "callbacks": {
                name: state for name, one in run.callbacks.items() if (state := one.state())
            },
        }
        with phase("saving"):
            self._saver.save(
                folder_of(run.folder.checkpoints, run.step),
                model=run.bundle.module,
                optimizer=run.optimizer,
                extra=extra,
            )
        self._saved_at, run.saved_step = time.monotonic(), run.step
