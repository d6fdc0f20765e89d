"""The shard index: where each record of a data set lies, found once and kept in a small file beside the shards.

A data set's records are numbered 0 .. n-1 in the order of its shards (sorted names) and of the records within them:
these numbers are the *positions* of the plan. Per shard one `.index/NAME.npz` holds ids, splits and member places
as flat arrays; it is written to a temporary name and renamed, so ranks may race. An index is used only when the
shard's size and the fingerprint of its record starts still agree. Folders that cannot be written keep their index
in the cache folder. Shard tables are loaded when a record of theirs is read, the least recently used are dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sailplan.data.places import explained, kept_places, place_to_write
from sailplan.data.tar import BLOCK, HeldOut, RecordPlace, fingerprint, scan
from sailplan.errors import BadDataError

VERSION = 3
TABLES_KEPT = 128


@dataclass(frozen=True)
class ShardTable:
    """The index of one shard; m records, k members."""

    ids: list[str]  # m
    splits: NDArray[np.int32]  # [m] index into split_names
    split_names: list[str]
    member_starts: NDArray[np.int64]  # [m + 1] members of record i are member_starts[i] .. member_starts[i + 1]
    extensions: list[str]  # k
    offsets: NDArray[np.int64]  # [k] bytes
    sizes: NDArray[np.int64]  # [k] bytes

    def rows(self, split: str) -> NDArray[np.int64]:
        """Rows of the split's records, rising."""
        return np.flatnonzero(self.splits == self.split_names.index(split)).astype(np.int64)

    def members(self, row: int) -> list[tuple[str, int, int]]:
        """(extension, offset, size) of each member of the record."""
        return [
            (self.extensions[member], int(self.offsets[member]), int(self.sizes[member]))
            for member in range(int(self.member_starts[row]), int(self.member_starts[row + 1]))
        ]


def id_hash(record_id: str) -> int:
    """Unsigned 64-bit hash of a record id."""
    return int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest(), "little")


