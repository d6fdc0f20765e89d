"""Checkpoints: by steps, by the clock, at a stage's end and at a stop, as `checkpoint` says.

The clock is rank 0's alone; it travels as a flag of the step, so that all ranks save at the same
one. A stage's end is saved before its evaluation, which may fail or take long. A save that fails
(a full disk) is said, and tried again at the next one's time; only that of a stop and that of the
run's end must succeed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sailplan.checkpoint.background import Saver
from sailplan.checkpoint.store import folder_of
from sailplan.config.compose import config_hash, identity
from sailplan.data.record import StepBatch
from sailplan.errors import SailplanError
from sailplan.runtime.leaving import is_lost_peer, say
from sailplan.runtime.watch import phase
from sailplan.train.callback import Callback, Run, StageRun, StepDone
from sailplan.train.places import Places


class Checkpoint(Callback):
    """Save model, optimizer, step and the callbacks' own state below runs/NAME/checkpoints."""

    def __init__(self) -> None:
        self._saver: Saver | None = None
        self._folder = Path()
        self._saved_at = time.monotonic()
        self._whole = -1  # step of the newest checkpoint that is known to be written

    @contextmanager
    def running(self, run: Run) -> Iterator[None]:
        options, places = run.config.checkpoint, Places(run.config, run.folder)
        with Saver(
            run.parallel,
            asynchronous=options.asynchronous,
            keep=options.keep,
            keep_every=options.keep_every,
            copies=places.copies,
            own_folders=places.own,
        ) as saver:
            self._folder = places.folder
            self._saver, self._saved_at, self._whole = saver, time.monotonic(), run.saved_step
            yield
            self._wait(must=True, run=run)

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
            self.save(run, must=True)

    def join(self, run: Run) -> None:
        self._wait(run)

    def save(self, run: Run, *, must: bool = False) -> None:
        """Save the state after `run.step`, unless it is saved already. Collective.

        must: return when it is written, raise SailplanError where it cannot be.
        """
        assert self._saver is not None and run.stage is not None
        if must:  # whether the one under way, which may be this step's, is written
            self._wait(run)
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
        self._wait(run)
        self._saved_at = time.monotonic()
        with phase("saving"), self._surviving(run, must):
            self._saver.save(
                folder_of(self._folder, run.step),
                model=run.bundle.module,
                optimizer=run.optimizer,
                extra=extra,
            )
            run.saved_step = run.step
        if must:
            self._wait(run, must=True)

    def _wait(self, run: Run, *, must: bool = False) -> None:
        assert self._saver is not None
        with phase("waiting for the save"), self._surviving(run, must):
            self._saver.wait()
            self._whole = run.saved_step

    @contextmanager
    def _surviving(self, run: Run, must: bool) -> Iterator[None]:
        """Go on where a save failed, which all ranks know of, unless it must not."""
        try:
            yield
        except SailplanError as error:
            run.saved_step = self._whole
            if must or is_lost_peer(error.__cause__ or error):
                raise
            if run.parallel.is_main:
                newest = f"step {self._whole}" if self._whole >= 0 else "none"
                say(f"{error}; training goes on, the newest whole checkpoint is {newest}")
