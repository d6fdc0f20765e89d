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

from sailplan.runtime.progress import progress
from sailplan.runtime.watch import beat

COMPLETE = "COMPLETE"
INDEX = ".metadata"
VERSION = 2  # of the seal
Entry = dict[str, int | str]  # bytes, sha256
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def is_step(name: str) -> bool:
    """Return whether a folder of that name is a checkpoint's."""
    return name.startswith("step-") and name.removeprefix("step-").isdigit()


def entry_of(file: Path) -> Entry:
    """Return what a seal says of a file."""
    return {"bytes": file.stat().st_size, "sha256": digest_of(file)}


def seal(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write the seal of files with these entries, which other nodes' folders may have, and of all
    others that are in this folder, which are read.
    """
    here = {file.name: file for file in folder.iterdir() if file.name not in entries}
    files = {**entries, **{name: entry_of(file) for name, file in here.items()}}
    content = {"version": VERSION, "files": dict(sorted(files.items()))}
    write_seal(folder, json.dumps(content, indent=1))


def write_seal(folder: Path, text: str) -> None:
    """Write a seal as it is."""
    with open(folder / COMPLETE, "wb") as file:
        file.write(text.encode())
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
    return files_of((folder / COMPLETE).read_text())


def files_of(text: str) -> dict[str, tuple[int, str | None]]:
    """Read a seal: file name -> (bytes, SHA-256), which before version 2 the index alone had.
    Raises one of UNREADABLE.
    """
    seal = json.loads(text)
    if any(Path(name).name != name for name in seal["files"]):  # it could lead elsewhere
        raise ValueError(f"{COMPLETE} names a file outside the checkpoint")
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
    share = list(_sealed(folder).items())[rank::ranks]
    total = sum(size for _, (size, _) in share) >> 20
    with progress(f"comparing {folder.name} with its seal", total, "MB") as advance:
        for name, (size, digest) in share:
            beat()
            if digest is not None and digest_of(folder / name) != digest:
                return name
            advance(size >> 20)
    return ""


def digest_of(file: Path) -> str:
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def flush(file: IO[bytes] | IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())
