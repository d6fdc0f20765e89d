"""Where a step lies: its stage, its place in the stage, and its learning rate. Pure functions of the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sailplan.config.schema import Config, OptimizerConfig


@dataclass(frozen=True)
class StageSpan:
    """Global steps first..last of one stage, both included. Step n is the n-th step of the run, counted from 1."""

    index: int
    name: str
    first: int
    last: int

    @property
    def steps(self) -> int:
        return self.last - self.first + 1


def spans(config: Config) -> list[StageSpan]:
    """The stages of `config.order` with their global steps."""
    result, first = [], 1
    for index, name in enumerate(config.order):
        steps = config.stages[name].steps
        result.append(StageSpan(index, name, first, first + steps - 1))
        first += steps
    return result


def learning_rate_scale(config: OptimizerConfig, step: int, steps: int) -> float:
    """Fraction of the peak learning rate at a stage's step (0-based): linear warm-up, then a cosine to final/peak.

    Loshchilov & Hutter, "SGDR", arXiv 1608.03983, equation 5, one cycle.
    """
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        return (step + 1) / warmup
    floor = config.final_learning_rate / config.learning_rate if config.learning_rate else 1.0  # of a rate of 0 any fraction is 0
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
