"""`report.html` of a run: one file that needs nothing else, made from the run folder alone.

This module arranges what `report_data` read into the sections of the page; `report_pictures` draws
the curves and `templates/report.html.j2` holds all of the HTML and CSS. Every string is escaped by
the template engine; the only markup that is let through is the SVG drawn here. A part that the run
does not have is shown as "not in this run".
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from sailplan.config.fields import JsonObject
from sailplan.observe.report_data import RunData, Series, read_run
from sailplan.observe.report_facts import machine, versions
from sailplan.observe.report_pictures import SERIES_COLOURS, curves, smooth
from sailplan.observe.report_results import baselines, evaluation_table
from sailplan.runtime.files import write_whole
from sailplan.runtime.progress import duration

_PICTURE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=\s]+")
SHOWN_EXAMPLES = 6  # queries shown per task or pattern
SHOWN_QUARANTINED = 50


def _number(value: object, digits: int = 4) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def _picture(
    name: str, label: str, lines: dict[str, Series], data: RunData, **options: bool
) -> Markup:
    return Markup(curves(name, label, lines, data.spans, **options))


def _summary(data: RunData) -> list[JsonObject]:
    """Per task: the headline metric after the first evaluation and after the last one."""
    rows = []
    for task in data.tasks:
        metric, series = data.headline(task)
        if metric and series:
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "first": series[0][1],
                    "last": series[-1][1],
                    "count": len(series),
                }
            )
    return rows


def _stages(data: RunData) -> list[JsonObject]:
    total = data.seconds or 1.0
    rows = []
    for position, stage in enumerate(data.stages):
        preparing = data.preparing(stage["name"])
        seconds = float(stage.get("seconds") or 0.0) + preparing
        rate = stage.get("learning_rate")
        weights = shares(stage.get("weights")) or dict.fromkeys(stage.get("data") or [], None)
        done = min(
            max(data.steps - stage["first_step"] + 1, 0),
            stage["last_step"] - stage["first_step"] + 1,
        )
        rows.append(
            {
                "name": stage["name"],
                "colour": position % SERIES_COLOURS,
                "first": stage["first_step"],
                "last": stage["last_step"],
                "done": done,
                "steps": stage["last_step"] - stage["first_step"] + 1,
                "duration": duration(seconds),
                "preparing": duration(preparing) if preparing else "",
                "share": 100.0 * seconds / total,
                "data": weights,
                "objectives": stage.get("objectives") or {},
                "learning_rate": " → ".join(_number(value, 3) for value in rate)
                if isinstance(rate, list)
                else _number(rate, 3),
            }
        )
    return rows


def _curves(data: RunData) -> JsonObject:
    by_set = {name: data.series("loss/total", name) for name in data.datasets} or {
        "loss": data.series("loss/total")
    }
    heads = {
        f"{task} ({metric})": series
        for task in data.tasks
        for metric, series in [data.headline(task)]
        if series
    }
    small: list[tuple[str, Markup]] = []
    singles = [name for name in data.names if name.startswith("loss/") and name != "loss/total"]
    for number, name in enumerate(
        [*singles, "accuracy", "grad_norm", "learning_rate", "rows_per_second"]
    ):
        small.append(
            (
                name,
                _picture(
                    f"small{number}",
                    name,
                    {name: data.series(name)},
                    data,
                    smoothed=name != "learning_rate",
                ),
            )
        )
    temperatures = {
        name.removeprefix("temperature/"): data.series(name)
        for name in data.names
        if name.startswith("temperature/")
    }
    by_prefix = {f"{size} dimensions": series for size, series in data.prefix_losses.items()}
    return {
        "loss": _picture(
            "loss", "loss per step and data set", by_set, data, wide=True, smoothed=True
        ),
        "recall": _picture("recall", "evaluation results", heads, data, wide=True, markers=True),
        "temperature": _picture(
            "temperature", "learned temperatures", temperatures, data, wide=True
        ),
        "small": [(name, picture) for name, picture in small if picture],
        "prefixes": _picture(
            "prefixes", "loss of each prefix", by_prefix, data, wide=True, smoothed=True
        ),
        "prefix_last": {
            size: smooth(series)[-1][1] for size, series in data.prefix_losses.items() if series
        },
    }


def _time(data: RunData) -> list[JsonObject]:
    """Mean seconds of a step's phases, the longest first, and the wait for data."""
    named = {
        name.removeprefix("seconds/"): name for name in data.names if name.startswith("seconds/")
    }
    phases = {**named, "wait for data": "data/wait_seconds"}
    means = {
        phase: sum(value for _, value in series) / len(series)
        for phase, name in phases.items()
        if (series := data.series(name))
    }
    total = sum(means.values()) or 1.0
    return [
        {"name": phase, "seconds": mean, "share": mean / total}
        for phase, mean in sorted(means.items(), key=lambda item: -item[1])
    ]


