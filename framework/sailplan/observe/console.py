"""The run on a screen: one progress bar per stage on a terminal, one plain line every few steps
in a log file.

A table of the tasks' headline metrics follows each evaluation, and one over all stages ends the
run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from sailplan.observe.logger import Examples, Logger, Results, RunInfo, StageInfo, Value
from sailplan.observe.report_data import headline_metric
from sailplan.runtime.progress import duration


def number(value: Value | None, digits: int = 4) -> str:
    """A value for a narrow column; "-" when it is missing."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


class ConsoleLogger(Logger):
    """Print progress with `rich`. every: steps between plain lines. console: for tests."""

    def __init__(self, run: RunInfo, *, every: int = 10, console: Console | None = None) -> None:
        super().__init__(run)
        self.console = console or Console(
            soft_wrap=True, width=None if sys.stdout.isatty() else 120
        )
        self.every = max(1, every)
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.stage: StageInfo | None = None
        self.seconds_per_step: float | None = None
        self.last: tuple[int, float] | None = None  # step, monotonic time of the last call
        self.evaluations: list[tuple[str, Results]] = []
        self.begin = time.monotonic()

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def start_stage(self, stage: StageInfo) -> None:
        self.stage, self.last = stage, None
        steps = stage.last_step - stage.first_step + 1
        mixture = ", ".join(f"{name} {weight:.2f}" for name, weight in stage.data.items())
        self._say(
            f"stage {stage.index}/{stage.count} {stage.name}: steps "
            f"{stage.first_step}-{stage.last_step}" + (f"; {mixture}" if mixture else "")
        )
        if stage.backends:
            self._say(
                "losses: "
                + ", ".join(f"{name} {backend}" for name, backend in stage.backends.items())
            )
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeElapsedColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task(
                f"{stage.index}/{stage.count} {stage.name}", total=steps, text=""
            )
            self.progress.start()

    def _remaining(self, step: int) -> str:
        """Time left in the stage, from a moving average of the time between steps."""
        now = time.monotonic()
        if self.last is not None and step > self.last[0]:
            current = (now - self.last[1]) / (step - self.last[0])
            self.seconds_per_step = (
                current
                if self.seconds_per_step is None
                else 0.9 * self.seconds_per_step + 0.1 * current
            )
        self.last = (step, now)
        if self.seconds_per_step is None or self.stage is None:
            return "-"
        return duration(self.seconds_per_step * (self.stage.last_step - step))

    def log_step(self, step: int, stage: str, values: Mapping[str, Value]) -> None:
        remaining = self._remaining(step)
        if self.stage is None:
            return
        text = (
            f"loss {number(values.get('loss/total'))}  accuracy "
            f"{number(values.get('accuracy'), 3)}  "
            f"{number(values.get('rows_per_second'), 3)} rows/s  left {remaining}"
        )
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=step - self.stage.first_step + 1, text=text)
        elif step % self.every == 0 or step in (self.stage.first_step, self.stage.last_step):
            self._say(
                f"[{self.stage.index}/{self.stage.count} {stage}] step "
                f"{step}/{self.stage.last_step}  {text}"
            )

    def log_evaluation(self, step: int, stage: str, results: Results, examples: Examples) -> None:
        """One row a task: its headline metric and the change since the evaluation before; the
        files have all metrics.
        """
        table = Table("task", "metric", title=f"after {stage}, step {step}", title_justify="left")
        table.add_column("value", justify="right")
        table.add_column("change", justify="right")
        before = {task: metrics for _, known in self.evaluations for task, metrics in known.items()}
        for task, metrics in results.items():
            name = headline_metric(metrics)
            if name is not None:
                old = before.get(task, {}).get(name)
                table.add_row(
                    Text(task),
                    Text(name),
                    f"{metrics[name]:.4f}",
                    "" if old is None else f"{metrics[name] - old:+.4f}",
                )
        self.console.print(table)
        self.evaluations.append((stage, results))

    def _final_table(self) -> Table:
        """One row a task, one column a stage: the headline metric after each stage's last
        evaluation.
        """
        stages = dict(self.evaluations)
        table = Table("task", "metric", title="results after each stage", title_justify="left")
        for stage in stages:
            table.add_column(Text(stage), justify="right")
        for task in dict.fromkeys(task for results in stages.values() for task in results):
            name = headline_metric(
                next(results[task] for results in stages.values() if task in results)
            )
            values = [results.get(task, {}).get(name or "") for results in stages.values()]
            table.add_row(
                Text(task),
                Text(name or "-"),
                *("-" if value is None else f"{value:.4f}" for value in values),
            )
        return table

    def _stop_progress(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def finish_stage(self, stage: StageInfo) -> None:
        self._stop_progress()

    def close(self, finished: bool) -> None:
        self._stop_progress()
        if finished and len(self.evaluations) > 1:
            self.console.print(self._final_table())
        self._say(
            f"{'finished' if finished else 'stopped'} after "
            f"{duration(time.monotonic() - self.begin)}"
        )
