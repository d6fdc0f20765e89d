"""Patterns that train on nothing: no row with both sides, or no negative, in step after step.

What a rank sees of a pattern's rows travels as a few flags with the message that each step makes
anyway: whether it has a row with both sides, a negative of the records' own, and, for some bits of
the targets' ids, a target whose bit is 0 and one whose bit is 1. Two different targets of the world
differ in one of the bits with probability 15/16, in others at each step; so after some steps in a
row the answer is certain, without anybody knowing all ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sailplan.config.schema import DatasetConfig
from sailplan.data.order import keyed_integer
from sailplan.data.record import HardNegatives, StepBatch
from sailplan.errors import BadDataError

BITS = 4
FLAGS = 2 + 2 * BITS  # of a pattern


class PatternWatch:
    """Counts, for each pattern of a stage, the steps in a row in which it had nothing to learn
    from. Equal on all ranks.
    """

    def __init__(
        self,
        patterns: Mapping[str, Sequence[str]],
        datasets: Mapping[str, DatasetConfig],
        limit: int,
    ) -> None:
        """patterns: data set -> its patterns in the stage.

        limit: steps in a row that are too many.
        """
        self.datasets, self.limit = datasets, limit
        self._empty = {(name, pattern): 0 for name, own in patterns.items() for pattern in own}

    def flags(self, batches: Sequence[StepBatch], step: int) -> list[bool]:
        """Return what this rank's rows of a step show: FLAGS for each pattern of the stage, in
        an order that is equal on all ranks.
        """
        by_name, result = {batch.dataset: batch for batch in batches}, list[bool]()
        for name, pattern in self._empty:
            result += (
                self._flags(by_name[name], pattern, step) if name in by_name else [False] * FLAGS
            )
        return result

    def note(self, batches: Sequence[StepBatch], flags: Sequence[bool]) -> None:
        """Take the world's flags of a step.

        Raises BadDataError for a pattern that had nothing to learn from for too long.
        """
        present = {batch.dataset for batch in batches}
        for place, (name, pattern) in enumerate(self._empty):
            if name not in present:
                continue
            pair, own, *bits = flags[place * FLAGS : (place + 1) * FLAGS]
            negative = own or any(
                zero and one for zero, one in zip(bits[::2], bits[1::2], strict=True)
            )
            self._empty[name, pattern] = 0 if pair and negative else self._empty[name, pattern] + 1
            if self._empty[name, pattern] >= self.limit:
                lacks = (
                    "no row with both of its sides"
                    if not pair
                    else "no negative: all targets are the same"
                )
                raise BadDataError(
                    f"data.sets.{name}.patterns.{pattern}: {lacks} in {self.limit} steps in a row "
                    "(data.empty_steps); "
                    "`sailplan data validate` counts what the records have"
                )

    def _flags(self, batch: StepBatch, pattern: str, step: int) -> list[bool]:
        settings = self.datasets[batch.dataset].patterns[pattern]
        query, target = batch.views[settings.query], batch.views[settings.target]
        pairs = query.valid.view(-1, query.group).any(1) & target.valid.view(-1, target.group).any(
            1
        )
        own = batch.views.get(HardNegatives(pattern))
        ids = {keyed_integer(one, step) for one in target.ids[target.valid].tolist()}
        flags = [bool(pairs.any()), own is not None and bool(own.valid.any())]
        for bit in range(BITS):
            flags += [any(not one >> bit & 1 for one in ids), any(one >> bit & 1 for one in ids)]
        return flags
