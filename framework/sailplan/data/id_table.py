"""Record id -> position, for sets of any size: a sorted file of hashes, mapped, so that the
processes of a node share one copy.

Ids are found by 64 bits of hash and 24 bits that tell ids of one hash apart; an id that is not
there is taken for another with a chance of 10^-19 a record. A directory of buckets of about 512
hashes makes a search a matter of one or two pages, whose checksums are compared when they are first
read. The file is made from the hashes in the shards' tables, in constant memory: spilled by the
hashes' first bits, each part sorted on its own.
"""

from __future__ import annotations

import os
import secrets
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from sailplan.data.columns import PAGE, Columns, Damaged, front, layout, mapped
from sailplan.data.filling import Progress, alone
from sailplan.data.places import explained, kept_places, place_to_write
from sailplan.data.shard_files import Shard
from sailplan.data.shard_table import CHECK_BITS, id_check, id_hash
from sailplan.data.stream.published import published
from sailplan.data.stream.shard import RemoteShard
from sailplan.errors import BadDataError

VERSION = 1
BUCKET = 512  # hashes of a bucket, about
SORTED_AT_ONCE = 1 << 22  # records, 16 bytes each
POSITION_BITS = 64 - CHECK_BITS
POSITION_MASK = (1 << POSITION_BITS) - 1
Hashed = Iterable[
    tuple[NDArray[np.uint64], NDArray[np.uint64]]
]  # id_hash and id_check of a shard's records


