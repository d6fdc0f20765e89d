"""The table of one shard: ids, splits and member places of its records, read from mapped columns
a record at a time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import overload
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from sailplan.data.columns import Columns, Damaged, pack, packed_strings, unpacked_strings
from sailplan.data.manifest import Entry
from sailplan.data.shard_files import Shard, open_shard, state_of
from sailplan.data.tar import BLOCK, SAMPLED_BLOCKS, HeldOut, RecordPlace, fingerprint, scan
from sailplan.errors import BadDataError
from sailplan.runtime.arrays import Array

VERSION = 5  # of what the columns mean
CHECK_BITS = 24
# A file may change again without another time of change, as clocks of file systems are coarse
YOUNG_SECONDS = 2.0


def id_hash(record_id: str) -> int:
    """Unsigned 64-bit hash of a record id."""
    return int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest(), "little")


def id_check(record_id: str) -> int:
    """Return further CHECK_BITS of a record id, which tell ids of one hash apart."""
    return crc32(record_id.encode()) & ((1 << CHECK_BITS) - 1)


class ShardTable:
    """Of m records: `ids`, `split(row)`, `rows(split)`, `record(row)`, `hashes()`.

    A damaged page raises what `damaged` makes of it.
    """

    def __init__(self, columns: Columns, damaged: Callable[[Exception], BadDataError]) -> None:
        self._columns, self._damaged = columns, damaged
        self.split_names: list[str] = columns.note["splits"]
        self._extensions: list[str] = columns.note["extensions"]
        self._unit: int = columns.note["unit"]
        self._rows: dict[str, NDArray[np.int64]] = {}
        self.ids = Ids(self)

    def __len__(self) -> int:
        return self._columns.length("splits")

    @property
    def passed(self) -> dict[str, tuple[int, str]]:
        """What the scan passed over: what -> how often, and the first (`data.tar.Scan`)."""
        return {
            what: (count, first) for what, (count, first) in self._columns.note["passed"].items()
        }

    def part(self, name: str, low: int, high: int) -> Array:
        """Return rows low .. high - 1 of a column."""
        try:
            return self._columns.part(name, low, high)
        except Damaged as error:
            raise self._damaged(error) from error

    def record(self, row: int) -> tuple[str, str, list[tuple[str, int, int]]]:
        """Return id, split and members of a record: (extension, offset, size) of each member."""
        columns, unit, extensions = self._columns, self._unit, self._extensions
        try:
            start, after = columns.numbers("id_starts", row, row + 2)
            low, high = columns.numbers("member_starts", row, row + 2)
            return (
                columns.content("ids", start, after - 1).decode(),
                self.split_names[columns.numbers("splits", row, row + 1)[0]],
                [
                    (extensions[code], offset * unit, size)
                    for code, offset, size in zip(
                        columns.numbers("extensions", low, high),
                        columns.numbers("offsets", low, high),
                        columns.numbers("sizes", low, high),
                        strict=True,
                    )
                ],
            )
        except Damaged as error:
            raise self._damaged(error) from error

    def split(self, row: int) -> str:
        """Return the split of a record."""
        return self.split_names[int(self.part("splits", row, row + 1)[0])]

    def rows(self, split: str) -> NDArray[np.int64]:
        """Return the rows of the split's records, rising."""
        if split not in self._rows:
            codes = self.part("splits", 0, len(self))
            self._rows[split] = np.flatnonzero(codes == self.split_names.index(split)).astype(
                np.int64
            )
        return self._rows[split]

    def hashes(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Return `id_hash` and `id_check` of all records, each uint64 [m]."""
        return self.part("hashes", 0, len(self)), self.part("checks", 0, len(self)).astype(
            np.uint64
        )

    def headers(self) -> list[int]:
        """Return where up to 32 evenly spread records begin, in bytes."""
        count = min(len(self), SAMPLED_BLOCKS)
        rows = [turn * (len(self) - 1) // max(count - 1, 1) for turn in range(count)]
        return [self.record(row)[2][0][1] - BLOCK for row in rows]


class Ids(Sequence[str]):
    """The ids of a shard's records, decoded when asked for."""

    def __init__(self, table: ShardTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return list(self)[row]
        row = range(len(self))[row]
        low, high = self._table.part("id_starts", row, row + 2).tolist()
        return self._table.part("ids", low, high - 1).tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        total = int(self._table.part("id_starts", len(self), len(self) + 1)[0])
        try:
            return iter(unpacked_strings(self._table.part("ids", 0, max(total - 1, 0)), len(self)))
        except Damaged as error:
            raise self._table._damaged(error) from error


def scanned(shard: Shard, held_out: HeldOut | None) -> Entry:
    """Return the entry of a shard, read from its tar.

    Raises BadDataError for one that cannot be read or is no whole tar.
    """
    try:
        began = time.time_ns()
        size, changed = state_of(shard, fresh=True)
        found = scan(shard, held_out)
        records = found.records
        # the header lies one block before the content (long names add blocks before it, which does
        # not matter here)
        with open_shard(shard, changed, size) as file:
            mark = fingerprint(file, [record.members[0][1] - BLOCK for record in records])
    except OSError as error:
        raise BadDataError(
            f"{shard}: cannot be read ({error.strerror or error}); check its permissions and the "
            "disk"
        ) from error
    members = [member for record in records for member in record.members]
    splits, extensions, counts = dict[str, int](), dict[str, int](), dict[str, int]()
    for record in records:
        splits.setdefault(record.split, len(splits))
        counts[record.split] = counts.get(record.split, 0) + 1
    offsets = np.array([offset for _, offset, _ in members], dtype=np.int64)
    unit = BLOCK if not (offsets % BLOCK).any() else 1
    ids = [record.id for record in records]
    arrays: dict[str, Array] = {
        "splits": _narrow([splits[record.split] for record in records]),
        "ids": packed_strings(ids),
        "id_starts": _narrow(np.cumsum([0] + [len(name.encode()) + 1 for name in ids])),
        "hashes": np.array([id_hash(name) for name in ids], dtype=np.uint64),
        "checks": np.array([id_check(name) for name in ids], dtype=np.uint32),
        "member_starts": _narrow(np.cumsum([0] + [len(record.members) for record in records])),
        "extensions": _narrow(
            [extensions.setdefault(extension, len(extensions)) for extension, _, _ in members]
        ),
        "offsets": _narrow(offsets // unit),
        "sizes": _narrow([size for _, _, size in members]),
    }
    note = {
        "version": VERSION,
        "unit": unit,
        "splits": list(splits),
        "extensions": list(extensions),
        "passed": found.passed,
    }
    young = isinstance(shard, Path) and time.time_ns() - changed <= YOUNG_SECONDS * 1e9
    version = 0 if young else changed
    return Entry(
        size,
        version,
        max(began, changed),  # a file server's clock may be ahead of this machine's
        int(mark, 16),
        len(records),
        _content(records),
        counts,
        pack(arrays, note),
    )


def has_changed(
    shard: Shard,
    size: int,
    version: int,
    scanned: int,
    mark: int,
    headers: Callable[[], list[int]],
    *,
    fresh: bool = True,
) -> bool:
    """Return whether a shard is another than it was when it had this size, version and
    fingerprint. Raises OSError.

    scanned: when it was read, in ns. A file that was written later is taken for another one: only
    some of its bytes are in the fingerprint. headers: where some of its records began. They are
    read only where no time is a proof: a file that was copied before is the same, with another
    time.
    """
    found_size, found = state_of(shard, fresh=fresh)
    if found_size != size:
        return True
    if version and found == version:
        return False
    if isinstance(shard, Path) and found > scanned:
        return True
    with open_shard(shard, found, found_size) as file:
        return int(fingerprint(file, headers()), 16) != mark


def _content(records: Sequence[RecordPlace]) -> int:
    """Hash of the ids and splits of a shard's records in their order."""
    whole = "".join(f"{record.id}\0{record.split}\0" for record in records)
    return int(hashlib.sha256(whole.encode()).hexdigest()[:16], 16)


def _narrow(values: Sequence[int] | NDArray[np.int64]) -> Array:
    """Return whole numbers of 0 or more in the fewest bytes that hold all of them."""
    wide = np.asarray(values, dtype=np.int64)
    most = int(wide.max(initial=0))
    return wide.astype(
        next(
            kind
            for kind in (np.uint8, np.uint16, np.uint32, np.int64)
            if most <= np.iinfo(kind).max
        )
    )
