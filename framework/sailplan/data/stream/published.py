"""Index files that lie beside shards elsewhere, as `.index` of the folder that was copied there.

A manifest is copied whole. Of the file of tables only those that are asked for are: into a file of
the same size with holes, which the processes of a machine map together.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from sailplan.data.columns import MAGIC
from sailplan.data.places import cache_folder, explained
from sailplan.data.stream.ranges import Range
from sailplan.data.stream.shard import RemoteFile, RemoteShard
from sailplan.errors import BadDataError

COPIED_AT_ONCE = 8 << 20  # bytes


@dataclass(frozen=True)
class Published:
    """A copy of a file, and the shard whose `.index` it lies in."""

    file: Path
    shard: RemoteShard

    def ensure(self, blob: str, end: int, offset: int, size: int) -> None:
        """Have a table in the copy of a file of tables that is `end` bytes long.

        Raises OSError.
        """
        path = self.file.with_name(blob)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if os.fstat(descriptor).st_size < end:
                os.truncate(descriptor, end)
            if os.pread(descriptor, len(MAGIC), offset) != MAGIC:
                with _index_file(self.shard, blob).open() as source:
                    content = source.read_at(offset, size)
                # Its beginning last: who sees it sees a whole table
                os.pwrite(descriptor, content[len(MAGIC) :], offset + len(MAGIC))
                os.pwrite(descriptor, content[: len(MAGIC)], offset)
        finally:
            os.close(descriptor)


def published(shard: RemoteShard, name: str, cache: Path | None) -> Published | None:
    """Return a copy of `.index/NAME` beside a shard, in its present version; None where there is
    none.
    """
    if shard.whole:
        return None
    beside = _index_file(shard, name)
    try:
        size, version = beside.state(fresh=True)
    except BadDataError:  # there is none, or a server that refuses what it does not have
        return None
    if beside.whole or not size:
        return None
    digest = hashlib.sha256(str(version).encode()).hexdigest()[:12]
    place = cache_folder(shard, cache) / "published" / digest / name
    if not place.exists():
        with explained(place, cache):
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = place.with_name(f".{name}-{os.getpid()}-{secrets.token_hex(4)}")
            with beside.open(version, size) as source, open(temporary, "wb") as file:
                for content in _chunks(source):
                    file.write(content)
            os.replace(temporary, place)
    return Published(place, shard)


def _chunks(source: RemoteFile) -> list[bytes]:
    parts: list[Range] = [
        (start, min(start + COPIED_AT_ONCE, source.size))
        for start in range(0, source.size, COPIED_AT_ONCE)
    ]
    return [source.read_at(start, stop - start) for start, stop in parts]


def _index_file(shard: RemoteShard, name: str) -> RemoteShard:
    return shard.beside(f".index/{name}")
