"""Where a shard's records lie: one pass over a tar's headers, strict about anything that is not a whole archive.

A record is the run of members that share a key: the member's name up to the first dot of its last path component
(the webdataset convention). tarfile stops silently at a damaged header and at a missing end mark; here both are
errors that name the shard and the byte, because silence would shrink the data set unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from sailplan.errors import BadDataError

BLOCK = 512
SAMPLED_BLOCKS = 32


@dataclass
class RecordPlace:
    """One record of a shard: its key, its JSON's id and split, and where its members lie."""

    key: str
    id: str
    split: str = "train"
    members: list[tuple[str, int, int]] = field(default_factory=list)  # (extension, offset of the content in bytes, size in bytes)


def split_name(name: str) -> tuple[str, str]:
    """('a/b.1', 'jpg') style key and extension: 'a/b.0.jpg' -> ('a/b', '0.jpg'); extension in lower case."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def scan(shard: Path) -> list[RecordPlace]:
    """All records of a tar in the order in which they lie.

    A record without a JSON `id` is called SHARD/KEY, so that plain shards with keys 000000.. stay unique. A JSON that
    cannot be parsed keeps its record (id SHARD/KEY): reading it later is one bad sample, not the end of the run.
    Raises BadDataError naming shard and offset when the archive is truncated, compressed or damaged.
    """
    records: list[RecordPlace] = []
    try:
        with tarfile.open(shard, mode="r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                key, extension = split_name(member.name)
                if not extension:
                    continue
                if not records or records[-1].key != key:
                    records.append(RecordPlace(key, f"{shard.stem}/{key}"))
                records[-1].members.append((extension, member.offset_data, member.size))
            end = archive.offset
    except (tarfile.TarError, EOFError) as error:
        raise BadDataError(f"{shard}: not a whole uncompressed tar ({error}); expected a webdataset shard: copy or write it again") from error
    with open(shard, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        _expect_end_mark(shard, file.fileno(), end, size)
        for record in records:
            _read_identity(file.fileno(), record)
    return records


def _expect_end_mark(shard: Path, descriptor: int, end: int, size: int) -> None:
    if end >= size:
        raise BadDataError(f"{shard}: the tar stops at byte {size} without its end mark, it was probably cut off: copy or write it again")
    if os.pread(descriptor, BLOCK, end).strip(b"\0"):
        raise BadDataError(f"{shard}: damaged tar header at byte {end} of {size}: copy or write it again")


def _read_identity(descriptor: int, record: RecordPlace) -> None:
    for extension, offset, size in record.members:
        if extension == "json":
            try:
                body = json.loads(os.pread(descriptor, size, offset))
            except ValueError:  # reported when the record is read, see RecordReader
                return
            if isinstance(body, dict):
                record.id = str(body.get("id") or record.id)
                record.split = str(body.get("split") or record.split)


def fingerprint(shard: Path, header_offsets: list[int]) -> str:
    """A hash of up to 32 evenly spread record starts (header block and the block behind it): equal for a copied file,
    different for a shard that was written anew with other records. `header_offsets`: first header of each record."""
    digest = hashlib.sha256()
    count = min(len(header_offsets), SAMPLED_BLOCKS)
    with open(shard, "rb") as file:
        for turn in range(count):
            offset = header_offsets[turn * (len(header_offsets) - 1) // max(count - 1, 1)]
            digest.update(os.pread(file.fileno(), 2 * BLOCK, offset))
    return digest.hexdigest()[:16]
