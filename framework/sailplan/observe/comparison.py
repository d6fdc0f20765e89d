"""Runs side by side in one page: their tasks with intervals, what their configurations differ in,
machines and versions.

A difference between two runs is marked where their intervals do not meet: these are of the queries
alone, so a run repeated with another seed may differ by more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sailplan.config.fields import JsonObject
from sailplan.errors import ConfigurationError
from sailplan.observe.intervals import chance, interval
from sailplan.observe.report import environment
from sailplan.observe.report_data import COUNTS, RunData, is_baseline, read_run
from sailplan.observe.report_facts import machine, versions
from sailplan.runtime.files import write_whole

Interval = tuple[float, float] | None
LONGEST = 120  # characters of a value that is shown


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write the page of two runs or more; return its path.

    Raises ConfigurationError for fewer, for a folder that is no run's and for broken files.
    """
    if len(folders) < 2:
        raise ConfigurationError(
            f"--compare: found {len(folders)} run folder, expected two or more: --compare runs/A runs/B"
        )
    runs = [read_run(folder) for folder in folders]
    page = (
        environment()
        .get_template("comparison.html.j2")
        .render(
            names=_names(folders),
            runs=runs,
            results=results(runs),
            differences=differences(runs),
            facts=_side_by_side([machine(run) | versions(run) for run in runs]),
        )
    )
    write_whole(out, page)
    return out


def results(runs: Sequence[RunData]) -> list[JsonObject]:
    """One row a task and metric of the runs' last evaluations; a cell has a run's value, its
    interval, and whether that lies apart from the first run's.
    """
    last = [run.evaluations[-1]["tasks"] if run.evaluations else {} for run in runs]
    rows = []
    for task in dict.fromkeys(name for tasks in last for name in tasks):
        of_runs = [tasks.get(task, {}) for tasks in last]
        for metric in dict.fromkeys(name for metrics in of_runs for name in metrics):
            if is_baseline(metric) or metric in COUNTS:
                continue
            spans = [interval(metric, metrics) for metrics in of_runs]
            cells = [
                {"value": metrics.get(metric), "interval": span, "apart": _apart(spans[0], span)}
                for metrics, span in zip(of_runs, spans, strict=True)
            ]
            known = next(metrics for metrics in of_runs if metric in metrics)
            sizes = {(metrics.get("queries"), metrics.get("candidates")) for metrics in of_runs}
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "queries": known.get("queries"),
                    "chance": chance(metric, known),
                    "same": len(sizes) == 1,
                    "cells": cells,
                }
            )
    return rows


def differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Return the settings in which configurations differ: (key, value in each run)."""
    return _side_by_side([_flat(run.settings) for run in runs], differing=True)


def _apart(first: Interval, second: Interval) -> bool:
    if first is None or second is None:
        return False
    return first[1] < second[0] or second[1] < first[0]


def _side_by_side(
    facts: Sequence[JsonObject], *, differing: bool = False
) -> list[tuple[str, list[str]]]:
    found = []
    for key in dict.fromkeys(name for one in facts for name in one):
        values = [str(one.get(key, "–"))[:LONGEST] for one in facts]
        if not differing or len(set(values)) > 1:
            found.append((key, values))
    return found


def _flat(settings: object, path: str = "") -> JsonObject:
    if not isinstance(settings, dict):
        return {path: settings}
    found: JsonObject = {}
    for key, value in settings.items():
        found |= _flat(value, f"{path}.{key}" if path else str(key))
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders; with the folder above where two are alike."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else str(Path(*folder.resolve().parts[-2:]))
        for name, folder in zip(names, folders, strict=True)
    ]
