"""A shard that lies elsewhere, with what a local path has: a name, a folder, bytes at a place."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence

from sailplan.data.stream.address import ENDINGS, file_name, has_ranges, parent
from sailplan.data.stream.client import NoRanges, Streams
from sailplan.data.stream.ranges import KnownRanges, Range, joined
from sailplan.errors import ConfigurationError

BLOCK = 1 << 20  # bytes that a pass over a whole shard asks for at a time
BLOCKS_AHEAD = 8
SHARDS_KNOWN = 2048  # whose ranges are remembered by a process
READ_ATTEMPTS = 20  # of a range that others push out of the cache before it is read
_known: OrderedDict[tuple[str, int], KnownRanges] = OrderedDict()
_known_lock = threading.Lock()


class RemoteShard:
    """A URL and what fetches it; `name`, `stem` and `parent` as of a path."""

    __slots__ = ("streams", "url", "whole")

    def __init__(self, url: str, streams: Streams) -> None:
        self.url, self.streams = url, streams
        self.whole = not has_ranges(url)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemoteShard({self.url})"

    @property
    def name(self) -> str:
        """Return the last part of the URL."""
        return file_name(self.url)

    @property
    def stem(self) -> str:
        """Return the name without its ending, whatever compresses it."""
        return next(
            (self.name.removesuffix(ending) for ending in ENDINGS if self.name.endswith(ending)),
            self.name,
        )

    @property
    def parent(self) -> str:
        """Return the URL of the folder."""
        return parent(self.url)

    def beside(self, name: str) -> RemoteShard:
        """Return what has this name in the folder of the shard."""
        return RemoteShard(f"{self.parent}/{name}", self.streams)

    def state(self, *, fresh: bool = False) -> tuple[int, int]:
        """Return size in bytes and version; 0 is the version of what has none, such as a
        command's output.
        """
        if not self.whole:
            try:
                return self.streams.head(self.url, fresh=fresh)
            except NoRanges:
                self.whole = True
        return self.streams.fetch_whole(self.url), 0

    def open(self, version: int = 0, size: int = 0) -> RemoteFile:
        """Return the shard for reading. version, size: as the index knows them, which saves the
        question what they are.
        """
        if self.whole or not version:
            size, version = self.state()
        return RemoteFile(self, size, version)


class RemoteFile:
    """Bytes of one version of a remote shard."""

    def __init__(self, shard: RemoteShard, size: int, version: int) -> None:
        self.shard, self.size, self.version = shard, size, version
        self._place = 0
        with _known_lock:
            key = (shard.url, version)
            self._known = _known.setdefault(key, KnownRanges())
            _known.move_to_end(key)
            if len(_known) > SHARDS_KNOWN:
                _known.popitem(last=False)

    def want(self, ranges: Sequence[Range], *, wait: bool = False) -> None:
        """Have ranges fetched that are not known to be there; what lies close in one request."""
        if self.shard.whole:
            self.shard.streams.fetch_whole(self.shard.url, wait=wait)
            return
        missing = joined(one for one in ranges if self._known.covering(*one) is None)
        self._fetch(missing, wait=wait)

    def prefetch(self, ranges: Sequence[Range]) -> None:
        """Have ranges fetched as they are, known or not: they may have left the cache again."""
        if self.shard.whole:
            self.shard.streams.fetch_whole(self.shard.url, wait=False)
        else:
            self._fetch(joined(ranges), wait=False)

    def read_at(self, offset: int, size: int) -> bytes:
        """Return bytes at a place, fewer at the shard's end; fetches them where they are not on
        disk.
        """
        stop = min(offset + size, self.size)
        if stop <= offset:
            return b""
        for _ in range(READ_ATTEMPTS):
            if self.shard.whole:
                path, start = self.shard.streams.whole_path(self.shard.url), 0
                one = (0, self.size)
            else:
                one = self._known.covering(offset, stop) or (offset, stop)
                path, start = self.shard.streams.path(self.shard.url, self.version, one), one[0]
            content = _part(path, offset - start, stop - offset)
            if content is not None:
                if not self.shard.whole:
                    self._known.was_read(one)
                return content
            if self.shard.whole:
                self.shard.streams.fetch_whole(self.shard.url)
            elif not self._known.is_gone(one):  # what had to go is not fetched again as a whole
                self._fetch([one], wait=True)
        settings = self.shard.streams.settings
        raise ConfigurationError(
            f"data.stream.cache_bytes={settings.cache_bytes}: bytes {offset} to {stop} of "
            f"{self.shard.url} left the cache {READ_ATTEMPTS} times before they were read; give "
            "it more"
        )

    # A file object, for tarfile: a pass over the shard asks for blocks, and for those that follow.
    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a byte."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        """Return the byte that is read next."""
        return self._place

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        stop = self.size if size < 0 else min(self._place + size, self.size)
        parts = []
        while self._place < stop:
            until = min(stop, (self._place // BLOCK + 1) * BLOCK)
            parts.append(self.scan_at(self._place, until - self._place))
            self._place = until
        return b"".join(parts)

    def scan_at(self, offset: int, size: int) -> bytes:
        """Return bytes at a place in a pass over the shard: by whole blocks, with the following
        ones on their way.
        """
        if not self.shard.whole:
            first, last = offset // BLOCK, (offset + size - 1) // BLOCK
            if self._known.covering(offset, min(offset + size, self.size)) is None:
                blocks = [
                    (number * BLOCK, min((number + 1) * BLOCK, self.size))
                    for number in range(first, last + 1 + BLOCKS_AHEAD)
                    if number * BLOCK < self.size
                ]
                if (
                    first and self._known.covering((first - 1) * BLOCK, first * BLOCK) is None
                ):  # it jumps: what lies between is not read
                    blocks = blocks[: last + 1 - first]
                self._fetch(blocks, wait=False)
            if last > first:
                cut = (first + 1) * BLOCK
                return self.read_at(offset, cut - offset) + self.scan_at(cut, offset + size - cut)
        return self.read_at(offset, size)

    def changed(self) -> bool:
        """Return False: each request compares the version."""
        return False

    def close(self) -> None:
        """Let go of the shard; nothing is held open."""

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fetch(self, ranges: list[Range], *, wait: bool) -> None:
        try:
            self.shard.streams.fetch(self.shard.url, self.version, ranges, wait=wait)
            for one in ranges:
                self._known.add(one)
        except NoRanges:
            self.shard.whole = True


def _part(path: str, offset: int, size: int) -> bytes | None:
    """Return bytes of a file, None where it is not there; says that the file is in use."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        os.utime(descriptor)
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
