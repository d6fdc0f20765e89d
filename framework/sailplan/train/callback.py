"""What may be done around the training loop: a callback, and the run that it is handed.

The loop itself knows stages, steps and a stop that all ranks obey. Checkpoints, evaluation, mining,
metrics, the quarantine of bad records and profiling are callbacks, and so may be whatever else a
project needs. `callbacks.NAME` of the configuration names a class by `_target_`, with the options
of its constructor; hooks are called in the order of that list.

Every rank makes the same callbacks and calls the same hooks at the same step, so a hook may be a
collective. What only one rank knows (its clock, its rows) becomes common knowledge through `flags`,
which travel with the message that each step makes anyway: no message of its own, no wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, is_dataclass

import torch

from sailplan.config.components import check_effects, validate
from sailplan.config.fields import JsonObject
from sailplan.config.schema import Config, StageConfig
from sailplan.config.targets import check_options, class_at
from sailplan.curriculum.stages import StageState
from sailplan.data.exclusions import Exclusions
from sailplan.data.plan import Plan
from sailplan.data.record import StepBatch
from sailplan.embed.context import RunContext
from sailplan.errors import ConfigurationError, StopRequested
from sailplan.observe.logger import Value
from sailplan.observe.metrics import MetricWriter
from sailplan.runtime.process import Parallel
from sailplan.runtime.watch import stop_wanted
from sailplan.step.training_step import StepResult
from sailplan.train.bundle import ModelBundle
from sailplan.train.run_folder import RunFolder
from sailplan.train.schedule import StageSpan


@dataclass
class StageRun:
    """A stage that is being trained."""

    span: StageSpan
    settings: StageConfig
    state: StageState  # what its start made: weights, subsets, mined negatives, teachers
    plan: Plan


@dataclass
class StepDone:
    """A step that has just been made; numbers are the full batch's, equal on all ranks.

    values: of the step's line in the records, which `Callback.values` fills. learning_rate: that
    the step used. waited, seconds: wall seconds for the data, and for the whole step. stopping: a
    rank was asked to stop, and all will after this step.
    """

    stage: StageRun
    batches: list[StepBatch]  # this rank's rows
    result: StepResult
    learning_rate: float
    waited: float
    seconds: float
    is_last: bool  # of its stage, whose end follows
    stopping: bool
    values: dict[str, Value] = field(default_factory=dict)


@dataclass
class Run:
    """A training run as callbacks see it.

    step: steps done so far. stage: the one that is being trained, None before the first.
    saved_step: of the newest checkpoint, -1 before there is one.
    """

    context: RunContext
    folder: RunFolder
    bundle: ModelBundle
    optimizer: torch.optim.Optimizer
    writer: MetricWriter
    callbacks: dict[str, Callback]
    step: int = 0
    saved_step: int = -1
    stage: StageRun | None = None
    stop_requested: bool = False
    exclusions: Exclusions = field(default_factory=Exclusions)  # records that are no longer drawn

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.context.config

    @property
    def parallel(self) -> Parallel:
        """This rank's place."""
        return self.context.parallel

    def request_stop(self) -> None:
        """Ask for a stop, as a signal does: after the next step, saved, on all ranks (exit code
        75).
        """
        self.stop_requested = True

    @property
    def stop_asked(self) -> bool:
        """Whether this rank knows of a signal or a callback that asks for a stop."""
        return self.stop_requested or stop_wanted()

    def stop_if_asked(self) -> None:
        """Stop where any rank was asked to: before work that may take long. A collective."""
        if self.parallel.agree(self.stop_asked):
            self.stop()

    def stop(self) -> None:
        """Keep what is done and raise StopRequested; all ranks call it at the same step."""
        for callback in self.callbacks.values():
            callback.interrupted(self)
        self.join()
        place = f" (stage {self.stage.span.name})" if self.stage is not None else ""
        kept = (
            "saved; go on with the same command and resume=auto"
            if self.saved_step == self.step
            else "not saved, as no callback saves"
        )
        raise StopRequested(f"stopped at step {self.step}{place}, {kept}")

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep the steps done so far when all ranks obey a stop inside the block, between two
        batches.
        """
        try:
            yield
        except StopRequested:
            self.stop()

    def join(self) -> None:
        """Return when no callback has work under way in a thread."""
        for callback in self.callbacks.values():
            callback.join(self)


class Callback:
    """Base of all callbacks; a hook that is not overridden does nothing.

    The constructor takes the options of its YAML by keyword. A dataclass may be one; the ranges and
    Literals of its annotations are then checked as those of any settings, before the run.
    """

    def running(self, run: Run) -> AbstractContextManager[object]:
        """Return a context manager that the whole training is inside of, errors included."""
        return nullcontext()

    def resumed(self, run: Run, span: StageSpan) -> None:
        """Go on from a checkpoint after step `run.step` of a stage: do what a kill came before."""

    def start_stage(self, run: Run, stage: StageRun) -> None:
        """Begin a stage, or continue it after a resume; its data are prepared."""

    def read_until(self, stage: StageRun, done: int) -> int:
        """Return the stage's step at which `before_reading` changes what is read.

        done: steps of the stage so far. The loader reads ahead, and no further than this.
        """
        return stage.span.steps

    def before_reading(self, run: Run, stage: StageRun, done: int) -> None:
        """Change what the following steps read, such as `stage.state`; the loader is not open."""

    def flags(self, run: Run, stage: StageRun, batches: Sequence[StepBatch]) -> Sequence[bool]:
        """Return what this rank wants all to know of the step under way; the same number of flags
        on all ranks.

        No collective: the step's own message carries them.
        """
        return ()

    def values(self, run: Run, done: StepDone) -> Mapping[str, Value]:
        """Return values for the step's line in the records; called on all callbacks before any
        `after_step`.
        """
        return {}

    def after_step(self, run: Run, done: StepDone, flags: Sequence[bool]) -> None:
        """Work after a step; flags: for each of this callback's, whether any rank had it.

        Leave what takes long where `done.stopping`.
        """

    def finish_stage(self, run: Run, stage: StageRun) -> None:
        """End a stage after its last step."""

    def interrupted(self, run: Run) -> None:
        """Keep what is done: all ranks stop after step `run.step`."""

    def join(self, run: Run) -> None:
        """Return when nothing is under way in a thread: processes are about to be forked, or the
        run stops.
        """

    def state(self) -> JsonObject:
        """Return what a resumed run must know of this callback; JSON values, rank 0's are saved."""
        return {}

    def load_state(self, state: JsonObject) -> None:
        """Take what `state` returned when the checkpoint was made."""


