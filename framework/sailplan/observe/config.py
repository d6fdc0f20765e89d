"""Configuration of what a run shows while it works, as version 0.1.0 wrote it: `loggers` says it
now, and more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sailplan.config.fields import Options, Size


@dataclass
class TrackingConfig:
    """Settings that are carried over to `loggers`; None: what stands there."""

    wandb: Literal["offline", "online", "disabled"] | None = None
    project: str | None = None
    log_every: Size | None = None

    def carried_over(self, loggers: dict[str, Options]) -> dict[str, Options]:
        """Return the loggers with these settings in place of their own."""
        found = {name: dict(options) for name, options in loggers.items()}
        if self.wandb == "disabled":
            found.pop("wandb", None)
        for name, key, value in (
            ("wandb", "mode", self.wandb),
            ("wandb", "project", self.project),
            ("wandb", "every", self.log_every),
            ("console", "every", self.log_every),
        ):
            if value is not None and name in found:
                found[name][key] = value
        return found
