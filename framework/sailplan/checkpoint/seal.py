"""A checkpoint's seal: the file COMPLETE, which lists every file with its bytes and SHA-256.

It is written last, so a folder without one is unfinished; a folder whose files are not the sealed
ones is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from sailplan.runtime.watch import beat

COMPLETE = "COMPLETE"
INDEX = ".metadata"
VERSION = 2  # of the seal
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def seal(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the seal of a folder's files; of those that `digests` lacks the content is read."""
    files = {
        file.name: {
            "bytes": file.stat().st_size,
            "sha256": digests.get(file.name) or digest_of(file),
        }
        for file in sorted(folder.iterdir())
    }
    with open(folder / COMPLETE, "wb") as file:
        file.write(json.dumps({"version": VERSION, "files": files}, indent=1).encode())
        flush(file)


def was_sealed(folder: Path) -> bool:
    """Return whether the folder has a seal that can be read, whatever became of its files."""
    try:
        return bool(_sealed(folder))
    except UNREADABLE:
        return False


def is_complete(folder: Path) -> bool:
    """Return whether every file that the seal lists is there in its full size, and the index is
    the sealed one.

    The other files' content is read by `first_damage` alone, which costs as much as reading the
    checkpoint.
    """
    try:
        return has_sizes(folder) and _sealed(folder)[INDEX][1] == digest_of(folder / INDEX)
    except UNREADABLE:
        return False


def has_sizes(folder: Path) -> bool:
    """Return whether every file that the seal lists is there in its full size."""
    try:
        files = _sealed(folder)
        return bool(files) and all(
            (folder / name).stat().st_size == size for name, (size, _) in files.items()
        )
    except UNREADABLE:
        return False


def _sealed(folder: Path) -> dict[str, tuple[int, str | None]]:
    """File name -> (bytes, SHA-256) by the seal; before version 2 it had the index's hash alone."""
    seal = json.loads((folder / COMPLETE).read_text())
    if seal.get("version", 1) == 1:
        return {
            name: (size, seal["index_sha256"] if name == INDEX else None)
            for name, size in seal["files"].items()
        }
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in seal["files"].items()}


def first_damage(folder: Path, rank: int = 0, ranks: int = 1) -> str:
    """Return the name of a file that is not the sealed one, "" if there is none among this
    rank's share of them; reads them whole.
    """
    if not has_sizes(folder):
        return COMPLETE
    for name, (_, digest) in list(_sealed(folder).items())[rank::ranks]:
        beat()
        if digest is not None and digest_of(folder / name) != digest:
            return name
    return ""


def digest_of(file: Path) -> str:
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def flush(file: IO[bytes] | IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())
