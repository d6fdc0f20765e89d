"""Write records as uncompressed USTAR shards, the same bytes every time.

A record is `KEY.json` first, then `KEY.webp` and `KEY.ogg` where present. Times, owners and modes
are fixed, JSON keys are sorted. USTAR pads every member to 512 bytes, so the files are several
times larger than their content; git (zlib) removes that padding again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sailplan.config.fields import JsonObject
from sailplan.errors import SailplanError

_MEMBER = tarfile.TarInfo("x")  # mtime, uid and gid are 0 by default
_MEMBER.mode = 0o644
TEMPLATE = _MEMBER.tobuf(tarfile.USTAR_FORMAT)
REST = (
    sum(TEMPLATE[156:]) + 8 * 32
)  # of a header's sum: what follows it, and the sum itself as blanks
KEY_LIMIT = 90  # a USTAR member name holds 100 bytes; the extension needs a few of them


class BuildError(SailplanError):
    """Something a person can mend (a missing tool, a changed source); printed as one line."""


@dataclass(frozen=True)
class Record:
    """`body` becomes KEY.json, `webp` KEY.webp (64x64 RGB), `ogg` KEY.ogg (mono Opus)."""

    body: JsonObject
    webp: bytes | None = None
    ogg: bytes | None = None

    @property
    def id(self) -> str:
        return self.body["id"]

    @property
    def key(self) -> str:
        """The tar key: the id without its set, with neither dots nor slashes, short enough for
        USTAR.
        """
        key = self.id.split("/", 1)[1].replace("/", "__").replace(".", "_")
        if len(key.encode()) > KEY_LIMIT:
            key = key[: KEY_LIMIT - 9] + "-" + hashlib.sha256(key.encode()).hexdigest()[:8]
        return key


def json_bytes(body: object) -> bytes:
    return json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def members(record: Record) -> list[tuple[str, bytes]]:
    """(file name, content) of one record in the order in which they are written."""
    parts = [("json", json_bytes(record.body)), ("webp", record.webp), ("ogg", record.ogg)]
    return [
        (f"{record.key}.{extension}", content)
        for extension, content in parts
        if content is not None
    ]


def write_shards(records: Sequence[Record], folder: Path, name: str, per_shard: int) -> list[Path]:
    """Write `folder/name-000000.tar`, ... and return their paths.

    Old shards of this set are removed first.

    Raises BuildError when two records share a key: a reader would silently merge them.
    """
    keys = [record.key for record in records]
    if len(set(keys)) != len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})[:3]
        raise BuildError(f"set {name}: records share a key: {', '.join(twice)}")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}-*.tar"):
        old.unlink()
    paths = []
    for start in range(0, len(records), per_shard):
        path = folder / f"{name}-{start // per_shard:06d}.tar"
        write_tar(records[start : start + per_shard], path)
        paths.append(path)
    return paths


def write_tar(records: Iterable[Record], path: Path) -> None:
    """Write one shard, complete or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        for record in records:
            for file_name, content in members(record):
                file.write(header(file_name, len(content)))
                file.write(content)
                file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
    os.replace(temporary, path)


def header(name: str, size: int) -> bytes:
    """Return a member's USTAR header, 512 bytes: those of tarfile, which takes ten times as
    long. name: at most 100 bytes.
    """
    start = (
        name.encode().ljust(100, b"\0") + TEMPLATE[100:124] + b"%011o\0" % size + TEMPLATE[136:148]
    )
    if len(start) != 148 or size > 0o77777777777:
        raise BuildError(
            f"{name}: {size} bytes: expected a name of at most 100 bytes and less than 8 GB"
        )
    return start + b"%06o\0 " % (sum(start) + REST) + TEMPLATE[156:]