def _numbers(value: object) -> dict[str, float]:
    """The numeric entries of a mapping."""
    entries = value.items() if isinstance(value, dict) else ()
    return {
        str(key): float(number)
        for key, number in entries
        if isinstance(number, (int, float)) and not isinstance(number, bool)
    }


def shares(weights: object) -> dict[str, float]:
    """Return data weights in the report's one unit: the probability that a step draws the set."""
    numbers = _numbers(weights)
    total = sum(numbers.values()) or 1.0
    return {name: value / total for name, value in numbers.items()}


def _balance(similarities: object) -> JsonObject:
    """{training set: {benchmark: similarity, "mean": mean}} as a table: a column per benchmark,
    a row per training set.
    """
    pairs = (
        {str(name): _numbers(row) for name, row in similarities.items()}
        if isinstance(similarities, dict)
        else {}
    )
    columns = [
        column
        for column in dict.fromkeys(name for row in pairs.values() for name in row)
        if column not in ("mean", "error")
    ]
    rows = [
        {
            "name": name,
            "mean": row.get("mean"),
            "error": row.get("error"),
            "values": [row.get(column) for column in columns],
        }
        for name, row in pairs.items()
    ]
    return {"columns": columns, "rows": rows, "chart": _intervals(rows)}


def _intervals(rows: list[JsonObject]) -> list[JsonObject]:
    """Where each set's mean similarity and two standard errors around it lie, in percent of the
    range of all; empty without errors.
    """
    known = [row for row in rows if row["mean"] is not None and row["error"] is not None]
    if not known:
        return []
    low = min(row["mean"] - 2 * row["error"] for row in known)
    high = max(row["mean"] + 2 * row["error"] for row in known)
    unit = 100 / max(high - low, 1e-12)
    return [
        {
            "name": row["name"],
            "mean": row["mean"],
            "place": (row["mean"] - low) * unit,
            "start": (row["mean"] - 2 * row["error"] - low) * unit,
            "width": 4 * row["error"] * unit,
        }
        for row in sorted(known, key=lambda row: -row["mean"])
    ]


def _weights(data: RunData) -> list[JsonObject]:
    """Data weights per stage as shares of 1, with the balancing's scores where it ran, and the
    subsets' sizes.
    """
    stages = {stage["name"]: _numbers(stage.get("weights")) for stage in data.stages}
    stages.update(
        {
            name: _numbers(state["weights"])
            for name, state in data.curriculum.items()
            if state.get("weights")
        }
    )
    rows = []
    for name, weights in stages.items():
        state = data.curriculum.get(name, {})
        bars = [
            {"name": dataset, "share": share}
            for dataset, share in sorted(shares(weights).items(), key=lambda item: -item[1])
        ]
        kept, whole = _numbers(state.get("subsets")), _numbers(state.get("subsets_of"))
        subsets = [
            {"name": dataset, "kept": int(count), "whole": int(whole.get(dataset, 0))}
            for dataset, count in kept.items()
        ]
        rows.append(
            {
                "stage": name,
                "bars": bars,
                "balance": _balance(state.get("balance")),
                "model": state.get("balance_model"),
                "subsets": subsets,
            }
        )
    return [row for row in rows if row["bars"]]


