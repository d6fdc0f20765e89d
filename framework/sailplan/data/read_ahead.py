"""Bytes of coming steps on their way before the steps ask for them, where shards lie elsewhere.

The plan says which records a step reads. The order takes runs of `data.segment` neighbouring records
and shuffles within windows of several runs, so one request fetches a whole run: its other records
are asked for soon. That holds for a machine that trains alone. Of several, each reads its share of
every run; then a rank fetches its own rows, and those of a run that lie close in one request.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from sailplan.config.schema import Config
from sailplan.data.lengths import ROLES
from sailplan.data.plan import STREAMS, Plan, PlannedRows
from sailplan.data.reader import RecordReader
from sailplan.data.shares import StepShares

ROLES_OF = {  # the items that a view of this part shows, by the keys of a record that name them
    "query": ("query",),
    "target": ("item", "target", "items"),
    "history": ("history", "items"),
}
WINDOWS = 2  # of every stream, whose runs are not asked for twice


class ReadAhead:
    """Asks for what the steps of one rank read; `upto(step)` before a step is read."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        readers: Mapping[str, RecordReader],
        shares: StepShares,
        rank: int,
        size: int,
    ) -> None:
        self.plan, self.readers, self.shares, self.rank = plan, readers, shares, rank
        self.steps, self.segment = config.data.stream.ahead, config.data.segment
        on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        world = int(os.environ.get("WORLD_SIZE", "1"))
        self.alone = size == 1 or on_machine >= world
        self._asked: OrderedDict[tuple[str, int, int], None] = OrderedDict()
        self._most = WINDOWS * STREAMS * -(-config.data.window // self.segment)
        self._step, self._next = -1, 0

    def upto(self, step: int) -> None:
        """Ask for the rows of a step and of the next ones of this process."""
        if not any(reader.streamed for reader in self._read().values()):
            return
        worker = get_worker_info()
        stride = worker.num_workers if worker is not None else 1
        if step != self._step + stride:  # not the next one: what was asked for is of no use
            self._next = step
        last = step + self.steps * stride
        for coming in range(max(step, self._next), min(last + 1, self.plan.steps), stride):
            for number, part in enumerate(self.plan.step(coming).parts):
                self._ask(coming, number, part)
        self._step, self._next = step, last + stride

    # ---------------------------------------------------------------- parts
    def _read(self) -> dict[str, RecordReader]:
        found = {name: self.readers[name] for name in self.plan.names}
        return found | {
            reader.catalogue.name: reader.catalogue
            for reader in found.values()
            if reader.catalogue is not None
        }

    def _ask(self, step: int, number: int, part: PlannedRows) -> None:
        reader = self.readers[part.dataset]
        rows = np.arange(len(part), dtype=np.int64)
        if not self.alone:
            rows = np.flatnonzero(self.shares.step(step)[number].owners == self.rank)
        if reader.streamed:
            reader.prefetch(self._groups(part, rows))
        catalogue = reader.catalogue
        if catalogue is not None and catalogue.streamed and reader.lengths is not None:
            views = reader.config.views.values()
            roles = {role for view in views for role in ROLES_OF.get(view.of, ())}
            if reader.config.negatives:
                roles.add("negatives")
            lengths = reader.lengths.lengths(part.at(rows))
            named = np.isin(lengths.role, [ROLES.index(role) for role in roles])
            found = catalogue.index.find_hashes(np.unique(lengths.hash[named]))
            catalogue.prefetch([found[found >= 0]])

    def _groups(self, part: PlannedRows, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Positions that are fetched together: of whole runs, or of these rows in them."""
        numbers, size = part.numbers[rows], self.plan.size(part.dataset)
        runs, result = numbers // self.segment, []
        epochs = (part.first_row + rows) // size
        for epoch, run in sorted(set(zip(epochs.tolist(), runs.tolist(), strict=True))):
            if not self.alone:
                result.append(part.select(np.sort(numbers[(runs == run) & (epochs == epoch)])))
                continue
            key = (part.dataset, epoch, run)
            if key not in self._asked:
                stop = min((run + 1) * self.segment, size)
                result.append(part.select(np.arange(run * self.segment, stop, dtype=np.int64)))
                if len(self._asked) >= self._most:
                    self._asked.popitem(last=False)
            self._asked[key] = None
            self._asked.move_to_end(key)
        return result
