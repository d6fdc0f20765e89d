"""The manifest of a folder of shards: one mapped file that says, of each shard, what it was when
it was read and where its table lies.

Tables of all shards lie one after the other in one file beside it (`blob`), which only grows; a
manifest is replaced as a whole. So a reader that has an older manifest goes on reading what it
knows. Names are relative to the folder: a copy of it stays valid. A manifest that is missing, cut,
flipped or of another version is the same as none.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sailplan.data.columns import Columns, Damaged, mapped, pack, packed_strings, unpacked_strings

ROW = np.dtype(
    [
        ("size", "<i8"),  # bytes of the shard
        (
            "version",
            "<i8",
        ),  # time of its last change in ns; 0: too young to be relied on, the fingerprint decides
        ("scanned", "<i8"),  # when it was read, ns: what is written later is another shard
        ("fingerprint", "<u8"),  # hash of up to 32 of its record starts (`tar.fingerprint`)
        ("records", "<i8"),
        ("content", "<u8"),  # hash of the ids and splits of its records, in order
        ("offset", "<i8"),  # of its table in the blob, in bytes
        ("bytes", "<i8"),
    ]
)
Rows = NDArray[np.void]


@dataclass(frozen=True)
class Entry:
    """What is known of one shard, and its table.

    tags: names with counts, such as splits and their records.
    """

    size: int
    version: int
    scanned: int
    fingerprint: int
    records: int
    content: int
    tags: Mapping[str, int]
    table: bytes


@dataclass(frozen=True)
class Manifest:
    """Rows of n shards, and t counts by tag."""

    blob: str  # name of the file of tables
    end: int  # bytes of it that are used
    names: list[str]  # n
    rows: Rows  # [n]
    tags: list[str]
    tag_rows: NDArray[np.int64]  # [t] whose count it is, rising
    tag_codes: NDArray[np.int64]  # [t] of what: index into `tags`
    tag_counts: NDArray[np.int64]  # [t]

    @classmethod
    def of_entries(cls, blob: str, names: Sequence[str], entries: Sequence[Entry]) -> Manifest:
        """Return the manifest of entries whose tables lie one after the other in a blob."""
        offset, rows, codes = 0, np.zeros(len(entries), dtype=ROW), dict[str, int]()
        tags: list[tuple[int, int, int]] = []
        for number, entry in enumerate(entries):
            length = len(entry.table)
            rows[number] = (
                entry.size,
                entry.version,
                entry.scanned,
                entry.fingerprint,
                entry.records,
                entry.content,
                offset,
                length,
            )
            tags += [
                (number, codes.setdefault(name, len(codes)), count)
                for name, count in entry.tags.items()
            ]
            offset += length
        table = np.array(tags, dtype=np.int64).reshape(-1, 3)
        return cls(
            blob, offset, list(names), rows, list(codes), table[:, 0], table[:, 1], table[:, 2]
        )

    def moved(self, start: int) -> Manifest:
        """Return the manifest for tables that lie `start` bytes further on."""
        rows = self.rows.copy()
        rows["offset"] += start
        return replace(self, rows=rows)

    def joined(self, others: Sequence[Manifest], end: int) -> Manifest:
        """Return this manifest with the rows of others, of which the last of a name counts; all
        in this one's blob.
        """
        every = [self, *others]
        names = [name for one in every for name in one.names]
        last = {name: number for number, name in enumerate(names)}
        kept = np.array(sorted(last.values()), dtype=np.int64)
        codes: dict[str, int] = {}
        start, tags = 0, [np.empty((3, 0), dtype=np.int64)]
        for one in every:
            recoded = np.array(
                [codes.setdefault(tag, len(codes)) for tag in one.tags], dtype=np.int64
            )
            own = recoded[one.tag_codes] if len(recoded) else one.tag_codes
            tags.append(np.stack([one.tag_rows + start, own, one.tag_counts]))
            start += len(one.names)
        place = np.full(len(names), -1, dtype=np.int64)
        place[kept] = np.arange(len(kept))
        table = np.concatenate(tags, axis=1)
        table[0] = place[table[0]]
        table = table[:, table[0] >= 0]
        rows = np.concatenate([one.rows for one in every])[kept]
        return Manifest(
            self.blob,
            end,
            [names[number] for number in kept.tolist()],
            rows,
            list(codes),
            table[0],
            table[1],
            table[2],
        )

    def save(self, file: Path) -> None:
        """Write the manifest, whole or not at all."""
        arrays = {
            "names": packed_strings(self.names),
            "rows": np.ascontiguousarray(self.rows)
            .view("<i8")
            .reshape(len(self.rows), ROW.itemsize // 8),
            "tags": packed_strings(self.tags),
            "tag_rows": self.tag_rows,
            "tag_codes": self.tag_codes,
            "tag_counts": self.tag_counts,
        }
        note = {"blob": self.blob, "end": self.end, "tags": len(self.tags)}
        replace_file(file, pack(arrays, note))

    @classmethod
    def load(cls, file: Path, *, alone: bool = False) -> Manifest | None:
        """Return a file's manifest, read in one go; None where there is no whole one with its
        blob. alone: the blob lies elsewhere.
        """
        try:
            columns = Columns(buffer := mapped(file), 0, len(buffer))
            columns.check()
            note, rows = columns.note, columns.whole("rows").copy().view(ROW).reshape(-1)
            found = cls(
                str(note["blob"]),
                int(note["end"]),
                unpacked_strings(columns.whole("names"), len(rows)),
                rows,
                unpacked_strings(columns.whole("tags"), int(note["tags"])),
                columns.whole("tag_rows").copy(),
                columns.whole("tag_codes").copy(),
                columns.whole("tag_counts").copy(),
            )
            whole = Path(found.blob).name == found.blob and (
                alone or os.stat(file.with_name(found.blob)).st_size >= found.end
            )
        except (OSError, Damaged, ValueError, KeyError, TypeError):
            return None
        return found if whole else None


def replace_file(file: Path, content: bytes) -> None:
    """Write a file under a temporary name and put it in its place."""
    temporary = file.with_name(f".{file.name}-{os.getpid()}-{secrets.token_hex(4)}")
    with open(temporary, "wb") as target:
        target.write(content)
    os.replace(temporary, file)
