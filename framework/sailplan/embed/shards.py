"""What was asked of the embedding store at once, as shards on disk: each has one writer, and is
there whole or not at all.

    REQUEST/request.json          what it is of; written first
    REQUEST/0000012.fused.npy     [k, D] vectors of shard 12; so, too, for each modality asked for
    REQUEST/0000012.rows.npy      int64 [k, 2]: position and id of each row; written last
    REQUEST/starts.npy            int64 [shards + 1]: rows before each shard
    REQUEST/firsts.npy            int64 [shards]: the first position of each shard's part
    REQUEST/complete.json         all shards are there

Shards are opened for a read and closed after it: what a rank has in memory is what it asked for,
however large the request. A read opens the shards that its rows lie in, two or more files each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sailplan.config.fields import JsonView
from sailplan.runtime.arrays import Array, save
from sailplan.runtime.files import write_whole

REQUEST, COMPLETE, STARTS, FIRSTS = "request.json", "complete.json", "starts.npy", "firsts.npy"


class Shards:
    """The shards of one request. `count` positions, `size` of them a shard."""

    def __init__(self, folder: Path, about: JsonView) -> None:
        self.folder, self.kinds = folder, tuple(about["kinds"])
        self.count, self.size = int(about["count"]), int(about["size"])
        self._starts: NDArray[np.int64] | None = None
        self._firsts: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return -(-self.count // self.size)

    @property
    def rows(self) -> int:
        """Number of rows of all shards, once complete."""
        return int(self.starts[-1])

    @property
    def starts(self) -> NDArray[np.int64]:
        if self._starts is None:
            self._starts = np.load(self.folder / STARTS)
        return self._starts

    def part(self, shard: int) -> slice:
        """Return which of the request's positions a shard is about."""
        return slice(shard * self.size, min(self.count, (shard + 1) * self.size))

    # ---------------------------------------------------------------- writing
    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not there yet."""
        there = {
            int(name.partition(".")[0])
            for name in os.listdir(self.folder)
            if name.endswith(".rows.npy")
        }
        return [shard for shard in range(len(self)) if shard not in there]

    def write(self, shard: int, rows: NDArray[np.int64], vectors: Mapping[str, Array]) -> None:
        """Write a shard: rows int64 [k, 2] positions and ids; kind -> vectors [k, D]."""
        for kind in self.kinds:
            save(self._path(shard, kind), vectors[kind])
        save(self._path(shard, "rows"), rows)

    def rows_of(self, shard: int) -> int:
        """Return the number of rows of a shard."""
        return int(np.load(self._path(shard, "rows"), mmap_mode="r").shape[0])

    def finish(self, rows: NDArray[np.int64], firsts: NDArray[np.int64]) -> None:
        """Note that all shards are there: rows int64 [shards] of each."""
        save(self.folder / STARTS, np.concatenate([[0], np.cumsum(rows)]).astype(np.int64))
        save(self.folder / FIRSTS, firsts)
        write_whole(self.folder / COMPLETE, json.dumps({"rows": int(rows.sum())}))

    # ---------------------------------------------------------------- reading
    def find(
        self, positions: NDArray[np.int64], kinds: Sequence[str] = ()
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64], dict[str, NDArray[np.float32]]]:
        """Return of rising positions int64 [k] which are here [k], and of those their ids int64
        [h] and vectors float32 [h, D] by kind.
        """
        if self._firsts is None:
            self._firsts = np.load(self.folder / FIRSTS)
        shards = np.searchsorted(self._firsts, positions, side="right") - 1
        here, ids = np.zeros(len(positions), dtype=bool), np.zeros(len(positions), dtype=np.int64)
        parts: dict[str, list[NDArray[np.float32]]] = {kind: [] for kind in kinds}
        for shard in np.unique(shards[shards >= 0]).tolist():
            asked = slice(*np.searchsorted(shards, [shard, shard + 1]).tolist())
            rows = self.take(shard, "rows", None)
            places = np.searchsorted(rows[:, 0], positions[asked])
            found = places < len(rows)
            found[found] = rows[places[found], 0] == positions[asked][found]
            here[asked], places = found, places[found]
            ids[asked][found] = rows[places, 1]
            if len(places):
                for kind in kinds:
                    parts[kind].append(self.take(shard, kind, places).astype(np.float32))
        empty = np.zeros((0, 0), np.float32)
        return (
            here,
            ids[here],
            {kind: np.concatenate(some) if some else empty for kind, some in parts.items()},
        )

    def slice(self, start: int, stop: int, kinds: Sequence[str]) -> dict[str, Array]:
        """Return rows start .. stop - 1 in the order of the shards: "rows" and kinds."""
        found: dict[str, list[Array]] = {name: [] for name in ("rows", *kinds)}
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            upto = min(stop, int(self.starts[shard + 1]))
            if upto > start:
                places = np.arange(start, upto) - self.starts[shard]
                for name, parts in found.items():
                    parts.append(self.take(shard, name, places))
            start, shard = max(start, upto), shard + 1
        return {
            name: np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)
            for name, parts in found.items()
        }

    def take(self, shard: int, name: str, places: NDArray[np.int64] | None) -> Array:
        """Return rows of one of a shard's arrays, None: all; a copy that keeps no file open."""
        path = self._path(shard, name)
        if places is None:
            return np.load(path)
        mapped = np.load(path, mmap_mode="r")
        first, count = (int(places[0]), len(places)) if len(places) else (0, 0)
        if not (
            count and int(places[-1]) - first == count - 1 and bool((np.diff(places) == 1).all())
        ):
            return np.array(mapped[places])
        with open(path, "rb") as file:  # read, not mapped: no page stays with this process
            file.seek(mapped.offset + first * mapped.strides[0])
            flat = np.fromfile(file, mapped.dtype, count * int(np.prod(mapped.shape[1:])))
        return flat.reshape(count, *mapped.shape[1:])

    def _path(self, shard: int, name: str) -> Path:
        return self.folder / f"{shard:07d}.{name}.npy"