def _item(item: object) -> JsonObject:
    """An item of an example: picture only when it is an inline image, anything else stays text."""
    if not isinstance(item, dict):
        return {"text": str(item), "image": None, "score": None, "correct": False, "items": []}
    picture = item.get("image")
    shown = isinstance(picture, str) and _PICTURE.fullmatch(picture) is not None
    text = item.get("text") or ("" if shown else str(picture or item.get("id") or "(no text)"))
    parts = [_item(part) for part in item.get("items") or []]  # a history
    return {
        "text": str(text),
        "image": picture if shown else None,
        "score": item.get("score"),
        "correct": bool(item.get("correct")),
        "items": parts,
    }


def _neighbours(data: RunData) -> dict[str, list[JsonObject]]:
    """Examples of each task's last evaluation that has any."""
    found: dict[str, list[JsonObject]] = {}
    for evaluation in data.evaluations:
        for task, examples in (evaluation.get("examples") or {}).items():
            if examples:
                found[task] = [
                    {
                        "query": _item(example.get("query")),
                        "results": [_item(result) for result in example.get("results", [])[:5]],
                    }
                    for example in examples[:SHOWN_EXAMPLES]
                ]
    return found


def _hard_negatives(data: RunData) -> list[JsonObject]:
    groups = []
    for stage, state in data.curriculum.items():
        for pattern, examples in (state.get("examples") or {}).items():
            rows = [
                {
                    "query": _item(example.get("query")),
                    "positive": _item(example.get("positive")),
                    "negatives": [_item(negative) for negative in example.get("negatives", [])],
                }
                for example in examples[:SHOWN_EXAMPLES]
            ]
            if rows:
                groups.append({"stage": stage, "pattern": pattern, "rows": rows})
    return groups


def _thresholds(data: RunData) -> list[JsonObject]:
    rows = []
    for stage, state in data.curriculum.items():
        for pattern, threshold in (state.get("thresholds") or {}).items():
            values = threshold if isinstance(threshold, dict) else {"value": threshold}
            rows.append(
                {
                    "stage": stage,
                    "pattern": pattern,
                    **{
                        key: values.get(key)
                        for key in ("value", "f1", "precision", "recall", "tp", "fp", "fn", "tn")
                    },
                }
            )
    return rows


def _quarantine(data: RunData) -> JsonObject:
    reasons = Counter(str(record.get("reason", "no reason given")) for record in data.quarantine)
    columns = list(
        dict.fromkeys(key for record in data.quarantine[:SHOWN_QUARANTINED] for key in record)
    )
    return {
        "total": len(data.quarantine),
        "reasons": reasons.most_common(),
        "columns": columns,
        "rows": data.quarantine[:SHOWN_QUARANTINED],
    }


def environment() -> Environment:
    """Return the template engine of all pages."""
    found = Environment(
        loader=PackageLoader("sailplan.observe", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["number"] = _number
    return found


def render(data: RunData) -> str:
    """The page of a run as a string of HTML."""
    order = [stage["name"] for stage in data.stages]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            duration=duration(data.seconds),
            summary=_summary(data),
            stages=_stages(data),
            colour={name: position % SERIES_COLOURS for position, name in enumerate(order)},
            curves=_curves(data),
            weights=_weights(data),
            time=_time(data),
            evaluations=evaluation_table(data),
            baselines=baselines(data),
            hard_negatives=_hard_negatives(data),
            neighbours=_neighbours(data),
            thresholds=_thresholds(data),
            quarantine=_quarantine(data),
            configuration=yaml.safe_dump(data.settings, sort_keys=False, allow_unicode=True),
            versions=versions(data),
            machine=machine(data),
        )
    )


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into the run folder and returns its path.

    Raises ConfigurationError when the folder does not exist or a file in it is broken.
    """
    folder = Path(folder)
    page = render(read_run(folder))
    path = folder / "report.html"
    write_whole(path, page)
    return path