def build_callbacks(config: Config) -> dict[str, Callback]:
    """Return the callbacks of the configuration, in its order.

    Raises ConfigurationError for a target that is missing, not allowed or no Callback, for an option
    that it does not have or refuses, and for a setting that needs a callback which is not there.
    """
    made = {
        name: _build(f"callbacks.{name}", options, config.allowed_targets)
        for name, options in config.callbacks.items()
    }
    for name in config.order:
        mined = config.stages[name].hard_negatives
        if mined is None or not mined.refresh_steps:
            continue
        if all(type(one).read_until is Callback.read_until for one in made.values()):
            raise ConfigurationError(
                f"stages.{name}.hard_negatives.refresh_steps={mined.refresh_steps}: no callback "
                "mines again; add +callback=hard_negatives, or set it to 0"
            )
    return made


def _build(key: str, options: JsonObject, allowed: Sequence[str]) -> Callback:
    given = dict(options)
    target = given.pop("_target_", None)
    if not isinstance(target, str) or not target:
        raise ConfigurationError(
            f"{key}._target_: found {target!r}, expected a class, such as "
            "sailplan.train.callbacks.profiler.Profiler"
        )
    cls = class_at(f"{key}._target_", target, Callback, allowed)
    check_options(key, cls, given, ())
    try:
        made = cls(**given)
    except ConfigurationError as error:
        raise ConfigurationError(f"{key}.{error}") from error
    if is_dataclass(made):
        validate(made, key)
        check_effects(made, key)
    return made
