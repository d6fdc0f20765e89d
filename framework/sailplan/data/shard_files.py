"""The one way to the bytes of a shard, whether it is a file of this machine or lies elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol, Self

from sailplan.data.stream.shard import RemoteShard

Shard = Path | RemoteShard


class ShardFile(Protocol):
    """An open shard: what a tar reader asks of a file object, and bytes at a place."""

    size: int  # bytes
    version: int  # a number that differs where the content may differ

    def read(self, size: int = -1) -> bytes: ...
    def seek(self, offset: int, whence: int = 0) -> int: ...
    def tell(self) -> int: ...
    def read_at(self, offset: int, size: int) -> bytes: ...
    def scan_at(self, offset: int, size: int) -> bytes: ...
    def want(self, ranges: Sequence[tuple[int, int]], *, wait: bool = False) -> None: ...
    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None: ...
    def changed(self) -> bool: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


class LocalFile:
    """A shard on this machine; its version is the time of its last change in ns."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises OSError."""
        self._file: BinaryIO = open(path, "rb")  # noqa: SIM115
        self._number = self._file.fileno()
        status = os.fstat(self._number)
        self.size, self.version = status.st_size, status.st_mtime_ns
        self.read, self.seek, self.tell = self._file.read, self._file.seek, self._file.tell

    def read_at(self, offset: int, size: int) -> bytes:
        """Return bytes at a place, fewer at the end; no shared position, so safe in forks."""
        return os.pread(self._number, size, offset)

    scan_at = read_at

    def want(self, ranges: Sequence[tuple[int, int]], *, wait: bool = False) -> None:
        """Do nothing: the bytes are here."""

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Do nothing: the bytes are here."""

    def changed(self) -> bool:
        """Return whether the file was written to since it was opened."""
        status = os.fstat(self._number)
        return (status.st_size, status.st_mtime_ns) != (self.size, self.version)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_shard(shard: Shard, version: int = 0, size: int = 0) -> ShardFile:
    """Open a shard. version, size: of a remote one, as its index knows them.

    Raises OSError for a file that cannot be read, BadDataError for a URL.
    """
    return shard.open(version, size) if isinstance(shard, RemoteShard) else LocalFile(shard)


def state_of(shard: Shard, *, fresh: bool = False) -> tuple[int, int]:
    """Return size in bytes and version of a shard. Raises as `open_shard`."""
    if isinstance(shard, RemoteShard):
        return shard.state(fresh=fresh)
    status = os.stat(shard)
    return status.st_size, status.st_mtime_ns
