"""Configuration of what a run shows while it works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sailplan.config.fields import Size


@dataclass
class TrackingConfig:
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "sailplan"
    log_every: Size = 10  # steps between console and W&B lines; metrics.jsonl has every step
