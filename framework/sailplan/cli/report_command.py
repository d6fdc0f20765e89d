"""`sailplan report`: a run folder, or several beside each other, as one self-contained page."""

from __future__ import annotations

import argparse
from pathlib import Path

from sailplan.config.compose import compose
from sailplan.errors import ConfigurationError
from sailplan.observe.comparison import write_comparison
from sailplan.observe.report import write_report


def run(options: argparse.Namespace) -> int:
    """Write the page of a run, or of several beside each other."""
    if options.compare:
        print(write_comparison([Path(one) for one in options.compare], Path(options.out)))
        return 0
    folder = Path(options.run_folder) if options.run_folder else _folder(options.overrides)
    if not (folder / "config.yaml").is_file():
        raise ConfigurationError(
            f"{folder}/config.yaml: not found; give --run-folder the folder of a run that was "
            "started by `sailplan train`"
        )
    print(write_report(folder))
    return 0


def _folder(overrides: list[str]) -> Path:
    config = compose(overrides)
    return Path(config.runs) / config.name
