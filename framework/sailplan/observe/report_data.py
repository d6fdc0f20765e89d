"""A run folder, read once into plain values: the only place of the report that knows file names
and formats.

Every part may be missing (a run that has just begun, a run without mining); it is then empty, never
an error. A file that is there but broken is an error that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from sailplan.config.fields import JsonObject, JsonValue
from sailplan.errors import ConfigurationError
from sailplan.observe.run_files import EVALUATION, METRICS, QUARANTINE, STAGES, read_lines

Series = list[tuple[int, float]]  # (step, value)
BASELINES = (
    "popularity",
    "content_mean",
)  # metrics of simple methods, reported beside the model's own
COUNTS = ("candidates", "queries", "clusters")  # sizes of a task, reported beside its metrics


def is_baseline(metric: str) -> bool:
    return any(name in metric for name in BASELINES)


def headline_metric(metrics: Mapping[str, object]) -> str | None:
    """The metric that stands for a task in curves and summaries: recall@10 where there is one,
    else another recall, else the first.
    """
    own = [
        name
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not is_baseline(name)
    ]
    for wanted in ("recall@10", "recall@", "nmi", "kendall", "auc"):
        for name in own:
            if name.startswith(wanted):
                return name
    return own[0] if own else None


def _json(path: Path) -> JsonValue:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(
            f"{path}: not JSON ({error}); remove or restore the file, then make the report again"
        ) from error


def _lines(path: Path) -> list[JsonObject]:
    try:
        return list(read_lines(path))
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


@dataclass(frozen=True)
class RunData:
    """The contents of runs/NAME that a report shows."""

    folder: Path
    name: str
    config_hash: str | None
    settings: JsonObject
    stages: list[JsonObject]  # stages.json
    metrics: list[JsonObject]  # metrics.jsonl, in step order
    evaluations: list[JsonObject]  # evaluation/step-*.json, in step order
    curriculum: dict[str, JsonObject]  # stage -> state.json
    quarantine: list[JsonObject]

    @property
    def steps(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def seconds(self) -> float:
        """Wall time: that of the stages where recorded, else the time between first and last
        metric line.
        """
        total = sum(
            float(stage.get("seconds") or 0.0) + self.preparing(stage["name"])
            for stage in self.stages
        )
        if total == 0.0 and self.metrics:
            total = float(self.metrics[-1].get("time", 0.0)) - float(
                self.metrics[0].get("time", 0.0)
            )
        return total

    def preparing(self, stage: str) -> float:
        """Seconds that the stage's start took (balancing, subsets, mining), before its first
        step.
        """
        return float(self.curriculum.get(stage, {}).get("seconds") or 0.0)

    @property
    def world_size(self) -> int | None:
        sizes = [source.get("world_size") for source in (*self.metrics[-1:], *self.stages)]
        known = [int(size) for size in sizes if size]
        return known[-1] if known else None

    @cached_property
    def names(self) -> list[str]:
        """Names of all numeric values in metrics.jsonl, sorted."""
        found = {
            name
            for line in self.metrics
            for name, value in line.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        return sorted(found - {"step", "time"})

    def series(self, name: str, dataset: str | None = None) -> Series:
        """(step, value) of one metric; `dataset` keeps the steps that drew that data set only."""
        return [
            (line["step"], float(line[name]))
            for line in self.metrics
            if isinstance(line.get(name), (int, float))
            and (dataset is None or line.get("data/set") == dataset)
        ]

    @cached_property
    def prefix_losses(self) -> dict[int, Series]:
        """Matryoshka prefix -> (step, mean over the step's patterns of the loss at that prefix),
        from "…/loss@SIZE".
        """
        names = {
            name: int(match.group(1))
            for name in self.names
            if (match := re.search(r"/loss@(\d+)$", name))
        }
        found: dict[int, Series] = {size: [] for size in sorted(set(names.values()))}
        for line in self.metrics:
            for size, series in found.items():
                values = [
                    float(line[name])
                    for name, own in names.items()
                    if own == size and isinstance(line.get(name), (int, float))
                ]
                if values:
                    series.append((line["step"], sum(values) / len(values)))
        return found

    @property
    def datasets(self) -> list[str]:
        """Data sets drawn in the run, in order of first use."""
        return list(
            dict.fromkeys(str(line["data/set"]) for line in self.metrics if line.get("data/set"))
        )

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """(stage, first step, last step done), from stages.json or else from the metric lines."""
        if self.stages:
            reached = max(
                self.steps, max((evaluation["step"] for evaluation in self.evaluations), default=0)
            )
            spans = [
                (
                    stage["name"],
                    stage["first_step"],
                    min(stage["last_step"], reached or stage["last_step"]),
                )
                for stage in self.stages
            ]
            return [span for span in spans if span[2] >= span[1]]
        found: dict[str, list[int]] = {}
        for line in self.metrics:
            found.setdefault(str(line.get("stage", "")), []).append(line["step"])
        return [(name, steps[0], steps[-1]) for name, steps in found.items()]

    @property
    def last_evaluations(self) -> list[JsonObject]:
        """The last evaluation of each stage: what the table compares."""
        return list({evaluation["stage"]: evaluation for evaluation in self.evaluations}.values())

    def headline(self, task: str) -> tuple[str | None, Series]:
        """The task's headline metric and its values over all evaluations."""
        results = [
            (evaluation["step"], evaluation["tasks"][task])
            for evaluation in self.evaluations
            if task in evaluation["tasks"]
        ]
        metric = headline_metric(results[-1][1]) if results else None
        return metric, [
            (step, float(metrics[metric]))
            for step, metrics in results
            if metric and metrics.get(metric) is not None
        ]

    @property
    def tasks(self) -> list[str]:
        return list(
            dict.fromkeys(task for evaluation in self.evaluations for task in evaluation["tasks"])
        )


def read_run(folder: Path) -> RunData:
    """Read runs/NAME.

    Raises ConfigurationError when the folder does not exist or a file in it is broken.
    """
    if not folder.is_dir():
        raise ConfigurationError(
            f"{folder}: no such run folder; expected runs/NAME of a run that was started with "
            "`sailplan train`"
        )
    text = (
        (folder / "config.yaml").read_text(encoding="utf-8")
        if (folder / "config.yaml").exists()
        else ""
    )
    marked = re.search(r"^#\s*hash:\s*(\S+)", text, flags=re.MULTILINE)
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(
            f"{folder / 'config.yaml'}: not YAML ({' '.join(str(error).split())}); restore the file"
        ) from error
    settings = settings if isinstance(settings, dict) else {}
    evaluations = [_json(path) for path in sorted((folder / EVALUATION).glob("step-*.json"))]
    states = sorted((folder / "curriculum").glob("*/state.json"))
    return RunData(
        folder=folder,
        name=str(settings.get("name") or folder.resolve().name),
        config_hash=marked.group(1) if marked else settings.get("hash"),
        settings=settings,
        stages=_json(folder / STAGES) if (folder / STAGES).exists() else [],
        metrics=sorted(_lines(folder / METRICS), key=lambda line: line["step"]),
        evaluations=sorted(evaluations, key=lambda evaluation: evaluation["step"]),
        curriculum={path.parent.name: _json(path) for path in states},
        quarantine=_lines(folder / QUARANTINE),
    )
