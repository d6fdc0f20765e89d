"""What a run ran on: versions and machine, as it noted them, and what it got out of them."""

from __future__ import annotations

import json
from statistics import median

from sailplan.observe.report_data import RunData

VERSIONS = "versions.json"


def versions(data: RunData) -> dict[str, str]:
    """Return the versions of the run's latest start, {} of a run that noted none."""
    file = data.folder / VERSIONS
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:
        return {}
    return {str(name): str(value) for name, value in found.items()}


def machine(data: RunData) -> dict[str, str]:
    """Return memory and rates: the most of the run, and the middle of its measures."""
    found = {}
    memory = [value for _, value in data.series("memory/peak_bytes")]
    if memory:
        found["most memory of any rank"] = f"{max(memory) / 1e9:.2f} GB"
    for name, words, unit, scale in (
        ("tokens_per_second", "text tokens", " a second", 1.0),
        ("flop_per_step", "FLOP of a step, counted", "", 1.0),
        ("flop_per_second", "FLOP", " a second", 1.0),
        ("mfu", "model FLOP utilisation", " %", 100.0),
    ):
        values = [value for _, value in data.series(name)]
        if values:
            found[words] = f"{scale * median(values):.3g}{unit}"
    return found
