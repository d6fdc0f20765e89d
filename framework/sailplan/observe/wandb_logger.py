"""Weights & Biases as one more reader of the run: offline by default, and never a reason to stop
training.

The run's id follows from its name, so a resumed run continues the same charts. Everything it writes
lies in the run folder. `MetricWriter` leaves it out from its first failure on.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from sailplan.config.fields import JsonObject
from sailplan.errors import ConfigurationError
from sailplan.observe.logger import Examples, Logger, Results, RunInfo, StageInfo, Value
from sailplan.observe.run_files import METRICS, read_lines
from sailplan.observe.wandb_offline import kept_steps

if TYPE_CHECKING:
    from wandb import Run, Table


def run_id(project: str, name: str) -> str:
    """The tracker's id of a run: readable name plus a short hash of project and name; stable
    over restarts.
    """
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:40] or "run"
    return f"{readable}-{hashlib.sha256(f'{project}/{name}'.encode()).hexdigest()[:8]}"


class WandbLogger(Logger):
    """Log to the run `run_id(project, folder name)`. mode: offline or online.

    every: steps between values. tags, group, notes: of the run, as the tracker shows and sorts it.
    alerts: whether `log_alert` is passed on.

    Charts: every value over the global step; losses and accuracy once more per stage over the
    stage's own step (each name is given its axis by itself: of patterns that overlap the tracker
    takes any); `progress/*`; `evaluation/TASK/METRIC`; tables of the stages' data-set and
    objective weights and of the results.
    """

    def __init__(
        self,
        run: RunInfo,
        *,
        mode: Literal["offline", "online"] = "offline",
        project: str = "sailplan",
        every: int = 10,
        tags: list[str] | None = None,
        group: str | None = None,
        notes: str | None = None,
        alerts: bool = True,
    ) -> None:
        super().__init__(run)
        if mode not in ("offline", "online"):
            raise ConfigurationError(
                f"loggers.wandb.mode={mode}: expected offline or online; for a run without W&B: "
                "logger=[console]"
            )
        self.folder, self.mode, self.project = run.folder, mode, project
        self.every, self.alerts = max(1, every), alerts
        self.tags, self.group, self.notes = list(tags or []), group, notes
        self.axes: set[str] = set()  # names that have theirs
        self.stage: StageInfo | None = None
        self.weights: list[list[object]] = []
        self.results: list[list[object]] = []
        self.lost = self._lost()
        self.run = self._open()

    def _lost(self) -> list[JsonObject]:
        """Return the values that a kill kept out of the offline files, in the order of their steps."""
        if self.mode == "online" or self.run_info.resumed_step is None:
            return []
        kept = kept_steps(self.folder)
        lines = read_lines(self.folder / METRICS)
        return [line for line in lines if line["step"] not in kept]

    def _write_again(self, stage: StageInfo) -> None:
        """Log what was lost: of this stage as it is logged at first, of stages before it the values alone."""
        lines, self.lost = self.lost, []
        for line in lines:
            step, name = int(line["step"]), line["stage"]
            values = {
                key: value for key, value in line.items() if key not in ("step", "stage", "time")
            }
            if name == stage.name:
                self.log_step(step, name, values)
            elif step % self.every == 0:
                self._log({"step": step, **values})

    def _open(self) -> Run:
        (self.folder / "wandb").mkdir(parents=True, exist_ok=True)
        # staging and cache would otherwise go to the home folder, which is read-only on many
        # clusters
        for variable in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ[variable] = (
                str(self.folder / "wandb") if variable != "WANDB_DIR" else str(self.folder)
            )
        # After the variables are set, and only when asked for: the import takes seconds
        import wandb

        mode = self.mode
        if mode == "online" and not wandb.api.api_key:
            raise RuntimeError(
                "no API key found, expected WANDB_API_KEY or a stored login; set it, or use "
                "loggers.wandb.mode=offline"
            )
        run = wandb.init(
            project=self.project,
            name=self.folder.name,
            id=run_id(self.project, self.folder.name),
            dir=str(self.folder),
            config=dict(self.run_info.settings),
            mode=mode,
            tags=self.tags or None,
            group=self.group,
            notes=self.notes,
            resume="allow"
            if mode == "online"
            else None,  # offline runs of one id are joined when they are synced
            settings=wandb.Settings(silent=True, console="off", finish_timeout=300.0),
        )
        run.define_metric("step", hidden=True)
        return run

    def _log(self, line: JsonObject) -> None:
        """Log values; each name gets its axis before its first."""
        for name in line.keys() - self.axes:
            stage = name.partition("/")[0] if name.startswith("stage-") else ""
            axis = f"{stage}/step" if stage else "step"
            if name == axis:
                self.run.define_metric(name, hidden=True)
            else:
                self.run.define_metric(name, step_metric=axis)
            self.axes.add(name)
        self.run.log(line)

    def start_stage(self, stage: StageInfo) -> None:
        self.stage = stage
        self.weights += [
            [stage.name, "data set", name, float(weight)] for name, weight in stage.data.items()
        ]
        self.weights += [
            [stage.name, "objective", name, float(weight)]
            for name, weight in stage.objectives.items()
        ]
        self._log(
            {
                "step": stage.first_step,
                "progress/stage": stage.index,
                "weights": self._table(["stage", "kind", "name", "weight"], self.weights),
                **{f"weight/{name}": weight for name, weight in stage.data.items()},
            }
        )
        self._write_again(stage)

    @staticmethod
    def _table(columns: list[str | int], rows: list[list[object]]) -> Table:
        import wandb

        return wandb.Table(columns=columns, data=[list(row) for row in rows])

    def log_step(self, step: int, stage: str, values: Mapping[str, Value]) -> None:
        current = self.stage
        if current is not None and (step % self.every == 0 or step == current.last_step):
            self._log_values(step, current, values)

    def _log_values(self, step: int, stage: StageInfo, values: Mapping[str, Value]) -> None:
        done = step - stage.first_step + 1
        line: JsonObject = {"step": step, f"stage-{stage.name}/step": done, **values}
        line["progress/stage"] = stage.index
        line["progress/stage_fraction"] = done / (stage.last_step - stage.first_step + 1)
        line.update(
            {
                f"stage-{stage.name}/{name}": value
                for name, value in values.items()
                if name == "accuracy" or name.startswith("loss/")
            }
        )
        self._log(line)

    def log_alert(self, step: int, name: str, text: str) -> None:
        if self.alerts:
            self.run.alert(f"{self.folder.name}: {name}", f"step {step}: {text}", level="WARN")

    def log_evaluation(self, step: int, stage: str, results: Results, examples: Examples) -> None:
        self.results += [
            [stage, step, task, metric, value]
            for task, metrics in results.items()
            for metric, value in metrics.items()
        ]
        line: JsonObject = {
            f"evaluation/{task}/{metric}": value
            for task, metrics in results.items()
            for metric, value in metrics.items()
        }
        table = self._table(["stage", "step", "task", "metric", "value"], self.results)
        self._log({"step": step, "evaluations": table, **line})

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)
