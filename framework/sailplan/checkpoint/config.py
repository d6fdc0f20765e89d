"""Configuration of checkpoints: when they are written and how many are kept."""

from __future__ import annotations

from dataclasses import dataclass

from sailplan.config.fields import Count, Positive, Size


@dataclass
class CheckpointConfig:
    every_steps: Count = 200
    every_minutes: Positive = 10.0
    keep: Size = 2
    keep_every: Count = 0  # checkpoints of steps that this divides stay for good; 0: none
    # Folder on a disk of each node's own: a save is written there, then copied to copy_to, or to the
    # run folder, and sealed there
    local: str | None = None
    copy_to: str | None = None  # URL (fsspec) for a copy of each checkpoint, below the run's name
    asynchronous: bool = (
        True  # training goes on while a checkpoint is written, from a copy in the CPU's memory
    )
