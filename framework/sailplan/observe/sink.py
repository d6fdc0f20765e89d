"""What every receiver of a run's numbers understands: a sink.

A sink ignores whatever it does not override, so a console without tables or a tracker without stages needs no special
case in the training loop. Ranks other than 0 simply have no sinks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = float | int | str  # one measured value; strings for names and digests ("data/set", "data/digest")
Results = Mapping[str, Mapping[str, float]]  # task -> metric -> value
Examples = Mapping[str, Sequence[Mapping[str, Any]]]  # task -> [{"query": item, "results": [item with "score", "correct"]}]


@dataclass(frozen=True)
class StageInfo:
    """A stage as the run's records show it. Steps count from 1; `first_step` and `last_step` belong to the stage."""

    name: str
    index: int  # 1-based place in the schedule
    count: int  # stages in the schedule
    first_step: int
    last_step: int
    data: Mapping[str, float] = field(default_factory=dict)  # data set -> sampling weight in use
    objectives: Mapping[str, float] = field(default_factory=dict)  # objective -> weight
    learning_rate: tuple[float, float] | None = None  # peak, final
    backends: Mapping[str, str] = field(default_factory=dict)  # objective -> "BACKEND DTYPE" that its scores will go through


class Sink:
    """Base of all sinks; each method may be called on rank 0 only, in step order."""

    def start_stage(self, stage: StageInfo) -> None:
        """A stage begins, or is continued after a resume."""

    def log_step(self, step: int, stage: str, values: Mapping[str, Value]) -> None:
        """Values of one finished step."""

    def log_evaluation(self, step: int, stage: str, results: Results, examples: Examples) -> None:
        """Results of all evaluation tasks after `step`."""

    def finish_stage(self, stage: StageInfo) -> None:
        """The stage's last step is done."""

    def close(self, finished: bool) -> None:
        """The run ends; `finished` is False when it was stopped or failed."""
