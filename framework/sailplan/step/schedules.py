"""Learning-rate schedules: the fraction of the peak rate at each step of a stage, as a pure
function.

A schedule has no state, so `plan` shows what `train` does and a resumed run goes on with the very
next rate. `warmup_steps` and `final_learning_rate` of the optimizer's settings are common to all; a
schedule's own options are its constructor's.
A new one is a subclass of `Schedule` that `optimizer.schedule._target_` names, here or below
`allowed_targets`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from sailplan.config.schema import StageOptimizerConfig
from sailplan.config.targets import check_options, class_at
from sailplan.errors import ConfigurationError


class Schedule(ABC):
    """How the rate goes from its peak to its end after a linear warm-up."""

    @abstractmethod
    def remaining(self, done: float) -> float:
        """Return the part of the way from the end to the peak, 1 to 0; done: share of the steps
        after the warm-up, 0 to 1.
        """

    def scale(self, settings: StageOptimizerConfig, step: int, steps: int) -> float:
        """Return the fraction of the peak rate at a stage's step (0-based) of so many steps."""
        warmup = min(settings.warmup_steps, steps)
        if step < warmup:
            return (step + 1) / warmup
        peak = settings.learning_rate
        floor = (
            settings.final_learning_rate / peak if peak else 1.0
        )  # of a rate of 0 any fraction is 0
        return floor + (1 - floor) * self.remaining((step - warmup) / max(1, steps - warmup))


class WarmupCosine(Schedule):
    """Half a cosine (Loshchilov & Hutter, "SGDR", arXiv 1608.03983, equation 5, one cycle)."""

    def remaining(self, done: float) -> float:
        """Return the cosine, scaled to 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * done))


class WarmupLinear(Schedule):
    """A straight line from the peak to the end; with both rates equal, a constant rate."""

    def remaining(self, done: float) -> float:
        """Return the share of the steps that is left."""
        return 1 - done


class WarmupStableDecay(Schedule):
    """The peak rate, then a straight line to the end (Hu et al., "MiniCPM", arXiv 2404.06395,
    section 4).

    decay: share of the steps after the warm-up in which the rate goes down.
    """

    def __init__(self, decay: float = 0.1) -> None:
        if not isinstance(decay, int | float) or not 0 < decay <= 1:
            raise ConfigurationError(f"decay={decay}: expected a number above 0, at most 1")
        self.decay = decay

    def remaining(self, done: float) -> float:
        """Return 1, and in the last part what is left of it."""
        return min(1.0, (1 - done) / self.decay)


def build_schedule(
    key: str, settings: StageOptimizerConfig, allowed: Sequence[str] | None = None
) -> Schedule:
    """Return the schedule that the settings name.

    key: dotted key of the schedule, with which messages begin. allowed: prefixes that its path may
    have; None: any.
    Raises ConfigurationError for a class that is no Schedule or not allowed, and for options that
    it does not take.
    """
    options = dict(settings.schedule)
    target = options.pop("_target_", None)
    if not isinstance(target, str) or not target:
        raise ConfigurationError(
            f"{key}._target_: found {target!r}, expected a class, such as "
            "sailplan.step.schedules.WarmupCosine"
        )
    cls = class_at(f"{key}._target_", target, Schedule, allowed)  # type: ignore[type-abstract]
    check_options(key, cls, options, ())
    try:
        return cls(**options)
    except ConfigurationError as error:
        raise ConfigurationError(f"{key}.{error}") from error


def learning_rate_scale(settings: StageOptimizerConfig, step: int, steps: int) -> float:
    """Return the fraction of the peak learning rate at a stage's step (0-based) of so many
    steps.
    """
    return build_schedule("optimizer.schedule", settings).scale(settings, step, steps)
