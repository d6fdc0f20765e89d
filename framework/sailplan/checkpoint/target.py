"""Files below a URL: what copies of checkpoints need of a file system or an object store.

Object stores (s3, gs, az) are spoken to through obstore, which reading data needs anyway; every
other URL through fsspec. A file is sent and read by pieces, each of which is progress.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem

from sailplan.errors import ConfigurationError
from sailplan.runtime.watch import beat

STORES = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss")
PIECE = 8 << 20  # bytes
DEADLINE, TIMEOUT, RETRIES = 120.0, 30.0, 4  # seconds for a request, and without a byte; repeats


class Target:
    """A folder below a URL, or a path."""

    def __init__(self, url: str, key: str) -> None:
        """Raises ConfigurationError, which begins with `key`, for a URL that nothing opens here."""
        self.url = url.rstrip("/")
        scheme = url.partition("://")[0]
        try:
            self._files: AbstractFileSystem
            if scheme in STORES:
                from sailplan.data.stream.stores import file_system

                self._files = file_system(url, DEADLINE, TIMEOUT, RETRIES)
                self._root = self.url
            else:
                self._files, root = fsspec.core.url_to_fs(self.url)
                self._root = str(root).rstrip("/")
        except (ValueError, ImportError) as error:
            raise ConfigurationError(
                f"{key}={url}: {error}; expected a URL of an object store or a file system that "
                "fsspec has, such as s3://bucket/folder, and its package"
            ) from error

    def names(self, folder: str = "") -> list[str]:
        """Return the names right below a folder; [] where there is none."""
        with _in_one_line():
            self._files.invalidate_cache()  # others write there, too
            try:
                found = self._files.ls(self._at(folder), detail=False)
            except FileNotFoundError:
                return []
            return sorted(Path(name).name for name in found)

    def make(self, folder: str) -> None:
        """Make a folder, where the file system has any."""
        with _in_one_line():
            self._files.makedirs(self._at(folder), exist_ok=True)

    def put(self, file: Path, name: str) -> None:
        """Send a file."""
        with (
            _in_one_line(),
            open(file, "rb") as source,
            self._files.open(self._at(name), "wb") as sink,
        ):
            while piece := source.read(PIECE):
                sink.write(piece)
                beat()

    def get(self, name: str, file: Path) -> str:
        """Fetch a file, flushed to the disk; return its SHA-256. Raises FileNotFoundError where
        there is none.
        """
        digest = hashlib.sha256()
        with (
            _in_one_line(),
            self._files.open(self._at(name), "rb") as source,
            open(file, "wb") as sink,
        ):
            while piece := source.read(PIECE):
                digest.update(piece)
                sink.write(piece)
                beat()
            sink.flush()
            os.fsync(sink.fileno())
        return digest.hexdigest()

    def read(self, name: str) -> bytes:
        """Return a small file's content. Raises FileNotFoundError where there is none."""
        with _in_one_line():
            content: bytes = self._files.cat_file(self._at(name))
            return content

    def remove(self, name: str, *, recursive: bool = False) -> None:
        """Delete a file, or a folder with what is in it; nothing, where there is none."""
        with _in_one_line():
            try:
                self._files.rm(self._at(name), recursive=recursive)
            except FileNotFoundError:
                return

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Let an object store's error, which tells its client's insides, be one line."""
    try:
        yield
    except (FileNotFoundError, ConfigurationError):
        raise
    except Exception as error:
        from sailplan.data.stream.stores import short

        raise OSError(short(error)) from error
