"""Results of a run's tasks as tables: each metric with its interval, chance and numbers of queries
and candidates, after each stage, and beside methods that do not train.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from sailplan.config.fields import JsonObject
from sailplan.observe.intervals import chance, interval
from sailplan.observe.report_data import (
    BASELINES,
    COUNTS,
    RunData,
    headline_metric,
    is_baseline,
)


def evaluation_table(data: RunData) -> JsonObject:
    """One row a task and metric, one column a stage: its last evaluation."""
    columns = data.last_evaluations
    rows = []
    for task in data.tasks:
        metrics = dict.fromkeys(
            metric
            for column in columns
            for metric in column["tasks"].get(task, {})
            if not is_baseline(metric)
        )
        head = headline_metric({name: 0.0 for name in metrics})
        for metric in metrics:
            of_columns = [column["tasks"].get(task, {}) for column in columns]
            values = [found.get(metric) for found in of_columns]
            before = [None, *values[:-1]]
            cells = [
                {
                    "value": value,
                    "change": None if None in (value, old) else value - old,
                    "interval": interval(metric, found),
                }
                for value, old, found in zip(values, before, of_columns, strict=True)
            ]
            empty: dict[str, float] = {}
            last = next((found for found in reversed(of_columns) if metric in found), empty)
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "head": metric == head,
                    "count": metric in COUNTS,
                    "queries": last.get("queries"),
                    "candidates": last.get("candidates"),
                    "chance": chance(metric, last),
                    "cells": cells,
                }
            )
    return {
        "columns": [{"stage": column["stage"], "step": column["step"]} for column in columns],
        "rows": rows,
    }


def baselines(data: RunData) -> list[JsonObject]:
    """One row a task and metric that a method without training has a number for: a random order,
    the model before its first step (`evaluation.at_start`), the most popular items, and the mean of
    the shown items' vectors.

    That mean is of vectors that this run trained. It is no baseline where the run itself does
    nothing else with a history: then it is left out.
    """
    rows = []
    for task in data.tasks:
        of_task = [one for one in data.evaluations if task in one["tasks"]]
        last = of_task[-1]["tasks"][task]
        first = of_task[0]["tasks"][task] if of_task[0]["step"] == 0 else {}
        for metric, value in last.items():
            if is_baseline(metric) or metric in COUNTS or "/" in metric:
                continue
            simple = {name: _simple(name, metric, last) for name in BASELINES}
            mean = simple["content_mean"]
            if mean is not None and math.isclose(mean, value, rel_tol=1e-9):
                simple["content_mean"] = None
            row = {"chance": chance(metric, last), "untrained": first.get(metric), **simple}
            if any(one is not None for one in row.values()):
                rows.append(
                    {
                        "task": task,
                        "metric": metric,
                        "model": value,
                        "interval": interval(metric, last),
                        "queries": last.get("queries"),
                        **row,
                    }
                )
    return rows


def _simple(name: str, metric: str, metrics: Mapping[str, float]) -> float | None:
    found = (v for m, v in metrics.items() if name in m and metric in re.split(r"[/:]", m))
    return next(found, None)