class ShardIndex:
    """The records of a data set over all its shards.

    `len(index)` records; `ids(positions)`; `find(id)`; `count(split)` and `select(split, numbers)`; `locate(position)`.
    Memory: a few numbers a shard and the tables of the 128 shards used last, whatever the number of records; 16 bytes
    a record once `find` is used (catalogues).
    """

    def __init__(
        self, shards: Sequence[Path], cache: Path | None = None, progress: Callable[[], None] = lambda: None, held_out: HeldOut | None = None
    ) -> None:
        """Opens or builds the index of each shard, and calls `progress` behind each.

        held_out: splits records that name no split. Raises BadDataError for a shard that is not a whole tar."""
        self.shards = [Path(shard) for shard in shards]
        self._files: list[Path] = []
        for shard in self.shards:
            self._files.append(_ensure(shard, cache, held_out))
            progress()
        self._tables: OrderedDict[int, ShardTable] = OrderedDict()
        self._lock = threading.RLock()
        summaries = [_summary(file) for file in self._files]
        counts = [summary[0] for summary in summaries]
        self._states = [summary[1] for summary in summaries]
        self.identity = hashlib.sha256("\0".join(f"{sum(shard.values())} {content}" for shard, _, content in summaries).encode()).hexdigest()[:16]
        self.loaded = 0  # tables read so far, for counting
        self.split_names = list(dict.fromkeys(name for shard in counts for name in shard))
        self.starts = _running([sum(shard.values()) for shard in counts])
        self._split_counts, self._split_starts = counts, dict[str, NDArray[np.int64]]()
        self._lookup: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def description(self) -> dict[str, Any]:
        """Return what another rank's index must equal: shard name -> size in bytes, records by split, and a hash of the ids."""
        shards: dict[str, Any] = {}
        for number, (shard, state) in enumerate(zip(self.shards, self._states, strict=True)):
            counts = {name: int(starts[number + 1] - starts[number]) for name, starts in self._split_starts.items()}
            shards[shard.name] = {"bytes": state[0], "headers": state[1], **{name: count for name, count in counts.items() if count}}
        return {"shards": shards, "order": [shard.name for shard in self.shards], "ids": self.identity}

    def count(self, split: str) -> int:
        """Number of records of a split."""
        return int(self._starts_of(split)[-1])

    def select(self, split: str, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of the split's records number 0 .. count - 1; int64 [n] -> int64 [n]."""
        starts = self._starts_of(split)
        shards = np.searchsorted(starts, numbers, side="right") - 1
        result = np.empty(len(numbers), dtype=np.int64)
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            result[chosen] = self.starts[shard] + self._table(shard).rows(split)[numbers[chosen] - starts[shard]]
        return result

    def positions(self, split: str | None) -> NDArray[np.int64]:
        """Sorted positions of a split's records (None: of all); int64 [n]. Eight bytes a record: for sets that fit."""
        if split is None:
            return np.arange(len(self), dtype=np.int64)
        return self.select(split, np.arange(self.count(split), dtype=np.int64)) if self.count(split) else np.empty(0, dtype=np.int64)

    def locate(self, position: int) -> tuple[int, ShardTable, int]:
        """Shard number, the shard's table, and the record's row in it."""
        if not 0 <= position < len(self):
            raise IndexError(f"record {position} of {len(self)}")
        shard = int(np.searchsorted(self.starts, position, side="right")) - 1
        return shard, self._table(shard), position - int(self.starts[shard])

    def ids(self, positions: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Record ids of the positions, in their order."""
        result = []
        for position in positions:
            _, table, row = self.locate(int(position))
            result.append(table.ids[row])
        return result

    def file(self, shard: int) -> Path:
        """The shard's index file."""
        return self._files[shard]

    def state(self, shard: int) -> tuple[int, str]:
        """The shard's size in bytes and its fingerprint, as they were when it was indexed."""
        return self._states[shard]

    def find_hashes(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Positions of the (first) records whose ids have these hashes, -1 where there is none: uint64 [n] -> int64 [n]."""
        known, order = self._hashes()
        if not len(known):
            return np.full(len(hashes), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        return np.where(known[places] == hashes, order[places], -1)

    def size(self, position: int) -> int:
        """Bytes of the record's members."""
        _, table, row = self.locate(position)
        return sum(size for _, _, size in table.members(row))

    def find(self, record_id: str) -> int | None:
        """Position of the (first) record with this id, or None."""
        hashes, order = self._hashes()
        wanted = np.uint64(id_hash(record_id))
        place = int(np.searchsorted(hashes, wanted))
        while place < len(hashes) and hashes[place] == wanted:
            if self.ids([order[place]])[0] == record_id:
                return int(order[place])
            place += 1
        return None

    def passed_over(self, shard: int) -> dict[str, tuple[int, str]]:
        """Return what the shard's scan passed over: what -> how often, and the first (`data.tar.Scan`)."""
        with np.load(self._files[shard]) as arrays:
            return {what: (count, first) for what, (count, first) in json.loads(arrays["passed"].tobytes()).items()}

    def _starts_of(self, split: str) -> NDArray[np.int64]:
        """Records of the split before each shard; made when first asked for, as a set may have many splits that nobody uses."""
        if split not in self._split_starts:
            self._split_starts[split] = _running([counts.get(split, 0) for counts in self._split_counts])
        return self._split_starts[split]

    def _hashes(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        if self._lookup is None:
            values = np.fromiter((id_hash(name) for shard in range(len(self.shards)) for name in self._table(shard).ids), np.uint64, len(self))
            order = np.argsort(values, kind="stable")
            self._lookup = values[order], order
        return self._lookup

    def _table(self, shard: int) -> ShardTable:
        with self._lock:
            if shard not in self._tables:
                table = _load(self._files[shard])
                if table is None:
                    raise BadDataError(f"{self._files[shard]}: the index vanished or was damaged while the run used it: start again")
                self._tables[shard] = table
                self.loaded += 1
                if len(self._tables) > TABLES_KEPT:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(shard)
            return self._tables[shard]


def _ensure(shard: Path, cache: Path | None, held_out: HeldOut | None) -> Path:
    """The shard's index file, built if it is missing or belongs to an older state of the shard."""
    rule = "" if held_out is None else f".held-{hashlib.sha256(repr(held_out).encode()).hexdigest()[:8]}"
    name = f"{shard.stem}{rule}.npz"
    for file in kept_places(shard, name, cache):
        if _is_current(file, shard):
            return file
    file = place_to_write(shard, name, cache)
    try:
        arrays = _scanned(shard, held_out)
    except OSError as error:
        raise BadDataError(f"{shard}: cannot be read ({error.strerror or error}); check its permissions and the disk") from error
    with explained(file, cache):
        temporary = file.with_name(f".{file.stem}-{os.getpid()}-{secrets.token_hex(4)}.npz")
        np.savez_compressed(temporary, **arrays)
        os.replace(temporary, file)
    return file


def _scanned(shard: Path, held_out: HeldOut | None) -> dict[str, Any]:
    """The arrays of a shard's index file."""
    found = scan(shard, held_out)
    records = found.records
    members = [member for record in records for member in record.members]
    # the header lies one block before the content (long names add blocks before it, which does not matter here)
    headers = [record.members[0][1] - BLOCK for record in records]
    names = {name: number for number, name in enumerate(dict.fromkeys(record.split for record in records))}
    return {
        "version": np.int64(VERSION),
        "size": np.int64(shard.stat().st_size),
        "fingerprint": np.array(fingerprint(shard, headers)),
        "headers": np.array(headers, dtype=np.int64),
        "content": np.array(_content(records)),
        "ids": _pack([record.id for record in records]),
        "splits": np.array([names[record.split] for record in records], dtype=np.int32),
        "split_names": _pack(list(names)),
        "member_starts": np.cumsum([0] + [len(record.members) for record in records], dtype=np.int64),
        "extensions": _pack([extension for extension, _, _ in members]),
        "offsets": np.array([offset for _, offset, _ in members], dtype=np.int64),
        "sizes": np.array([size for _, _, size in members], dtype=np.int64),
        "passed": np.frombuffer(json.dumps(found.passed).encode(), dtype=np.uint8),
    }


def _is_current(file: Path, shard: Path) -> bool:
    try:
        with np.load(file) as arrays:
            if int(arrays["version"]) != VERSION or int(arrays["size"]) != shard.stat().st_size:
                return False
            return str(arrays["fingerprint"]) == fingerprint(shard, arrays["headers"].tolist())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # absent, older or half-written: build it (again)
        return False


def _content(records: Sequence[RecordPlace]) -> str:
    """Hash of the ids and splits of a shard's records in their order."""
    return hashlib.sha256("".join(f"{record.id}\0{record.split}\0" for record in records).encode()).hexdigest()[:16]


def _summary(file: Path) -> tuple[dict[str, int], tuple[int, str], str]:
    """Records per split of one shard, its size and fingerprint, and the hash of its content, without loading its table."""
    with np.load(file) as arrays:
        names = _unpack(arrays["split_names"])
        counts = dict(zip(names, np.bincount(arrays["splits"], minlength=len(names)).tolist(), strict=True))
        return counts, (int(arrays["size"]), str(arrays["fingerprint"])), str(arrays["content"])


def _running(counts: list[int]) -> NDArray[np.int64]:
    """[0, c0, c0 + c1, ...]"""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _load(file: Path) -> ShardTable | None:
    try:
        with np.load(file) as arrays:
            return ShardTable(
                ids=_unpack(arrays["ids"]),
                splits=arrays["splits"],
                split_names=_unpack(arrays["split_names"]),
                member_starts=arrays["member_starts"],
                extensions=_unpack(arrays["extensions"]),
                offsets=arrays["offsets"],
                sizes=arrays["sizes"],
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _pack(strings: Sequence[str]) -> NDArray[np.uint8]:
    """Strings as one byte array (numpy's own fixed-width strings would cost four bytes a character of the longest)."""
    return np.frombuffer("\0".join(strings).encode() if strings else b"", dtype=np.uint8)


def _unpack(packed: NDArray[np.uint8]) -> list[str]:
    return packed.tobytes().decode().split("\0") if packed.size else []
