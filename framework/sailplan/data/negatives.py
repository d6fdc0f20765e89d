"""Mined hard negatives: for every record of a data set's pattern, the records whose targets are
its hard negatives.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sailplan.config.schema import PatternKey

ROUND = "round.json"  # of a round of mining, in its folder: patterns, files, thresholds


@dataclass(frozen=True)
class MatchThreshold:
    """lambda* of a pattern, a cosine: of the full size and of shorter Matryoshka prefixes.

    prefixes None: a file of version 0.1.0, whose full-size value served every prefix.
    """

    full: float
    prefixes: Mapping[int, float] | None = None

    def at(self, sizes: Iterable[int] | None) -> float | dict[int, float]:
        """Return the value of each size; None: of the full size alone."""
        if sizes is None:
            return self.full
        return {size: (self.prefixes or {}).get(size, self.full) for size in sizes}


@dataclass(frozen=True)
class HardNegativeStore:
    """Hold positions int64 [n, K] of each pattern, in memory or mapped, and its lambda*.

    Row i = negatives of the record at position i (n = records of the set), each the position of a
    record of the same set whose target item is the negative, -1 where absent.
    """

    positions: dict[PatternKey, NDArray[np.int64]] = field(default_factory=dict)
    thresholds: dict[PatternKey, MatchThreshold] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write one .npz, complete or not at all."""
        path = Path(path)
        arrays = {
            f"positions:{key}": value.astype(np.int64) for key, value in self.positions.items()
        }
        thresholds = {
            f"threshold:{key}": np.float64(value.full) for key, value in self.thresholds.items()
        }
        save_arrays(path, {**arrays, **thresholds})

    @classmethod
    def load(cls, path: str | Path) -> HardNegativeStore:
        """Map a round of mining (a folder), or read what `save` wrote."""
        path, store = Path(path), cls()
        if path.is_dir():
            note = json.loads((path / ROUND).read_text(encoding="utf-8"))
            for written, found in note["patterns"].items():
                key = PatternKey.parse(written)
                store.positions[key] = np.load(path / found["negatives"], mmap_mode="r")
                store.thresholds[key] = MatchThreshold(
                    float(found["threshold"]["value"]),
                    {int(size): float(one["value"]) for size, one in found["prefixes"].items()},
                )
            return store
        with np.load(path) as arrays:
            for name in arrays.files:
                kind, _, written = name.partition(":")
                key = PatternKey.parse(written)
                if kind == "positions":
                    store.positions[key] = arrays[name]
                else:
                    store.thresholds[key] = MatchThreshold(float(arrays[name]))
        return store


def save_arrays(path: Path, arrays: dict[str, NDArray[np.generic] | np.generic]) -> None:
    """np.savez to a temporary name in the same folder, then renamed: a reader never sees half a
    file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.npz")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)
