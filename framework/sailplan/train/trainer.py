"""The training loop: stages in order, steps in a stage, and at their edges checkpoint,
evaluation, mining and stop.

It names no loss, model or data set: those come from the configuration. The whole state between two
steps is the model, the optimizer and the step number; everything else (order of the data, random
draws, learning rates) is a function of these and of the configuration, and what a stage's start
computed lies in the run folder. A resumed run therefore continues with the very next sample and the
same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from sailplan.checkpoint.background import Saver
from sailplan.checkpoint.store import folder_of, load
from sailplan.config.compose import config_hash, identity
from sailplan.config.schema import Config, PatternKey
from sailplan.curriculum.stages import StageState, load_stage, prepare_stage, refresh_hard_negatives
from sailplan.data.loader import StepLoader
from sailplan.data.plan import Plan
from sailplan.data.record import StepBatch
from sailplan.data.shares import StepShares, stage_patterns
from sailplan.data.watch import PatternWatch
from sailplan.embed.context import RunContext
from sailplan.embed.exchange import training_exchange
from sailplan.errors import BadDataError, StopRequested
from sailplan.evaluate.runner import evaluate
from sailplan.objective.backends import planned_backends
from sailplan.observe.metrics import MetricWriter, StageInfo
from sailplan.runtime.process import Parallel
from sailplan.runtime.watch import beat, phase, stop_wanted
from sailplan.step.optimizer import build_optimizer, configure, set_learning_rate, set_trainable
from sailplan.step.schedules import learning_rate_scale
from sailplan.step.training_step import StepResult, TrainingStep
from sailplan.train.bundle import ModelBundle, check_data, open_agreed
from sailplan.train.run_folder import RunFolder
from sailplan.train.schedule import StageSpan, spans

WISHES = 3  # to stop, to save, to report bad samples


class Trainer:
    """Runs the stages of `config.order` from `self.step` (steps done so far) to the end.

    Raises StopRequested after saving, when a stop signal reached any rank; BadDataError and
    SailplanError as the loader and the step do, on all ranks' behalf: the launcher ends the others.
    """

    def __init__(
        self,
        config: Config,
        parallel: Parallel,
        folder: RunFolder,
        whole: ModelBundle,
        writer: MetricWriter,
    ) -> None:
        self.config, self.parallel, self.folder, self.whole, self.writer = (
            config,
            parallel,
            folder,
            whole,
            writer,
        )
        self.optimizer = build_optimizer(
            whole.encoder,
            whole.objectives,
            whole.temperatures,
            config.optimizer,
            config.allowed_targets,
        )
        self.training_step = TrainingStep(
            whole.encoder,
            whole.objectives,
            whole.temperatures,
            self.optimizer,
            config,
            parallel,
            training_exchange(parallel, config.parallel.exchange),
        )
        readers = open_agreed(config, parallel)
        check_data(config, readers)
        self.context = RunContext(config, parallel, whole.encoder, whole.objectives, readers)
        options = config.checkpoint
        self.saver = Saver(parallel, asynchronous=options.asynchronous, keep=options.keep)
        self.step = 0
        self._saved_at = time.monotonic()
        self._saved_step = -1

    # ---------------------------------------------------------------- state
    def resume(self, checkpoint: Any) -> None:
        """Load a checkpoint whose checksums the start has just compared (`newest_whole`)."""
        extra = load(
            checkpoint,
            model=self.whole.module,
            optimizer=self.optimizer,
            parallel=self.parallel,
            verified=True,
        )
        self.step = self._saved_step = int(extra["step"])

    def save(self, stage: str) -> None:
        if self._saved_step == self.step:
            return
        extra = {
            "step": self.step,
            "stage": stage,
            "identity": identity(self.config),
            "config_hash": config_hash(self.config),
        }
        self.saver.save(
            folder_of(self.folder.checkpoints, self.step),
            model=self.whole.module,
            optimizer=self.optimizer,
            extra=extra,
        )
        self._saved_at, self._saved_step = time.monotonic(), self.step

    # ---------------------------------------------------------------- loop
    def run(self) -> None:
        with self.saver:
            self.writer.finished = (
                self.step >= spans(self.config)[-1].last
            )  # a run that was done before has no stage to finish
            for span in spans(self.config):
                if self.step < span.last:
                    self._run_stage(span)
                elif self.step == span.last:
                    self._catch_up(span)
            self._settle()

    def _settle(self) -> None:
        """Until nothing is being saved any more."""
        with phase("waiting for the save"):
            self.saver.wait()

    def _stage_state(self, span: StageSpan) -> StageState:
        """What the stage's start computes from the model as it is then; read back when the stage
        is continued.
        """
        where = self.folder.curriculum(span.name)
        with phase(f"preparing {span.name}"):
            done = self.step + 1 - span.first
            if done > 0:
                return load_stage(self.config, self.context.readers, span.name, where, done)
            return prepare_stage(self.context, span.name, where)

    def _run_stage(self, span: StageSpan) -> None:
        stage, options = self.config.stages[span.name], self.config.stages[span.name].optimizer
        self._catch_up(span)
        state = self._stage_state(span)
        set_trainable(
            self.whole.encoder, self.whole.objectives, self.whole.temperatures, stage.trainable
        )
        configure(self.optimizer, options)
        plan = Plan(
            self.config, span.name, stage, state.weights, self.context.readers, state.subsets
        )
        used: dict[str, Any] = {
            name: self.whole.objectives[name] for name, weight in stage.objectives.items() if weight
        }
        backends = planned_backends(
            used,
            self.config.step.backend,
            self.parallel.device,
            getattr(torch, self.config.parallel.dtype),
        )
        self.writer.start_stage(
            StageInfo(
                span.name,
                span.index + 1,
                len(self.config.order),
                span.first,
                span.last,
                state.weights,
                stage.objectives,
                (options.learning_rate, options.final_learning_rate),
                backends,
            )
        )
        refresh = stage.hard_negatives.refresh_steps if stage.hard_negatives else 0
        while self.step < span.last:
            done = self.step + 1 - span.first
            if refresh and done and done % refresh == 0:
                with phase("mining"), self._kept(span):
                    state = refresh_hard_negatives(
                        self.context, span.name, self.folder.curriculum(span.name), state, done
                    )
            stop_at = min(span.steps, (done // refresh + 1) * refresh) if refresh else span.steps
            self._run_steps(span, plan, state, done, stop_at)
        self._finish_stage(span)

    def _run_steps(
        self, span: StageSpan, plan: Plan, state: StageState, first: int, last: int
    ) -> None:
        """Stage steps first .. last - 1 with one hard-negative store."""
        stage = self.config.stages[span.name]
        loader = StepLoader(
            plan,
            self.context.readers,
            self.config,
            stage,
            data_parallel_rank=self.parallel.data_parallel_rank,
            data_parallel_size=self.parallel.data_parallel_size,
            start_step=first,
            stop_step=last,
            negatives=state.negatives,
            teachers=state.teachers,
        )
        check_shares(self.parallel, loader.collator.shares, first, span.name)
        shown = {
            name: list(stage_patterns(stage, name, self.context.readers[name].config))
            for name in sorted(state.weights)
        }
        watch = PatternWatch(
            shown, self.config.data.sets, min(self.config.data.empty_steps, span.steps)
        )
        if self.config.data.workers:
            # Workers are forked: a lock that the saving thread holds would stay locked in them
            self._settle()
        with loader, self._quarantining(span):
            began = time.perf_counter()
            for stage_step, batches in enumerate(_awaited(loader), start=first):
                waited = time.perf_counter() - began
                scale = learning_rate_scale(stage.optimizer, stage_step, span.steps)
                set_learning_rate(self.optimizer, scale)
                result = self.training_step.run(
                    batches,
                    stage.objectives,
                    step=stage_step,
                    stage=span.name,
                    thresholds=state.thresholds,
                    clip_norm=stage.optimizer.clip_norm,
                    wishes=partial(self._wishes, batches, watch, stage_step),
                )
                self.step += 1
                beat(self.step)
                seconds = time.perf_counter() - began
                self._log(
                    span, batches, result, scale * stage.optimizer.learning_rate, waited, seconds
                )
                self._between_steps(span, batches, result)
                watch.note(batches, result.wishes[WISHES:])
                began = time.perf_counter()

    @contextmanager
    def _quarantining(self, span: StageSpan) -> Iterator[None]:
        """What made the data unusable is on record too when it ends the run; any rank may be the
        one that meets it.
        """
        try:
            yield
        except BadDataError as error:
            if self.parallel.tensor_parallel_rank == 0:
                self.folder.add_quarantined(
                    [
                        {"step": self.step + 1, "stage": span.name, "id": name, "reason": reason}
                        for name, reason in error.samples
                    ]
                )
            raise

    def _wishes(self, batches: list[StepBatch], watch: PatternWatch, step: int) -> list[bool]:
        """What the step's own message over the world asks: does anybody want to stop, to save,
        or to report bad samples? And what the
        rows showed."""
        clock = (
            self.parallel.is_main
            and time.monotonic() - self._saved_at > 60 * self.config.checkpoint.every_minutes
        )
        return [
            stop_wanted(),
            clock,
            any(batch.quarantined for batch in batches),
            *watch.flags(batches, step),
        ]

    def _between_steps(self, span: StageSpan, batches: list[StepBatch], result: StepResult) -> None:
        """Does what some rank wished for in the step.

        A stop signal that comes too late for the step's message is heard in the next.
        """
        stop, clock, quarantine = result.wishes[:WISHES]
        bad = [
            {"step": self.step, "stage": span.name, "id": name, "reason": reason}
            for batch in batches
            for name, reason in batch.quarantined
        ]
        bad += [
            {
                "step": self.step,
                "stage": span.name,
                "id": name,
                "reason": "loss or gradient not finite",
            }
            for name in result.suspects
        ]
        if quarantine or result.skipped:
            everyone: list[list[dict[str, Any]]] = [[] for _ in range(self.parallel.world_size)]
            dist.all_gather_object(everyone, bad if self.parallel.tensor_parallel_rank == 0 else [])
            if self.parallel.is_main:
                self.folder.add_quarantined([record for records in everyone for record in records])
        if self.step == span.last and not stop:
            return  # evaluated and saved by the stage's end
        every = self.config.checkpoint.every_steps
        if stop or clock or (every and self.step % every == 0):
            with phase("saving"):
                self.save(span.name)
        if stop:
            self._stop(span)
        if self._due(span):
            self._evaluate(span)

    def _stop(self, span: StageSpan) -> None:
        self._settle()
        raise StopRequested(
            f"stopped at step {self.step} (stage {span.name}), saved; go on with the same command "
            "and resume=auto"
        )

    @contextmanager
    def _kept(self, span: StageSpan) -> Iterator[None]:
        """A stop that all ranks obey between two batches keeps the steps before them."""
        try:
            yield
        except StopRequested:
            self.save(span.name)
            self._stop(span)

    def _finish_stage(self, span: StageSpan) -> None:
        with phase("saving"):
            self.save(span.name)  # first: an evaluation that fails must not cost the stage
        if self.parallel.agree(stop_wanted()):  # what follows may take long
            self._stop(span)
        if self._due(span):
            self._evaluate(span)
        self.writer.finish_stage()

    def _due(self, span: StageSpan) -> bool:
        """Whether the evaluation belongs behind the step that was just done."""
        options = self.config.evaluation
        if self.step == span.last:
            return bool(options.tasks) and (
                options.at_stage_end or span.index + 1 == len(self.config.order)
            )
        return (
            bool(options.tasks)
            and span.first <= self.step < span.last
            and options.every_steps > 0
            and self.step % options.every_steps == 0
        )

    def _catch_up(self, span: StageSpan) -> None:
        """The evaluation of the step that a resumed run goes on from, where a stop or a kill
        came between the save and it.
        """
        if self._due(span) and not self.parallel.agree(
            self.parallel.is_main and self.folder.evaluation(self.step).is_file()
        ):
            self._evaluate(span)

    def _evaluate(self, span: StageSpan) -> None:
        with phase("evaluation"), self._kept(span):
            found = evaluate(self.context)
        self.writer.log_evaluation(self.step, span.name, found.tasks, found.examples)

    def _log(
        self,
        span: StageSpan,
        batches: list[StepBatch],
        result: StepResult,
        learning_rate: float,
        waited: float,
        seconds: float,
    ) -> None:
        values: dict[str, Any] = {
            "data/set": "+".join(batch.dataset for batch in batches),
            "data/digest": "+".join(dict.fromkeys(batch.digest for batch in batches)),
            "data/wait_seconds": round(waited, 4),
            "data/wait_share": round(waited / seconds, 4),
            "loss/total": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": learning_rate,
            "rows_per_second": sum(
                sum(batch.rank_rows or (len(batch.record_ids),)) for batch in batches
            )
            / seconds,
            "seconds": round(seconds, 4),
        }
        values |= {f"loss/{name}": value for name, value in result.losses.items()}
        values |= {f"backend/{name}": backend for name, backend in result.backends.items()}
        values |= result.metrics
        values |= {f"seconds/{phase}": round(spent, 4) for phase, spent in result.seconds.items()}
        accuracies = [value for name, value in values.items() if name.endswith("/accuracy")]
        if accuracies:
            values["accuracy"] = sum(accuracies) / len(accuracies)
        if result.skipped:
            values["skipped"] = 1
        for batch in batches:
            keys = [PatternKey(batch.dataset, pattern) for pattern in batch.patterns]
            values |= {f"temperature/{key}": result.temperatures[key] for key in keys}
        self.writer.log_step(self.step, span.name, values)


def _awaited(loader: StepLoader) -> Iterator[list[StepBatch]]:
    """The loader's steps; the wait for each is the data's phase, in which a rank works by
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
    """Raises BadDataError on all ranks where some share out the rows of a stage's step
    differently: they would lose some rows
    and take others twice, without a word."""
    own = shares.fingerprint(step)
    if parallel.agree(own != parallel.broadcast_text(own)):
        raise BadDataError(
            f"stage {stage}: ranks share out the rows of its step {step + 1} in different ways, "
            "expected the same shards and tokenizer on all "
            "machines: compare them, delete the lengths-* files beside the shards' index, and "
            "start again"
        )
