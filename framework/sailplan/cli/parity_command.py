"""`sailplan check parity --loss module:function`: is a loss you are handed exact across ranks?"""

from __future__ import annotations

import argparse
import importlib
import inspect

from sailplan.errors import EXIT_DONE, EXIT_FAILURE, ConfigurationError


def run(options: argparse.Namespace) -> int:
    from sailplan.objective.protocol import Objective
    from sailplan.step.loss_parity import Loss, check_loss, of_objective

    if options.overrides:
        raise ConfigurationError(f"check parity takes no overrides, found {options.overrides[0]}; give --loss module:function [--world-size N]")
    if options.loss is None:
        raise ConfigurationError("check parity: --loss is missing; give the loss to check, e.g. --loss sailplan.step.example_losses:exact")
    module, _, name = options.loss.partition(":")
    if not module or not name:
        raise ConfigurationError(f"--loss {options.loss}: expected module:function, e.g. --loss sailplan.step.example_losses:exact")
    if options.world_size < 2:
        raise ConfigurationError(f"--world-size {options.world_size}: expected 2 or more ranks")
    if not options.timeout > 0:
        raise ConfigurationError(f"--timeout {options.timeout}: expected a number of seconds above 0")
    try:
        loss: Loss | None = getattr(importlib.import_module(module), name, None)
    except ImportError as problem:
        raise ConfigurationError(f"--loss {options.loss}: the module cannot be imported ({problem}); run in its folder, or set PYTHONPATH") from problem
    if not callable(loss):
        raise ConfigurationError(f"--loss {options.loss}: {module} has no function '{name}'")
    if inspect.isclass(loss) and issubclass(loss, Objective):
        loss = of_objective(loss)
    found = check_loss(loss, options.world_size, options.timeout)
    verdict = "exact" if found.exact else "NOT exact"
    print(f"{options.loss} on {options.world_size} ranks: {verdict}: {found}")
    if not found.problem:
        print(f"mean of the ranks' losses {found.loss:.8g}, loss of the full batch {found.full_batch_loss:.8g}")
    return EXIT_DONE if found.exact else EXIT_FAILURE
