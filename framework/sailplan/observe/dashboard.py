"""The run's dashboard as code: dashboard.yaml beside this file, and what trackers make of it.

TensorBoard gets it as its custom scalars, in the event files themselves. Names of series are known
once they are logged, and patterns are theirs, so a new pattern of a data set needs no new panel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.resources import files

import yaml

Dashboard = Mapping[str, Mapping[str, list[str]]]  # group -> panel -> patterns


@lru_cache(maxsize=1)
def dashboard() -> Dashboard:
    """Return the panels by group."""
    text = files("sailplan.observe").joinpath("dashboard.yaml").read_text(encoding="utf-8")
    found: Dashboard = yaml.safe_load(text)
    return found


def series_of(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the names that any of the patterns matches as a whole."""
    return [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]


def custom_scalars() -> dict[str, dict[str, list[object]]]:
    """Return the dashboard in the form of TensorBoard's `SummaryWriter.add_custom_scalars`."""
    return {
        group: {
            panel: ["Multiline", [f"^{pattern}$" for pattern in patterns]]
            for panel, patterns in panels.items()
        }
        for group, panels in dashboard().items()
    }
