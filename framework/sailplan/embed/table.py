"""Rows of a view as a table that lies in the store: its length is known, its rows are read when
they are asked for.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sailplan.embed.rows import EmbeddedRows
from sailplan.embed.selection import Positions
from sailplan.embed.shards import Shards
from sailplan.embed.store import FUSED, ViewStore, block

READ_ROWS = 4096


class Table(Protocol):
    """n rows of a view; EmbeddedRows is one that is in memory."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> EmbeddedRows:
        """Return rows start .. stop - 1."""
        ...

    def identify(self, start: int, stop: int) -> EmbeddedRows:
        """Return rows start .. stop - 1, of which positions and ids are looked at."""
        ...

    def take(self, rows: NDArray[np.int64], /) -> EmbeddedRows:
        """Return the rows of these numbers int64 [k], in their order."""
        ...


class EmbeddedTable:
    """Row i is record `shown[i]`, whose vectors are those of position `stored[i]` of the view's
    store.

    The two differ where a record shows an item of the catalogue; there -1 is no item. stored may
    repeat, and need not rise.
    """

    def __init__(
        self,
        view: ViewStore,
        shown: Positions,
        stored: Positions,
        kinds: tuple[str, ...] = (FUSED,),
    ) -> None:
        self._view, self._shown, self._stored, self.kinds = view, shown, stored, kinds

    def __len__(self) -> int:
        return len(self._shown)

    def read(self, start: int, stop: int) -> EmbeddedRows:
        """Return rows start .. stop - 1."""
        return self._rows(slice(start, min(stop, len(self))), self.kinds)

    def take(self, rows: NDArray[np.int64]) -> EmbeddedRows:
        """Return the rows of these numbers int64 [k], in their order."""
        return self._rows(rows, self.kinds)

    def identify(self, start: int, stop: int) -> EmbeddedRows:
        """Return positions and ids of rows start .. stop - 1, with vectors of no dimension."""
        return self._rows(slice(start, min(stop, len(self))), ())

    def _rows(self, wanted: slice | NDArray[np.int64], kinds: tuple[str, ...]) -> EmbeddedRows:
        shown = np.asarray(self._shown[wanted])
        stored = shown if self._stored is self._shown else np.asarray(self._stored[wanted])
        if len(stored) and stored[0] >= 0 and bool((np.diff(stored) > 0).all()):
            found = self._view.read(stored, kinds)
            return EmbeddedRows(found.fused, found.ids, shown, found.valid, found.by_modality)
        distinct, back = np.unique(stored, return_inverse=True)
        absent = bool(len(distinct)) and distinct[0] < 0
        rows = self._view.read(distinct[1:] if absent else distinct, kinds)
        if absent:
            rows = _with_nothing_first(rows)
        found = rows.take(back.reshape(-1).astype(np.int64))
        return EmbeddedRows(found.fused, found.ids, shown, found.valid, found.by_modality)


class SequentialTable:
    """All rows of one request in its order: where a record gives several rows."""

    def __init__(self, shards: Shards) -> None:
        self._shards, self.kinds = shards, shards.kinds

    def __len__(self) -> int:
        return self._shards.rows

    def read(self, start: int, stop: int) -> EmbeddedRows:
        """Return rows start .. stop - 1."""
        found = self._shards.slice(start, min(stop, len(self)), self.kinds)
        rows = found.pop("rows")
        vectors = {kind: part.astype(np.float32) for kind, part in found.items()}
        return block(rows[:, 0].copy(), rows[:, 1].copy(), vectors)

    def identify(self, start: int, stop: int) -> EmbeddedRows:
        """Return positions and ids of rows start .. stop - 1, with vectors of no dimension."""
        rows = self._shards.slice(start, min(stop, len(self)), ())["rows"]
        return block(rows[:, 0].copy(), rows[:, 1].copy(), {})

    def take(self, rows: NDArray[np.int64]) -> EmbeddedRows:
        """Return the rows of these numbers int64 [k], in their order."""
        if not len(rows):
            return self.read(0, 0)
        start, stop = int(rows.min()), int(rows.max()) + 1
        return self.read(start, stop).take(rows - start)


def in_memory(table: Table) -> EmbeddedRows:
    """Return a table's rows in memory: for samples and small sets."""
    return table if isinstance(table, EmbeddedRows) else table.read(0, len(table))


def _with_nothing_first(rows: EmbeddedRows) -> EmbeddedRows:
    """Return the rows after one without anything."""

    def padded(part: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros(1, part.shape[1]), part])

    return EmbeddedRows(
        padded(rows.fused),
        torch.cat([torch.tensor([-1]), rows.ids]),
        np.concatenate([[-1], rows.positions]),
        np.concatenate([[False], rows.valid]),
        {name: padded(part) for name, part in rows.by_modality.items()},
    )
