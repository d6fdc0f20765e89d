"""The run's numbers as TensorBoard event files in the run folder: `tensorboard --logdir runs`.

Everything is drawn over the global step; the tab "custom scalars" is the run's dashboard. A resumed run says from which step it goes on, so that
TensorBoard hides the steps that are done again.
"""

from __future__ import annotations

from collections.abc import Mapping

from sailplan.observe.dashboard import custom_scalars
from sailplan.observe.logger import Examples, Logger, Results, RunInfo, StageInfo, Value


class TensorBoardLogger(Logger):
    """Write event files below runs/NAME/tensorboard. every: steps between values."""

    package = "tensorboard"

    def __init__(self, run: RunInfo, *, every: int = 10) -> None:
        super().__init__(run)
        from torch.utils.tensorboard import SummaryWriter

        self.every = max(1, every)
        self.stage: StageInfo | None = None
        purge = None if run.resumed_step is None else run.resumed_step + 1
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
        self.writer.add_custom_scalars(custom_scalars())

    def start_stage(self, stage: StageInfo) -> None:
        self.stage = stage
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in stage.data.items())
        self.writer.add_text(
            "stage", f"{stage.index}/{stage.count} {stage.name}: {weights}", stage.first_step
        )

    def log_step(self, step: int, stage: str, values: Mapping[str, Value]) -> None:
        last = self.stage is not None and step == self.stage.last_step
        if step % self.every == 0 or last:
            for name, value in values.items():
                if not isinstance(value, str):
                    self.writer.add_scalar(name, value, step)

    def log_alert(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(f"alert/{name}", text, step)

    def log_evaluation(self, step: int, stage: str, results: Results, examples: Examples) -> None:
        for task, metrics in results.items():
            for metric, value in metrics.items():
                self.writer.add_scalar(f"evaluation/{task}/{metric}", value, step)
        self.writer.flush()

    def close(self, finished: bool) -> None:
        self.writer.close()
