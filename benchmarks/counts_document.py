"""The tables of docs/performance.md, made from the counted results; see counts.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cluster_arithmetic
from documents import fill

COLUMNS = (
    ("operations", "device operations"),
    ("waits", "host waits"),
    ("uploads", "uploads"),
    ("uploaded_bytes", "uploaded bytes"),
    ("collectives", "collectives"),
    ("collective_bytes", "their bytes"),
    ("collectives_of_one", "in a group of one"),
    ("flop", "FLOP"),
    ("flop_per_forward", "FLOP / F"),
)


def _cell(before: dict[str, Any], after: dict[str, Any], key: str) -> str:
    one, other = before.get(key), after.get(key)
    if one is None and other is None:
        return "fails" if "error" in after else "-"
    if not before:  # a case that there was not
        return f"**{other:,}**"
    told = ["fails" if x is None else f"{x:,}" for x in (one, other)]
    return told[1] if told[0] == told[1] else f"{told[0]} -> **{told[1]}**"


def counted(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Before and after in one table."""
    lines = [
        f"Rank 0 of two, counted on the stand-in device: before at {before['commit']} "
        f"({before['date']}), after at {after['commit']} "
        f"({after['date']}), torch {after['torch']}. Where one number stands, nothing changed, or there was no such case (bold).",
        "",
        "| what | " + " | ".join(title for _, title in COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    titles = {
        "losses": "loss",
        "steps": "step",
        "kept_graphs": "step of 8 micro-batches, kept graphs",
    }
    errors = []
    for part, title in titles.items():
        for name in {**before[part], **after[part]}:
            one, other = before[part].get(name, {}), after[part].get(name, {})
            errors += [
                f"{title}, {name}, {when}: `{row['error']}`"
                for when, row in (("before", one), ("after", other))
                if "error" in row
            ]
            lines.append(
                f"| {title}: {name} | "
                + " | ".join(_cell(one, other, key) for key, _ in COLUMNS)
                + " |"
            )
    return "\n".join([*lines, *(["", *errors] if errors else [])])


def write(document: Path, results: Path) -> None:
    """Put the tables between the document's markers."""
    before, after = (
        json.loads((results / name).read_text()) for name in ("counts_before.json", "counts.json")
    )
    kept = after["kept_graphs"]
    multiples = {
        "no graphs kept": kept["0"]["flop_per_forward"],
        "all graphs kept": kept["8"]["flop_per_forward"],
    }
    parts = {"counts": counted(before, after), "cluster": cluster_arithmetic.table(multiples)}
    step = results / "step_cpu.md"
    if step.is_file():
        parts["step"] = step.read_text().strip()
    for name, found in parts.items():
        fill(document, name, found)
