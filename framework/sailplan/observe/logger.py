"""What every receiver of a run's numbers understands: a logger.

A logger ignores whatever it does not override, so a console without tables or a tracker without
stages needs no special case in the training loop. Only rank 0 has loggers. A new one is one file
with a subclass of `Logger` and one YAML in conf/logger that names it as `_target_`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sailplan.config.fields import JsonView

Value = (
    float | int | str
)  # one measured value; strings for names and digests ("data/set", "data/digest")
Results = Mapping[str, Mapping[str, float]]  # task -> metric -> value
Examples = Mapping[
    str, Sequence[JsonView]
]  # task -> [{"query": item, "results": [item with "score", "correct"]}]


@dataclass(frozen=True)
class StageInfo:
    """A stage as the run's records show it.

    Steps count from 1; `first_step` and `last_step` belong to the stage.
    """

    name: str
    index: int  # 1-based place in the schedule
    count: int  # stages in the schedule
    first_step: int
    last_step: int
    data: Mapping[str, float] = field(default_factory=dict)  # data set -> sampling weight in use
    objectives: Mapping[str, float] = field(default_factory=dict)  # objective -> weight
    learning_rate: tuple[float, float] | None = None  # peak, final
    backends: Mapping[str, str] = field(
        default_factory=dict
    )  # objective -> "BACKEND DTYPE" that its scores will go through


@dataclass(frozen=True)
class RunInfo:
    """The run that is logged."""

    folder: Path  # runs/NAME
    settings: JsonView = field(default_factory=dict)  # the resolved configuration
    resumed_step: int | None = (
        None  # the checkpoint's step when a run is continued; None for a fresh start
    )

    @property
    def name(self) -> str:
        return self.folder.name


class Logger:
    """Base of all loggers; each method is called on rank 0 only, in step order.

    A subclass's constructor takes the run and, as keywords, the options of its YAML.
    """

    package: str | None = None  # that must be installed beside sailplan's own dependencies

    def __init__(self, run: RunInfo) -> None:
        self.run_info = run

    def start_stage(self, stage: StageInfo) -> None:
        """Take note that a stage begins, or is continued after a resume."""

    def log_step(self, step: int, stage: str, values: Mapping[str, Value]) -> None:
        """Take the values of one finished step."""

    def log_alert(self, step: int, name: str, text: str) -> None:
        """Take note that something goes wrong; may be called by another thread than the rest."""

    def log_evaluation(self, step: int, stage: str, results: Results, examples: Examples) -> None:
        """Take the results of all evaluation tasks after `step`."""

    def finish_stage(self, stage: StageInfo) -> None:
        """Take note that the stage's last step is done."""

    def close(self, finished: bool) -> None:
        """End; `finished` is False when the run was stopped or failed."""
