"""The configuration that a command works with, composed and checked before anything heavy is
imported.

A wrong key so answers in about a second: torch, megatron-core and W&B take ten.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sailplan.config.compose import changed, compose
from sailplan.config.rules import check
from sailplan.config.schema import Config
from sailplan.runtime.environment import world_size_from_environment
from sailplan.train.run_folder import RunFolder


def of_launch(options: argparse.Namespace) -> Config:
    """Return the configuration of a run that is to start, checked for the launch's ranks
    (`plan`: for those asked for).
    """
    ranks = getattr(options, "ranks", None)
    config = compose(options.overrides)
    check(config, world_size_from_environment() if ranks is None else ranks)
    return config


def of_run(options: argparse.Namespace) -> tuple[Config, RunFolder]:
    """Return a run's saved configuration with the overrides' values, and its folder."""
    if options.run_folder:
        folder = RunFolder(Path(options.run_folder))
        return changed(folder.load_config(), options.overrides), folder
    config = compose(options.overrides)
    folder = RunFolder(Path(config.runs) / config.name)
    chosen = ("experiment", "name", "runs")  # these say which run
    return changed(
        folder.load_config(),
        [line for line in options.overrides if line.lstrip("+").split("=", 1)[0] not in chosen],
    ), folder
