"""`sailplan check parity --loss module:function`: is a loss you are handed exact across ranks?"""

from __future__ import annotations

import argparse
import importlib
import inspect

from sailplan.errors import EXIT_DONE, EXIT_FAILURE, ConfigurationError


def run(options: argparse.Namespace) -> int:
    from sailplan.objective.protocol import Objective
    from sailplan.parity.losses import Loss, check_loss, of_objective

    if options.overrides:
        raise ConfigurationError(
            f"check parity takes no overrides, found {options.overrides[0]}; give --loss "
            "module:function [--world-size N]"
        )
    if options.loss is None:
        raise ConfigurationError(
            "check parity: --loss is missing; give the loss to check, e.g. --loss "
            "sailplan.parity.example_losses:exact"
        )
    module, _, name = options.loss.partition(":")
    if not module or not name:
        raise ConfigurationError(
            f"--loss {options.loss}: expected module:function, e.g. --loss "
            "sailplan.parity.example_losses:exact"
        )
    if options.world_size < 2:
        raise ConfigurationError(f"--world-size {options.world_size}: expected 2 or more ranks")
    if not options.timeout > 0:
        raise ConfigurationError(
            f"--timeout {options.timeout}: expected a number of seconds above 0"
        )
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as problem:
        raise ConfigurationError(
            f"--loss {options.loss}: the module cannot be imported ({problem}); run in its folder, "
            "or set PYTHONPATH"
        ) from problem
    if not callable(found):
        raise ConfigurationError(f"--loss {options.loss}: {module} has no function '{name}'")
    loss: Loss = (
        of_objective(found) if inspect.isclass(found) and issubclass(found, Objective) else found
    )
    parity = check_loss(loss, options.world_size, options.timeout)
    verdict = "exact" if parity.exact else "NOT exact"
    print(f"{options.loss} on {options.world_size} ranks: {verdict}: {parity}")
    if not parity.problem:
        print(
            f"mean of the ranks' losses {parity.loss:.8g}, loss of the full batch "
            f"{parity.full_batch_loss:.8g}"
        )
    return EXIT_DONE if parity.exact else EXIT_FAILURE
