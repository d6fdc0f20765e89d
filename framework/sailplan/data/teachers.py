"""Teacher vectors by item id, such as the ID embeddings of a recommender that id2item distils
(recipe section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.data.negatives import save_arrays


class Teachers(Protocol):
    """Vectors of items by id, from one table in memory or from mapped files
    (`data.teacher_files`).
    """

    @property
    def names(self) -> list[str]:
        """The teachers' names, sorted."""

    def dimension(self, teacher: str) -> int:
        """Return the length of the teacher's vectors."""

    def look_up(self, teacher: str, item_ids: Iterable[str]) -> Tensor:
        """Return float32 [n, d] of the items, zero rows where unknown."""


class TeacherTable:
    """For each teacher a float32 matrix [items, d] over one list of item ids; a zero row:
    unknown to that teacher.
    """

    def __init__(self, ids: Sequence[str], vectors: Mapping[str, NDArray[np.float32]]) -> None:
        self.ids = list(ids)
        self.vectors = {
            name: np.asarray(matrix, dtype=np.float32) for name, matrix in vectors.items()
        }
        for name, matrix in self.vectors.items():
            if matrix.ndim != 2 or len(matrix) != len(self.ids):
                raise ValueError(
                    f"teacher '{name}' has the shape {matrix.shape}, expected [{len(self.ids)}, "
                    "d]: one row per item id"
                )
        self._rows = {item_id: row for row, item_id in enumerate(self.ids)}

    @property
    def names(self) -> list[str]:
        """The teachers' names, sorted."""
        return sorted(self.vectors)

    def dimension(self, teacher: str) -> int:
        return int(self.vectors[teacher].shape[1])

    def __getitem__(self, item_id: str) -> dict[str, NDArray[np.float32]]:
        """{teacher: vector} of an item; empty where unknown."""
        row = self._rows.get(item_id)
        return {} if row is None else {name: matrix[row] for name, matrix in self.vectors.items()}

    def look_up(self, teacher: str, item_ids: Iterable[str]) -> Tensor:
        """float32 [n, d] of the items, zero rows where unknown."""
        rows = [self._rows.get(item_id, -1) for item_id in item_ids]
        result = np.zeros((len(rows), self.dimension(teacher)), dtype=np.float32)
        known = [place for place, row in enumerate(rows) if row >= 0]
        result[known] = self.vectors[teacher][[rows[place] for place in known]]
        return torch.from_numpy(result)

    def save(self, path: str | Path) -> None:
        """Write one .npz, complete or not at all."""
        save_arrays(
            Path(path),
            {
                "ids": np.array(self.ids),
                **{f"vectors:{name}": matrix for name, matrix in self.vectors.items()},
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> TeacherTable:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return cls(
                arrays["ids"].tolist(),
                {name.partition(":")[2]: arrays[name] for name in arrays.files if name != "ids"},
            )
