"""Where a shard's records lie: one pass over a tar's headers, strict about anything that is not
a whole archive.

A record is a run of neighbouring members that share a key (`data.names`). Tars are read as people
make them: links stand for what they point at, archives joined with `cat` are read to their end,
sidecars are passed over. What is passed over is counted. tarfile stops silently at a damaged header
and at a missing end mark; here both are errors that name the shard and the byte, because silence
would shrink the data set unseen.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import BinaryIO, cast

from sailplan.config.fields import JsonObject
from sailplan.data.kinds import Place, choose
from sailplan.data.names import given, is_sidecar, readable, samples, split_name
from sailplan.data.parse import parse_json
from sailplan.data.shard_files import Shard, ShardFile, open_shard
from sailplan.errors import BadDataError

BLOCK = 512
READ_AT_ONCE = 1 << 20
SAMPLED_BLOCKS = 32
LONGEST_CHAIN = 16  # links that point at links


@dataclass
class RecordPlace:
    """One record of a shard: its key, its JSON's id and split, and where its members lie."""

    key: str
    id: str
    split: str = "train"
    members: list[Place] = field(
        default_factory=list
    )  # (extension, offset of the content in bytes, size in bytes)


@dataclass(frozen=True)
class Scan:
    """The records of a shard in the order in which they lie, and what was passed over: what ->
    how often, and the first.
    """

    records: list[RecordPlace] = field(default_factory=list)
    passed: dict[str, tuple[int, str]] = field(default_factory=dict)

    def pass_over(self, what: str, name: str, count: int = 1) -> None:
        """Count what no record has."""
        known, first = self.passed.get(what, (0, readable(name)))
        self.passed[what] = known + count, first


@dataclass(frozen=True)
class HeldOut:
    """The rule by which records that name no split are held out: `fraction` of the values of
    `by`, the same ones wherever they lie.
    """

    fraction: float
    by: str = "id"

    def split(self, record_id: str, body: Mapping[str, object]) -> str:
        """Return the split of a record; a larger fraction holds out the same records, and
        others.
        """
        value = record_id if self.by == "id" else body.get(self.by)
        name = json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else given(value)
        word = int.from_bytes(
            hashlib.blake2b((record_id if name is None else name).encode(), digest_size=8).digest(),
            "little",
        )
        return "held_out" if word < int(self.fraction * 2**64) else "train"


def scan(shard: Shard, held_out: HeldOut | None = None) -> Scan:
    """Return all records of a tar. held_out: splits those that name no split.

    A record without a JSON `id` is called SHARD/KEY, so that plain shards with keys 000000.. stay
    unique. A JSON that cannot be parsed keeps its record (id SHARD/KEY): reading it later is one
    bad sample, not the end of the run.
    Raises BadDataError naming shard and offset when the archive is truncated, compressed or
    damaged, OSError for a file that cannot be read.
    """
    found, stem = Scan(), readable(shard.stem)
    with open_shard(shard) as file:
        members = _resolved(list(_members(shard, file, found)), found)
        for _, run in groupby(members, key=lambda member: split_name(member[0])[0]):
            own = list(run)
            for key, places in samples([name for name, _, _ in own]):
                record = RecordPlace(readable(key), f"{stem}/{readable(key)}")
                record.members = [
                    (readable(extension), *own[number][1:]) for number, extension in places
                ]
                _read_identity(file, record, held_out)
                found.records.append(record)
    return found


