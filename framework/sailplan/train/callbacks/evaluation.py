"""The run's evaluation tasks: every so many steps and at stages' ends, as `evaluation` says."""

from __future__ import annotations

from collections.abc import Sequence

from sailplan.evaluate.runner import evaluate
from sailplan.runtime.watch import phase
from sailplan.train.callback import Callback, Run, StageRun, StepDone
from sailplan.train.schedule import StageSpan


class Evaluation(Callback):
    """Evaluate all tasks and log their numbers; the run's last step is always evaluated, the model
    before the first with `evaluation.at_start`.
    """

    def resumed(self, run: Run, span: StageSpan) -> None:
        """Evaluate the step that the run goes on from, where a stop or a kill came between the
        save and its evaluation.
        """
        if self.due(run, span) and not run.parallel.agree(
            run.parallel.is_main and run.folder.evaluation(run.step).is_file()
        ):
            self._evaluate(run, span)

    def start_stage(self, run: Run, stage: StageRun) -> None:
        options = run.config.evaluation
        if run.step == 0 and options.at_start and options.tasks:
            self._evaluate(run, stage.span)

    def after_step(self, run: Run, done: StepDone, flags: Sequence[bool]) -> None:
        if not (done.stopping or done.is_last) and self.due(run, done.stage.span):
            self._evaluate(run, done.stage.span)

    def finish_stage(self, run: Run, stage: StageRun) -> None:
        run.stop_if_asked()  # what follows may take long
        if self.due(run, stage.span):
            self._evaluate(run, stage.span)

    def due(self, run: Run, span: StageSpan) -> bool:
        """Return whether an evaluation belongs after the step that was just done."""
        options, is_last_stage = run.config.evaluation, span.index + 1 == len(run.config.order)
        if not options.tasks:
            return False
        if run.step == span.last:
            return options.at_stage_end or is_last_stage
        return options.every_steps > 0 and run.step % options.every_steps == 0

    def _evaluate(self, run: Run, span: StageSpan) -> None:
        if run.context.config.data.workers:  # they are forked: no other thread may hold a lock then
            run.join()
        with phase("evaluation"), run.keeping():
            found = evaluate(run.context)
        run.writer.log_evaluation(run.step, span.name, found.tasks, found.examples)
