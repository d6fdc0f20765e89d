"""Rows of a view with their vectors: a block of them in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class EmbeddedRows:
    """Vectors of n rows of a view, on the CPU, in the order of the positions asked for."""

    fused: Tensor  # float32 [n, D], not normalised
    # int64 [n]; equal ids = the same document (text-only views: the same text); -1: not valid
    ids: Tensor
    # [n] record positions; repeated where a record gives several rows (text_from, history)
    positions: NDArray[np.int64]
    valid: NDArray[np.bool_]  # [n]; False where the record has nothing of the view's modalities
    # modality -> float32 [n, D], when asked for
    by_modality: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, rows: NDArray[np.int64]) -> EmbeddedRows:
        """The rows of these indices int64 [k], in their order."""
        index = torch.from_numpy(rows)
        parts = {name: part[index] for name, part in self.by_modality.items()}
        return EmbeddedRows(
            self.fused[index], self.ids[index], self.positions[rows], self.valid[rows], parts
        )

    def read(self, start: int, stop: int) -> EmbeddedRows:
        """Return rows start .. stop - 1."""
        return self.take(np.arange(start, min(stop, len(self)), dtype=np.int64))

    def identify(self, start: int, stop: int) -> EmbeddedRows:
        """Return rows start .. stop - 1, of which positions and ids are looked at."""
        return self.read(start, stop)

    def where(self, keep: NDArray[np.bool_]) -> EmbeddedRows:
        """The rows of a bool mask [n]."""
        return self.take(np.flatnonzero(keep))
