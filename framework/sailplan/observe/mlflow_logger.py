"""The run's numbers in MLflow: one MLflow run for each run folder, continued by a resume.

The tracking server is MLflow's own setting (`MLFLOW_TRACKING_URI`), or `uri` here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from sailplan.config.fields import JsonView
from sailplan.observe.logger import Examples, Logger, Results, RunInfo, StageInfo, Value
from sailplan.runtime.files import write_whole


class MLflowLogger(Logger):
    """Log to the MLflow run whose id stands in runs/NAME/mlflow-run.

    every: steps between values.
    """

    package = "mlflow"

    def __init__(
        self, run: RunInfo, *, experiment: str = "sailplan", uri: str | None = None, every: int = 10
    ) -> None:
        super().__init__(run)
        import mlflow

        self.every = max(1, every)
        self.stage: StageInfo | None = None
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        note = run.folder / "mlflow-run"
        if run.resumed_step is not None and note.is_file():
            self.id = note.read_text(encoding="utf-8").strip()
            self.client.update_run(self.id, status="RUNNING")
            return
        known = self.client.get_experiment_by_name(experiment)
        place = (
            known.experiment_id if known is not None else self.client.create_experiment(experiment)
        )
        self.id = self.client.create_run(place, run_name=run.name).info.run_id
        self.client.log_dict(self.id, dict(run.settings), "config.yaml")
        write_whole(note, self.id + "\n")

    def start_stage(self, stage: StageInfo) -> None:
        self.stage = stage
        self.client.set_tag(self.id, "stage", stage.name)

    def log_step(self, step: int, stage: str, values: Mapping[str, Value]) -> None:
        last = self.stage is not None and step == self.stage.last_step
        if step % self.every == 0 or last:
            self._log(
                step, {name: value for name, value in values.items() if not isinstance(value, str)}
            )

    def log_evaluation(self, step: int, stage: str, results: Results, examples: Examples) -> None:
        self._log(
            step,
            {
                f"evaluation/{task}/{metric}": value
                for task, metrics in results.items()
                for metric, value in metrics.items()
            },
        )

    def _log(self, step: int, values: JsonView) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = [
            Metric(re.sub(r"[^\w./ -]", "_", name), float(value), now, step)
            for name, value in values.items()
        ]
        self.client.log_batch(self.id, metrics=found)

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, status="FINISHED" if finished else "KILLED")
