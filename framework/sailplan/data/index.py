"""The shard index: where each record of a data set lies, found once and kept beside the shards.

A data set's records are numbered 0 .. n-1 in the order of its shards (sorted names) and of the
records within them: these numbers are the *positions* of the plan. What is known of the shards lies
in one manifest (`data.tables`), their tables in one mapped file. Opening looks at the manifest, and
at the sizes and times of up to 1,000 shards, evenly spread: so a small set is checked as a whole,
and a start costs the same for any large one. Each shard is checked when it is first opened. Folders
that cannot be written keep their index in the cache folder.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sailplan.config.fields import JsonObject
from sailplan.data.columns import Damaged
from sailplan.data.filling import Progress
from sailplan.data.id_table import IdTable, open_ids
from sailplan.data.shard_files import Shard, ShardFile, open_shard
from sailplan.data.shard_table import VERSION, ShardTable, has_changed, scanned
from sailplan.data.shard_table import id_hash as id_hash
from sailplan.data.stream.shard import RemoteShard
from sailplan.data.tables import Tables, open_tables
from sailplan.data.tar import HeldOut
from sailplan.errors import BadDataError
from sailplan.runtime.leaving import first_to_say, say

TABLES_KEPT = 1024  # mapped, so each costs its head, not its size
CHECKED = 1000  # shards that are looked at when a set is opened
REMOTE_CHECKED = 8  # of those that lie elsewhere: each is a request
ASKED_TOGETHER = 32


class RecordEntry(NamedTuple):
    """What the table of its shard says of a record."""

    shard: int
    id: str
    split: str
    members: list[tuple[str, int, int]]  # (extension, offset, size)


class ShardIndex:
    """The records of a data set over all its shards.

    `len(index)` records; `ids(positions)`; `find(id)`; `count(split)` and `select(split, numbers)`;
    `locate(position)`.
    Memory: a few numbers a shard and the heads of the 1,024 tables used last, whatever the number
    of records.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        cache: Path | None = None,
        progress: Callable[[], None] | Progress = lambda: None,
        held_out: HeldOut | None = None,
        *,
        processes: int = 1,
        thorough: bool = False,
    ) -> None:
        """Open the index; scan the shards that it lacks, together with all other processes that do.

        held_out: splits records that name no split. processes: how many scan. thorough: look at
        every shard, and
        compare every checksum. Raises BadDataError for a shard that is not a whole tar."""
        self.shards: list[Shard] = [
            Path(shard) if isinstance(shard, str) else shard for shard in shards
        ]  # to parse 10^5 paths again takes a second
        self._cache, self._thorough = cache, thorough
        rule = (
            ""
            if held_out is None
            else f".held-{hashlib.sha256(repr(held_out).encode()).hexdigest()[:8]}"
        )
        self._kind = f"shards-{VERSION}{rule}"
        told = progress if isinstance(progress, Progress) else Progress(progress)
        self._tables: OrderedDict[int, ShardTable] = OrderedDict()
        self._lock = threading.RLock()
        self.loaded = 0  # tables looked at so far, for counting
        self._last: tuple[int, RecordEntry | None] = (-1, None)
        self._ids: IdTable | None = None
        self._use(
            open_tables(
                self.shards,
                self._kind,
                cache,
                lambda shard: scanned(self.shards[shard], held_out),
                self._stale,
                told,
                processes=processes,
                thorough=thorough,
            )
        )

    def _use(self, tables: Tables) -> None:
        self._tables_of, rows = tables, tables.rows
        whole = "\0".join(
            f"{count} {content:016x}"
            for count, content in zip(
                rows["records"].tolist(), rows["content"].tolist(), strict=True
            )
        )
        self.identity = hashlib.sha256(whole.encode()).hexdigest()[:16]
        self.split_names = tables.tags()
        self._records: NDArray[np.int64] = rows["records"].astype(np.int64)
        self.starts = _running(self._records)
        self._firsts = array("q", self.starts.tobytes())  # the same for one position at a time
        self._split_counts, self._split_starts = (
            dict[str, NDArray[np.int64]](),
            dict[str, NDArray[np.int64]](),
        )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tables": OrderedDict(), "_lock": None, "_ids": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def digest(self) -> str:
        """Return a hash of what `description` says, without making it: names, sizes, records and
        their splits, in order.
        """
        found = hashlib.sha256("\0".join(shard.name for shard in self.shards).encode())
        for values in (
            self._tables_of.rows["size"],
            self._records,
            *map(self._tables_of.counts, sorted(self.split_names)),
        ):
            found.update(np.ascontiguousarray(values, dtype=np.int64).tobytes())
        return f"{found.hexdigest()[:16]} {self.identity}"

    def description(self) -> JsonObject:
        """Return what another rank's index must equal: shard name -> size in bytes and records
        by split, and a hash of the ids.
        """
        shards: JsonObject = {
            shard.name: {"bytes": int(size)}
            for shard, size in zip(self.shards, self._tables_of.rows["size"], strict=True)
        }
        for split in self.split_names:
            for shard, count in zip(
                self.shards, self._tables_of.counts(split).tolist(), strict=True
            ):
                if count:
                    shards[shard.name][split] = count
        return {
            "shards": shards,
            "order": [shard.name for shard in self.shards],
            "ids": self.identity,
        }

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
            rows = numbers[chosen] - starts[shard]
            if (
                self._split_counts[split][shard] != self._records[shard]
            ):  # else all of the shard's records are of the split
                rows = self._table(shard).rows(split)[rows]
            result[chosen] = self.starts[shard] + rows
        return result

    def numbers_in(self, split: str, shard: int) -> tuple[int, int]:
        """Return the number of the first of the split's records in a shard, and how many it has
        there.
        """
        starts = self._starts_of(split)
        return int(starts[shard]), int(starts[shard + 1] - starts[shard])

    def positions(self, split: str | None) -> NDArray[np.int64]:
        """Sorted positions of a split's records (None: of all); int64 [n].

        Eight bytes a record: for sets that fit.
        """
        if split is None:
            return np.arange(len(self), dtype=np.int64)
        return (
            self.select(split, np.arange(self.count(split), dtype=np.int64))
            if self.count(split)
            else np.empty(0, dtype=np.int64)
        )

    def locate(self, position: int) -> tuple[int, ShardTable, int]:
        """Shard number, the shard's table, and the record's row in it."""
        if not 0 <= position < self._firsts[-1]:
            raise IndexError(f"record {position} of {len(self)}")
        shard = bisect_right(self._firsts, position) - 1
        return shard, self._table(shard), position - self._firsts[shard]

    def entry(self, position: int) -> RecordEntry:
        """Return what the table says of the record at a position; the last one is kept."""
        known, entry = self._last
        if known != position:
            shard, table, row = self.locate(position)
            entry = RecordEntry(shard, *table.record(row))
            self._last = position, entry
        assert entry is not None
        return entry

    def ids(self, positions: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Record ids of the positions, in their order."""
        result = []
        for position in positions:
            _, table, row = self.locate(int(position))
            result.append(table.ids[row])
        return result

    @property
    def tables(self) -> Tables:
        """What the manifest says of each shard."""
        return self._tables_of

    def check_shard(self, shard: int) -> None:
        """Raise BadDataError where a shard is not what it was when it was indexed.

        Raises OSError where it cannot be read.
        """
        if self._changed(self._tables_of, shard):
            path = self.shards[shard]
            raise BadDataError(
                f"{path}: changed since it was indexed, expected the same records; run `sailplan "
                "data index`, then start again"
            )

    def open_shard(self, shard: int) -> ShardFile:
        """Return a shard's bytes; of one that lies elsewhere, in the version that was indexed.

        Raises BadDataError where it is another, OSError where it cannot be read.
        """
        path, row = self.shards[shard], self._tables_of.rows[shard]
        version = int(row["version"])
        if not (isinstance(path, RemoteShard) and version < 0):  # else each read compares it
            self.check_shard(shard)
            version = 0
        return open_shard(path, version, int(row["size"]))

    def prepare_ids(self, progress: Callable[[], None] | Progress = lambda: None) -> None:
        """Make the file by which ids are found, where there is none."""
        self._found_ids(progress if isinstance(progress, Progress) else Progress(progress))

    def find_hashes(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Positions of the (first) records whose ids have these hashes, -1 where there is none:
        uint64 [n] -> int64 [n].
        """
        return self._found_ids().find_hashes(hashes)

    def size(self, position: int) -> int:
        """Bytes of the record's members."""
        return sum(size for _, _, size in self.entry(position).members)

    def find(self, record_id: str) -> int | None:
        """Position of the (first) record with this id, or None."""
        return self._found_ids().find(record_id)

    def passed_over(self, shard: int) -> dict[str, tuple[int, str]]:
        """Return what the shard's scan passed over: what -> how often, and the first
        (`data.tar.Scan`).
        """
        return self._table(shard).passed

    # ---------------------------------------------------------------- parts
    def _starts_of(self, split: str) -> NDArray[np.int64]:
        """Records of the split before each shard; made when first asked for, as a set may have
        many splits that nobody uses.
        """
        if split not in self._split_starts:
            self._split_counts[split] = self._tables_of.counts(split)
            self._split_starts[split] = _running(self._split_counts[split])
        return self._split_starts[split]

    def _found_ids(self, progress: Progress | None = None) -> IdTable:
        with self._lock:
            if self._ids is None:
                name = f"{self._kind}.{self.identity}.ids"
                self._ids = open_ids(
                    self.shards[0],
                    name,
                    self._cache,
                    len(self),
                    self._hashed(),
                    progress or Progress(),
                )
            return self._ids

    def _hashed(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
        for shard in range(len(self.shards)):
            yield self._table(shard).hashes()

    def _table(self, shard: int) -> ShardTable:
        with self._lock:
            if shard not in self._tables:
                self._tables[shard] = self._opened(self._tables_of, shard)
                self.loaded += 1
                if len(self._tables) > TABLES_KEPT:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(shard)
            return self._tables[shard]

    @staticmethod
    def _opened(tables: Tables, shard: int) -> ShardTable:
        try:
            return ShardTable(tables.table(shard), lambda error: tables.damaged(shard, error))
        except (KeyError, TypeError) as error:
            raise tables.damaged(shard, error) from error

    def _stale(self, tables: Tables, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which shards are not what the manifest says: of many, some are looked at; where one of
        them is, all are.
        """
        result = np.zeros(len(numbers), dtype=np.bool_)
        first = self.shards[0]
        remote = isinstance(first, RemoteShard)
        most = REMOTE_CHECKED if remote else CHECKED
        if isinstance(first, RemoteShard) and first.whole and not self._thorough:
            return result  # to look at one is to fetch it
        step = 1 if self._thorough else max(1, -(-len(numbers) // most))
        self._look_at(tables, numbers, result, range(0, len(numbers), step))
        if step > 1 and result.any():
            self._look_at(tables, numbers, result, np.flatnonzero(~result).tolist())
        changed = numbers[result].tolist()
        if changed:
            line = (
                f"{self.shards[changed[0]]}{f' and {len(changed) - 1} more' if changed[1:] else ''}: "
                "changed since its index was made, or the index is damaged: read again"
            )
            if first_to_say(line, None):
                say(line)
        return result

    def _look_at(
        self,
        tables: Tables,
        numbers: NDArray[np.int64],
        result: NDArray[np.bool_],
        places: Sequence[int],
    ) -> None:
        def old(place: int) -> bool:
            return self._old(tables, int(numbers[place]))

        if isinstance(self.shards[0], RemoteShard):
            with ThreadPoolExecutor(ASKED_TOGETHER) as threads:
                found = list(threads.map(old, places))
        else:
            found = [old(place) for place in places]
        result[list(places)] = found

    def _old(self, tables: Tables, shard: int) -> bool:
        try:
            return self._changed(tables, shard)
        except (OSError, BadDataError, Damaged):
            return True

    def _changed(self, tables: Tables, shard: int) -> bool:
        row = tables.rows[shard]
        return has_changed(
            self.shards[shard],
            int(row["size"]),
            int(row["version"]),
            int(row["scanned"]),
            int(row["fingerprint"]),
            lambda: self._opened(tables, shard).headers(),
        )


def _running(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """[0, c0, c0 + c1, ...]"""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
