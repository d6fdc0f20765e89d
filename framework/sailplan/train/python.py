"""Training from Python, as `sailplan train` does it."""

from __future__ import annotations

from pathlib import Path

from sailplan.config.components import validate
from sailplan.config.rules import check, check_device
from sailplan.config.schema import Config
from sailplan.runtime.environment import world_size_from_environment


class Trainer:
    """A run of a configuration; under torchrun every rank makes one and calls `train`."""

    def __init__(self, config: Config) -> None:
        """Raise ConfigurationError for a configuration that cannot run here."""
        validate(config)
        check(config, world_size_from_environment())
        check_device(config)
        self.config = config

    def train(self) -> Path:
        """Train all stages; return the run's folder, which `sailplan.load` takes.

        Raises the errors of `sailplan.errors`.
        """
        from sailplan.train.run import train

        return train(self.config).parent