class IdTable:
    """Positions by id: `find(id)`, `find_hashes(hashes)`."""

    def __init__(self, file: Path, count: int) -> None:
        """Map a file for a set of `count` records.

        Raises OSError, Damaged where it is no whole file for them.
        """
        columns = Columns(buffer := mapped(file), 0, len(buffer))
        try:
            if columns.note["version"] != VERSION or columns.length("hashes") != count:
                raise Damaged("another version, or another number of records")
            bits = int(columns.note["bits"])
            self._directory = (
                columns.whole("directory").copy().data
            )  # plain integers, faster than an array's
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged("a head without what it needs") from error
        self._columns, self._shift, self.file = columns, 64 - bits, file
        self._hashes, self._values = (
            columns.unchecked("hashes").data,
            columns.unchecked("values").data,
        )

    def find(self, record_id: str) -> int | None:
        """Return the position of the first record with an id, None where there is none."""
        wanted, check = id_hash(record_id), id_check(record_id)
        bucket = wanted >> self._shift
        low, high = self._directory[bucket], self._directory[bucket + 1]
        try:
            self._columns.ensure("hashes", low, high)
            place = bisect_left(self._hashes, wanted, low, high)
            while place < high and self._hashes[place] == wanted:
                self._columns.ensure("values", place, place + 1)
                value = self._values[place]
                if value >> POSITION_BITS == check:
                    return value & POSITION_MASK
                place += 1
        except Damaged as error:
            raise self._damaged(error) from error
        return None

    def find_hashes(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the positions of the first records of these hashes, -1 where there is none:
        uint64 [n] -> int64 [n].
        """
        count = self._columns.length("hashes")
        if not count or not len(hashes):
            return np.full(len(hashes), -1, dtype=np.int64)
        try:
            for bucket in np.unique(hashes >> np.uint64(self._shift)).tolist():
                self._columns.ensure("hashes", self._directory[bucket], self._directory[bucket + 1])
            known = self._columns.unchecked("hashes")
            places = np.minimum(np.searchsorted(known, hashes), count - 1)
            values = self._columns.take("values", places) & np.uint64(POSITION_MASK)
        except Damaged as error:
            raise self._damaged(error) from error
        return np.where(known[places] == hashes, values.astype(np.int64), -1)

    def _damaged(self, error: Exception) -> BadDataError:
        return BadDataError(
            f"{self.file}: was damaged while the run used it ({error}), expected sorted ids; "
            "delete it and start again"
        )


def open_ids(
    shard: Shard, name: str, cache: Path | None, count: int, hashed: Hashed, progress: Progress
) -> IdTable:
    """Return the table of ids in the file `name` beside a shard or in the cache, made from
    `hashed` where there is no whole one.

    One of the processes that want it makes it. Raises ConfigurationError where it cannot be
    written.
    """
    for place in kept_places(shard, name, cache):
        if (found := _opened(place, count)) is not None:
            return found
    beside = published(shard, name, cache) if isinstance(shard, RemoteShard) else None
    if beside is not None and (found := _opened(beside.file, count)) is not None:
        return found
    place = place_to_write(shard, name, cache)
    with explained(place, cache):
        lock = open(place.with_name(f"{name}.lock"), "ab")  # noqa: SIM115
    with lock, alone(lock, 0, progress):
        if (found := _opened(place, count)) is None:
            with explained(place, cache):
                temporary = place.with_name(f".{place.name}-{os.getpid()}-{secrets.token_hex(4)}")
                try:
                    write_ids(temporary, count, hashed, progress)
                    os.replace(temporary, place)
                finally:
                    temporary.unlink(missing_ok=True)
            found = IdTable(place, count)
    return found


def _opened(place: Path, count: int) -> IdTable | None:
    try:
        return IdTable(place, count)
    except (OSError, Damaged):
        return None


def write_ids(file: Path, count: int, hashed: Hashed, progress: Progress) -> None:
    """Write the sorted table of `count` ids, those of position 0 ..

    first; at most 200 MB of memory.
    """
    bits = max(1, (count // BUCKET).bit_length())
    parts = 1 << max(0, (count - 1) // SORTED_AT_ONCE).bit_length()
    directory = np.zeros((1 << bits) + 1, dtype=np.int64)
    eight = np.dtype("<u8")
    extents, size = layout(
        {
            "hashes": (eight, (count,)),
            "values": (eight, (count,)),
            "directory": (np.dtype("<i8"), directory.shape),
        }
    )
    note = {"version": VERSION, "bits": bits}
    start = len(front(extents, note, np.zeros(-(-size // PAGE), dtype="<u4"), size))
    with ExitStack() as files:
        spilled = (
            [files.enter_context(open(f"{file}.{part}", "w+b")) for part in range(parts)]
            if parts > 1
            else []
        )
        for part in range(len(spilled)):
            os.unlink(f"{file}.{part}")  # gone when closed, however this ends
        target = files.enter_context(open(file, "w+b"))
        done = 0
        target.truncate(start + size)
        for records in _sorted_parts(hashed, spilled, progress):
            directory[1:] += np.bincount(
                (records[:, 0] >> np.uint64(64 - bits)).astype(np.int64), minlength=1 << bits
            )
            for column, name in enumerate(("hashes", "values")):
                target.seek(start + extents[name][2] + done * 8)
                target.write(np.ascontiguousarray(records[:, column]).tobytes())
            done += len(records)
            progress.advance(0)
        target.seek(start + extents["directory"][2])
        target.write(np.cumsum(directory).tobytes())
        target.seek(start)
        sums = np.zeros(-(-size // PAGE), dtype="<u4")
        for page in range(len(sums)):
            sums[page] = crc32(target.read(min(PAGE, size - page * PAGE)))
        target.seek(0)
        target.write(front(extents, note, sums, size))


def _sorted_parts(
    hashed: Hashed, spilled: Sequence, progress: Progress
) -> Iterable[NDArray[np.uint64]]:  # type: ignore[type-arg]
    """Yield (hash, value) uint64 [n, 2] of all records, sorted, in runs; equal hashes by
    position.
    """
    bits = len(spilled).bit_length() - 1
    waiting: list[NDArray[np.uint64]] = []
    position = held = 0
    for hashes, checks in hashed:
        places = np.arange(position, position + len(hashes), dtype=np.uint64)
        waiting.append(np.stack([hashes, checks << np.uint64(POSITION_BITS) | places], axis=1))
        position, held = position + len(hashes), held + len(hashes)
        if spilled and held >= SORTED_AT_ONCE:
            _spill(np.concatenate(waiting), spilled, bits)
            waiting, held = [], 0
            progress.advance(0)
    rest = np.concatenate(waiting) if waiting else np.empty((0, 2), dtype=np.uint64)
    if not spilled:
        yield rest[np.argsort(rest[:, 0], kind="stable")]
        return
    _spill(rest, spilled, bits)
    del rest, waiting
    for file in spilled:
        file.seek(0)
        part = np.frombuffer(file.read(), dtype=np.uint64).reshape(-1, 2)
        yield part[np.argsort(part[:, 0], kind="stable")]


def _spill(records: NDArray[np.uint64], spilled: Sequence, bits: int) -> None:  # type: ignore[type-arg]
    parts = (records[:, 0] >> np.uint64(64 - bits)).astype(np.int64)
    order = np.argsort(parts, kind="stable")
    edges = np.cumsum(np.bincount(parts, minlength=len(spilled)))[:-1]
    for file, run in zip(spilled, np.split(records[order], edges), strict=True):
        file.write(run.tobytes())
