"""Where a step lies: its stage and its place in the stage. Pure functions of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from sailplan.config.schema import Config


@dataclass(frozen=True)
class StageSpan:
    """Global steps first..last of one stage, both included.

    Step n is the n-th step of the run, counted from 1.
    """

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
