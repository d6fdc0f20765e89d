"""One side of a comparison: rows of unit vectors that are asked for in parts, in memory or in the
embedding store.

What is compared is float64, so that equal rows score equal whatever the part they are read in.
Numbers of records and ids of the rows are listed, 16 bytes a row; vectors are not.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.embed.table import Table

PART = 4096  # rows whose ids are read at once


class Side(Protocol):
    """n rows of D numbers."""

    device: torch.device

    def __len__(self) -> int: ...

    def part(self, start: int, stop: int) -> Tensor:
        """Return unit rows float64 [stop - start, D] on the device."""
        ...

    def take(self, rows: Tensor) -> Tensor:
        """Return unit rows float64 [k, D] of these numbers int64 [k]."""
        ...

    def cut(self, size: int) -> Side:
        """Return the side with rows of their first `size` numbers."""
        ...


def unit(vectors: Tensor) -> Tensor:
    """Rows of length one, float64 [n, D]; an all-zero row stays zero."""
    rows = vectors.to(torch.float64, copy=True)
    return rows.div_(rows.norm(dim=-1, keepdim=True).clamp_min_(1e-12))


class InMemory:
    """Rows of a tensor."""

    def __init__(self, vectors: Tensor) -> None:
        self._vectors, self.device = vectors, vectors.device

    def __len__(self) -> int:
        return len(self._vectors)

    def part(self, start: int, stop: int) -> Tensor:
        return unit(self._vectors[start:stop])

    def take(self, rows: Tensor) -> Tensor:
        return unit(self._vectors[rows.to(self.device)])

    def cut(self, size: int) -> InMemory:
        return InMemory(self._vectors[:, :size])


class StoredSide:
    """Rows of a table in the store: those that have vectors, or some of them."""

    def __init__(
        self,
        table: Table,
        device: torch.device,
        numbers: NDArray[np.int64],
        ids: Tensor,
        positions: NDArray[np.int64],
        size: int | None = None,
    ) -> None:
        """numbers, ids, positions int64 [n]: of each row in the table, its document, its record."""
        self._table, self.device, self._numbers, self._size = table, device, numbers, size
        self.ids, self.positions = ids, positions

    @staticmethod
    def of(table: Table, device: torch.device) -> StoredSide:
        """Return the valid rows of a table, whose ids are read in parts."""
        numbers, ids, positions = [], [], []
        for start in range(0, len(table), PART):
            found = table.identify(start, min(len(table), start + PART))
            valid = np.flatnonzero(found.valid)
            numbers.append(start + valid)
            ids.append(found.ids[torch.from_numpy(valid)])
            positions.append(found.positions[valid])
        empty = np.empty(0, dtype=np.int64)
        return StoredSide(
            table,
            device,
            np.concatenate([empty, *numbers]),
            torch.cat([torch.from_numpy(empty), *ids]),
            np.concatenate([empty, *positions]),
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def part(self, start: int, stop: int) -> Tensor:
        return self._read(self._numbers[start:stop])

    def take(self, rows: Tensor) -> Tensor:
        return self._read(self._numbers[rows.cpu().numpy()])

    def cut(self, size: int) -> StoredSide:
        return StoredSide(self._table, self.device, self._numbers, self.ids, self.positions, size)

    def where(self, keep: NDArray[np.bool_]) -> StoredSide:
        """Return the rows of a bool mask [n]."""
        kept = self.ids[torch.from_numpy(keep)]
        numbers, positions = self._numbers[keep], self.positions[keep]
        return StoredSide(self._table, self.device, numbers, kept, positions, self._size)

    def _read(self, numbers: NDArray[np.int64]) -> Tensor:
        # Rising numbers are read in one go, each once
        distinct, back = np.unique(numbers, return_inverse=True)
        rows = unit(self._table.take(distinct).fused[:, : self._size].to(self.device))
        if len(distinct) == len(numbers) and bool((distinct == numbers).all()):
            return rows
        return rows[torch.from_numpy(back.reshape(-1)).to(self.device)]


def side_of(vectors: Tensor | Side) -> Side:
    """Return a side of a tensor [n, D]; one that is a side already as it is."""
    return InMemory(vectors) if isinstance(vectors, Tensor) else vectors
