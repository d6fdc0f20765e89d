"""Records that a run no longer draws, and from which step on.

A record is left out `AFTER` steps after the one in which it was found: more than any loader reads
ahead, so that every rank and worker leaves it out from the same step on. Which rows a record of the
list would have had is still the plan's business; its row gets the spare that it would have got had
the record been broken. So the rows of a step are a function of the step and of the list, at any
number of ranks and workers, and a run that is resumed with the list goes on with the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from sailplan.data.config import STEPS_AHEAD

AFTER = STEPS_AHEAD + 1  # steps
Task = TypeVar("Task")


class Exclusion(NamedTuple):
    """A record by its data set and position; step: of the run, from 1, the first without it."""

    dataset: str
    position: int
    step: int


class Exclusions:
    """The list: some hundred bytes for each record on it, and none for any other."""

    def __init__(self) -> None:
        self._steps: dict[tuple[str, int], int] = {}
        self._log: list[Exclusion] = []

    def __len__(self) -> int:
        return len(self._log)

    def __contains__(self, record: tuple[str, int]) -> bool:
        """Return whether a (data set, position) is on the list, from whichever step on."""
        return record in self._steps

    def add(self, found: Iterable[Exclusion]) -> None:
        """Put records on the list; one that is there stays as it is."""
        for one in found:
            if one[:2] not in self._steps:
                self._steps[one[:2]] = one.step
                self._log.append(one)

    def holds(self, dataset: str, position: int, step: int) -> bool:
        """Return whether a record is left out of a step of the run."""
        first = self._steps.get((dataset, position))
        return first is not None and first <= step

    def told_with(
        self, tasks: Iterable[Task], workers: int
    ) -> Iterator[tuple[Task, Sequence[Exclusion]]]:
        """Yield each task with what its worker does not know of the list: workers take tasks in
        turn, and knew the list as it is now when they were forked.
        """
        known = [len(self._log)] * max(1, workers)
        for number, task in enumerate(tasks):
            worker = number % len(known)
            fresh, known[worker] = self._log[known[worker] :], len(self._log)
            yield task, fresh
