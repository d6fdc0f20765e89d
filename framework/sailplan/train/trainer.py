"""The training loop: stages in order, steps in a stage, and the hooks of the run's callbacks around
them.

It names no loss, model or data set: those come from the configuration, and so do the callbacks,
which save, evaluate, mine again and log (`sailplan.train.callback`). The whole state between two
steps is the model, the optimizer and the step number; everything else (order of the data, random
draws, learning rates) is a function of these and of the configuration, and what a stage's start
computed lies in the run folder. A resumed run therefore continues with the very next sample and the
same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

from sailplan.checkpoint.loading import load
from sailplan.config.schema import Config
from sailplan.curriculum.stages import StageState, load_stage, prepare_stage
from sailplan.data.loader import StepLoader
from sailplan.data.plan import Plan
from sailplan.data.record import StepBatch
from sailplan.data.shares import StepShares
from sailplan.embed.context import RunContext
from sailplan.embed.exchange import training_exchange
from sailplan.errors import BadDataError
from sailplan.observe.metrics import MetricWriter
from sailplan.runtime.process import Parallel
from sailplan.runtime.watch import beat, phase
from sailplan.step.optimizer import build_optimizer, configure, set_learning_rate, set_trainable
from sailplan.step.schedules import learning_rate_scale
from sailplan.step.training_step import TrainingStep
from sailplan.train.bundle import ModelBundle, check_data, open_agreed
from sailplan.train.callback import Run, StageRun, StepDone, build_callbacks
from sailplan.train.run_folder import RunFolder
from sailplan.train.schedule import StageSpan, spans


class Trainer:
    """Runs the stages of `config.order` from `run.step` (steps done so far) to the end.

    Raises StopRequested after saving, when a stop signal reached any rank; BadDataError and
    SailplanError as the loader and the step do, on all ranks' behalf: the launcher ends the others.
    """

    def __init__(
        self,
        config: Config,
        parallel: Parallel,
        folder: RunFolder,
        bundle: ModelBundle,
        writer: MetricWriter,
    ) -> None:
        callbacks = build_callbacks(config)
        self.config, self.parallel, self.bundle = config, parallel, bundle
        self.optimizer = build_optimizer(
            bundle.encoder,
            bundle.objectives,
            bundle.temperatures,
            config.optimizer,
            config.allowed_targets,
        )
        self.training_step = TrainingStep(
            bundle.encoder,
            bundle.objectives,
            bundle.temperatures,
            self.optimizer,
            config,
            parallel,
            training_exchange(parallel, config.parallel.exchange),
        )
        readers = open_agreed(config, parallel)
        check_data(config, readers)
        context = RunContext(
            config, parallel, bundle.encoder, bundle.objectives, readers, folder.vectors
        )
        self.state = Run(context, folder, bundle, self.optimizer, writer, callbacks)

    def resume(self, checkpoint: Path) -> None:
        """Load a checkpoint whose checksums the start has just compared (`newest_whole`)."""
        run = self.state
        extra = load(
            checkpoint,
            model=self.bundle.module,
            optimizer=self.optimizer,
            parallel=self.parallel,
            verified=True,
        )
        run.step = run.saved_step = int(extra["step"])
        for name, state in extra.get("callbacks", {}).items():
            if name in run.callbacks:
                run.callbacks[name].load_state(state)

    # ---------------------------------------------------------------- loop
    def run(self) -> None:
        """Train what is left of all stages. Collective."""
        run = self.state
        with ExitStack() as stack:
            for callback in run.callbacks.values():
                stack.enter_context(callback.running(run))
            for span in spans(self.config):
                if span.first <= run.step <= span.last:
                    for callback in run.callbacks.values():
                        callback.resumed(run, span)
                if run.step < span.last:
                    self._run_stage(span)

    def _run_stage(self, span: StageSpan) -> None:
        run = self.state
        run.stage = stage = self._begin(span)
        for callback in run.callbacks.values():
            callback.start_stage(run, stage)
        while run.step < span.last:
            done = run.step + 1 - span.first
            for callback in run.callbacks.values():
                callback.before_reading(run, stage, done)
            until = [callback.read_until(stage, done) for callback in run.callbacks.values()]
            self._run_steps(stage, done, min([span.steps, *until]))
        run.stop_if_asked()
        for callback in run.callbacks.values():
            callback.finish_stage(run, stage)

    def _run_steps(self, stage: StageRun, first: int, until: int) -> None:
        """Make a stage's steps first .. until - 1, of one loader."""
        run, options, span = self.state, stage.settings.optimizer, stage.span
        with self._loader(stage, first, until) as loader:
            began = time.perf_counter()
            for stage_step, batches in enumerate(_awaited(loader), start=first):
                waited = time.perf_counter() - began
                scale = learning_rate_scale(options, stage_step, span.steps)
                set_learning_rate(self.optimizer, scale)
                result = self.training_step.run(
                    batches,
                    stage.settings.objectives,
                    step=stage_step,
                    stage=span.name,
                    thresholds=stage.state.thresholds,
                    clip_norm=options.clip_norm,
                    wishes=partial(self._flags, stage, batches),
                )
                run.step += 1
                beat(run.step)
                rate, seconds = scale * options.learning_rate, time.perf_counter() - began
                last, stop = run.step == span.last, result.wishes[0]
                done = StepDone(stage, batches, result, rate, waited, seconds, last, stop)
                self._after_step(done)
                began = time.perf_counter()

    def _flags(self, stage: StageRun, batches: list[StepBatch]) -> list[bool]:
        """Return what this rank wants all to know: whether to stop, and each callback's flags.

        A stop signal that comes too late for the step's message is heard in the next.
        """
        run = self.state
        found = [callback.flags(run, stage, batches) for callback in run.callbacks.values()]
        self._counts = [len(flags) for flags in found]
        return [run.stop_asked, *(flag for flags in found for flag in flags)]

    def _after_step(self, done: StepDone) -> None:
        run, agreed = self.state, iter(done.result.wishes[1:])
        for callback in run.callbacks.values():
            done.values |= callback.values(run, done)
        for callback, count in zip(run.callbacks.values(), self._counts, strict=True):
            callback.after_step(run, done, list(islice(agreed, count)))
        if done.stopping:
            run.stop()

    # ---------------------------------------------------------------- parts
    def _begin(self, span: StageSpan) -> StageRun:
        """Prepare a stage's data and set what it trains."""
        settings, bundle, readers = (
            self.config.stages[span.name],
            self.bundle,
            self.state.context.readers,
        )
        state = self._stage_state(span)
        set_trainable(bundle.encoder, bundle.objectives, bundle.temperatures, settings.trainable)
        configure(self.optimizer, settings.optimizer)
        plan = Plan(self.config, span.name, settings, state.weights, readers, state.subsets)
        return StageRun(span, settings, state, plan)

    def _stage_state(self, span: StageSpan) -> StageState:
        """Return what the stage's start computes from the model as it is then; read back when the
        stage is continued.
        """
        run = self.state
        where = run.folder.curriculum(span.name)
        with phase(f"preparing {span.name}"):
            done = run.step + 1 - span.first
            if done > 0:
                return load_stage(self.config, run.context.readers, span.name, where, done)
            if (
                run.context.config.data.workers
            ):  # they are forked: no other thread may hold a lock then
                run.join()
            return prepare_stage(run.context, span.name, where)

    def _loader(self, stage: StageRun, first: int, until: int) -> StepLoader:
        loader = StepLoader(
            stage.plan,
            self.state.context.readers,
            self.config,
            stage.settings,
            data_parallel_rank=self.parallel.data_parallel_rank,
            data_parallel_size=self.parallel.data_parallel_size,
            start_step=first,
            stop_step=until,
            negatives=stage.state.negatives,
            teachers=stage.state.teachers,
            exclusions=self.state.exclusions,
            first_step=stage.span.first,
        )
        check_shares(self.parallel, loader.collator.shares, first, stage.span.name)
        if self.config.data.workers:
            # Workers are forked: a lock that another thread holds would stay locked in them
            self.state.join()
        return loader


def _awaited(loader: StepLoader) -> Iterator[list[StepBatch]]:
    """Yield the loader's steps; the wait for each is the data's phase, in which a rank works by
    itself.
    """
    steps = iter(loader)
    while True:
        with phase("data", local=True):
            batches = next(steps, None)
        if batches is None:
            return
        with phase("step"):
            yield batches


def check_shares(parallel: Parallel, shares: StepShares, step: int, stage: str) -> None:
    """Raise BadDataError on all ranks where some share out the rows of a stage's step differently:
    they would lose some rows and take others twice, without a word.
    """
    local = shares.fingerprint(step)
    if parallel.agree(local != parallel.broadcast_text(local)):
        raise BadDataError(
            f"stage {stage}: ranks share out the rows of its step {step + 1} in different ways, "
            "expected the same shards and tokenizer on all "
            "machines: compare them, delete the lengths-* files beside the shards' index, and "
            "start again"
        )
