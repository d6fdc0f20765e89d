"""`sailplan train`, `plan` and `check`: what will run, whether it can, and running it."""

from __future__ import annotations

import argparse
import json

from sailplan.config.rules import check_device
from sailplan.config.schema import Config
from sailplan.model.component import EncoderComponent
from sailplan.model.fused import chosen_extension
from sailplan.objective.registry import build_objectives, check_objectives
from sailplan.observe.metrics import logger_classes
from sailplan.runtime.environment import world_size_from_environment
from sailplan.runtime.process import device_type
from sailplan.step.optimizer import check_optimizer
from sailplan.train.callback import build_callbacks


def _check(config: Config) -> None:
    """Raise ConfigurationError for losses, model shapes and published weights that no world
    could run.
    """
    component: EncoderComponent = config.model.component()
    objectives = build_objectives(
        config.objectives,
        config.model.embedding,
        config.data.sets,
        allowed_targets=config.allowed_targets,
    )
    check_objectives(
        objectives,
        {name: config.stages[name] for name in config.order},
        config.data.sets,
        config.model.prefixes,
        component.gives_tokens,
    )
    logger_classes(config.loggers, config.allowed_targets)
    build_callbacks(config)
    check_optimizer(config)
    component.check_shapes(config.parallel)
    component.check_files()


def _check_here(config: Config) -> None:
    """As `_check`; refuse too what this machine's devices could not run."""
    _check(config)
    check_device(config)
    chosen_extension(config.parallel, device_type())


def train(options: argparse.Namespace) -> int:
    from sailplan.train.run import train as run

    _check_here(options.config)
    run(options.config)
    return 0


def plan(options: argparse.Namespace) -> int:
    from sailplan.train.plan import describe, render

    world_size = world_size_from_environment() if options.ranks is None else options.ranks
    _check(options.config)
    described = describe(options.config, world_size)
    print(json.dumps(described, indent=1) if options.json else render(described))
    return 0


def check(options: argparse.Namespace) -> int:
    """What no world could run, then everything that this one needs: see `sailplan.preflight`."""
    from sailplan.preflight.run import preflight

    _check_here(options.config)
    preflight(options.config)
    return 0