def _members(shard: Shard, file: ShardFile, found: Scan) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yield name and header of all members that may belong to a record, of all archives that the
    file joins.
    """
    size = file.size
    start: int | None = 0
    while start is not None:
        file.seek(start)
        try:
            with tarfile.open(fileobj=cast(BinaryIO, file), mode="r:") as archive:
                for member in archive:
                    if member.isdir():
                        continue
                    if is_sidecar(member.name):
                        found.pass_over("sidecars and hidden files", member.name)
                    elif not split_name(member.name)[1]:
                        found.pass_over("members without an ending", member.name)
                    elif member.issparse() or not (
                        member.isfile() or member.islnk() or member.issym()
                    ):
                        found.pass_over("members that are no plain files", member.name)
                    else:
                        yield member.name, member
                end = archive.offset
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise BadDataError(
                f"{shard}: not a whole uncompressed tar ({error}); expected a webdataset shard: "
                "copy or write it again"
            ) from error
        if start and end == start:  # what follows an end mark need not be an archive
            found.pass_over("bytes after an end mark", f"byte {start}", size - start)
            return
        _expect_end_mark(shard, file, end)
        start = _next_archive(file, end)


def _expect_end_mark(shard: Shard, file: ShardFile, end: int) -> None:
    size = file.size
    if end >= size:
        raise BadDataError(
            f"{shard}: the tar stops at byte {size} without its end mark, it was probably cut off: "
            "copy or write it again"
        )
    if file.scan_at(end, BLOCK).strip(b"\0"):
        raise BadDataError(
            f"{shard}: damaged tar header at byte {end} of {size}: copy or write it again"
        )


def _next_archive(file: ShardFile, end: int) -> int | None:
    """Return where the first block after an end mark lies that is not empty, None where all are."""
    for offset in range(end, file.size, READ_AT_ONCE):
        content = file.scan_at(offset, READ_AT_ONCE)
        rest = content.lstrip(b"\0")
        if rest:
            return offset + (len(content) - len(rest)) // BLOCK * BLOCK
    return None


def _resolved(
    members: list[tuple[str, tarfile.TarInfo]], found: Scan
) -> list[tuple[str, int, int]]:
    """Return name, offset and size of each member; a link has those of the file of the archive
    that it points at.
    """
    if not any(header.islnk() or header.issym() for _, header in members):
        return [(name, header.offset_data, header.size) for name, header in members]
    known = {posixpath.normpath(name): header for name, header in members if header.isfile()}
    links = {
        posixpath.normpath(name): _target(name, header)
        for name, header in members
        if not header.isfile()
    }
    result = []
    for name, header in members:
        place = posixpath.normpath(name)
        for _ in range(LONGEST_CHAIN):
            if header.isfile() or place not in links:
                break
            place = links[place]
        pointed = header if header.isfile() else known.get(place)
        if pointed is None:
            found.pass_over("links to what the archive does not hold", name)
        else:
            result.append((name, pointed.offset_data, pointed.size))
    return result


def _target(name: str, header: tarfile.TarInfo) -> str:
    """The member that a link points at: a hard link names it from the archive's root, a symbolic
    one from its own folder.
    """
    return posixpath.normpath(
        header.linkname
        if header.islnk()
        else posixpath.join(posixpath.dirname(name), header.linkname)
    )


def _read_identity(file: ShardFile, record: RecordPlace, held_out: HeldOut | None) -> None:
    place, body = choose(record.members).json, JsonObject()
    if place is not None:
        with suppress(ValueError):  # reported when the record is read, see RecordReader
            body = parse_json(file.scan_at(place[1], place[2]))
    record.id = given(body.get("id")) or record.id
    record.split = given(body.get("split")) or (
        record.split if held_out is None else held_out.split(record.id, body)
    )


def fingerprint(file: ShardFile, header_offsets: list[int]) -> str:
    """A hash of up to 32 evenly spread record starts (header block and the block behind it):
    equal for a copied file, different for a shard that was written anew with other records.
    `header_offsets`: first header
    of each record."""
    digest = hashlib.sha256()
    count = min(len(header_offsets), SAMPLED_BLOCKS)
    chosen = [
        header_offsets[turn * (len(header_offsets) - 1) // max(count - 1, 1)]
        for turn in range(count)
    ]
    file.want([(offset, min(offset + 2 * BLOCK, file.size)) for offset in chosen])
    for offset in chosen:
        digest.update(file.read_at(offset, 2 * BLOCK))
    return digest.hexdigest()[:16]
