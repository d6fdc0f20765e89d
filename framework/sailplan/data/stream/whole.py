"""A shard that is read as a whole: the output of a command, a URL without ranges, a compressed
tar.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from sailplan.data.stream.address import compression, scheme
from sailplan.data.stream.disk import DiskCache, NoRoom

COPIED_AT_ONCE = 8 << 20


class Unreadable(Exception):
    """What a URL gives cannot be had; the text says why."""


def keep_whole(disk: DiskCache, name: str, url: str, temporary: Path) -> int | None:
    """Write what a URL gives, decompressed, into the cache; return its size, None where its room
    was given away meanwhile.

    Raises Unreadable, NoRoom.
    """
    size = 0
    try:
        with _opened(url) as stream, open(temporary, "wb") as file:
            while content := stream.read(COPIED_AT_ONCE):
                size += len(content)
                disk.reserve(name, size)
                file.write(content)
        disk.reserve(name, size)
        return size if disk.finish(name, temporary) else None
    except NoRoom:
        raise
    except (OSError, ValueError, EOFError, subprocess.SubprocessError) as error:
        raise Unreadable(f"{url}: could not fetch this shard ({error})") from error
    finally:
        with suppress(Exception):
            disk.give_up(name)


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    with _source(url) as source:
        form = compression(url)
        if form == "gzip":
            yield cast(IO[bytes], gzip.GzipFile(fileobj=source))
        elif form == "zstd":
            import pyarrow

            yield cast(
                IO[bytes],
                pyarrow.input_stream(io.BufferedReader(_Raw(source)), "zstd"),
            )
        else:
            yield source


class _Raw(io.RawIOBase):
    """What has only a method `read`, as a file."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._source.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


@contextmanager
def _source(url: str) -> Iterator[Any]:
    if scheme(url) in ("", "file"):
        with open(url.removeprefix("file:"), "rb") as file:
            yield file
    elif scheme(url) in ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl"):
        import obstore
        from obstore.store import from_url

        place, key = re.match(r"([a-z0-9]+://[^/]+)/(.*)", url).groups()  # type: ignore[union-attr]
        yield obstore.open_reader(from_url(place), key)
    else:
        import webdataset

        os.environ.setdefault("GOPEN_VERBOSE", "0")
        with webdataset.gopen(url) as stream:
            yield stream
