"""`sailplan data index|validate`: prepare and prove the data before a long run."""

from __future__ import annotations

import argparse

from sailplan.config.compose import compose
from sailplan.errors import EXIT_BAD_DATA, EXIT_DONE, ConfigurationError


def run(options: argparse.Namespace) -> int:
    from sailplan.data.datasets import open_datasets, validate

    config = compose(options.overrides)
    if not config.data.sets:
        raise ConfigurationError("no data set is configured: add experiment=NAME or data=[reading,NAME]")
    if options.action == "index":
        for name, reader in open_datasets(config).items():
            print(f"{name}: {len(reader)} records, {len(reader.positions('train'))} of them train")
        return EXIT_DONE
    problems = list(validate(config))
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems")
    return EXIT_BAD_DATA if problems else EXIT_DONE
