"""Tables that are missing, made by as many processes as ask for them: ranks, hosts and workers
share one folder, no message.

The missing shards are cut into chunks. A process claims a chunk by a lock on one byte of a file,
which its end releases however it ends; it writes the chunk's tables as a part of their own, so what
was done stays when it is killed. Who finds all its chunks done takes the parts over into the one
file of tables. A process that is late finds a new manifest, and has nothing to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import IO

from sailplan.data.manifest import Entry, Manifest
from sailplan.data.places import explained
from sailplan.errors import SailplanError

LARGEST_CHUNK = 64  # shards
CHUNKS = 256  # that many at least, where there are as many shards
COPIED_AT_ONCE = 16 << 20
WASTED = 64 << 20  # bytes of tables of older states that stay where they are
POLL_SECONDS = (0.02, 1.0)  # waits for others grow from the first to the second
CLAIMS = 64  # chunks that are tried before a wait
MERGING = 0  # the byte that stands for the manifest; chunks have others


class Progress:
    """Is told how much is to be done and what was done; `Progress(beat)` calls `beat` for each
    shard, and while it waits.
    """

    def __init__(self, beat: Callable[[], None] = lambda: None) -> None:
        self._beat = beat

    def expect(self, what: str, shards: int) -> None:
        """Tables of so many shards are to be made."""

    def advance(self, shards: int) -> None:
        """So many of them are done; 0: still alive."""
        for _ in range(max(1, shards)):
            self._beat()


def fill(
    place: Path,
    names: Sequence[str],
    missing: Sequence[int],
    make: Callable[[int], Entry],
    progress: Progress,
    cache: Path | None,
    processes: int = 1,
) -> bool:
    """Make tables of the shards numbered `missing` and take them over into the manifest at
    `place`, or come back when others have.

    Return whether all of them were; False: another process wrote the manifest meanwhile, so look
    again. Raises what `make` does.
    """
    progress.expect(place.name.partition(".")[0], len(missing))
    work = _Work(place, names, make, cache)
    size = max(1, min(LARGEST_CHUNK, len(missing) // CHUNKS))
    chunks = {
        work.key(chunk): chunk
        for chunk in (list(missing[start : start + size]) for start in range(0, len(missing), size))
    }
    context = get_context("fork")
    helpers = [
        context.Process(target=_help, args=(work, chunks), daemon=True)
        for _ in range(min(processes, len(chunks)) - 1)
    ]
    if helpers:
        os.environ.setdefault(
            "TOKENIZERS_PARALLELISM", "false"
        )  # the tokenizer's threads do not survive the fork
    try:
        for helper in helpers:
            helper.start()
        with work.opened() as lock:
            if not work.run(chunks, lock, progress):
                return False
            with explained(place, cache):
                work.merge(lock, progress)
            return True
    finally:
        for helper in helpers:
            helper.terminate()
            helper.join()


def _help(work: _Work, chunks: dict[str, list[int]]) -> None:
    with (
        contextlib.suppress(SailplanError),
        work.opened() as lock,
    ):  # the parent meets the error, too, and tells it
        work.run(chunks, lock, Progress())


class _Work:
    def __init__(
        self, place: Path, names: Sequence[str], make: Callable[[int], Entry], cache: Path | None
    ) -> None:
        self.place, self.names, self.make, self.cache = place, names, make, cache
        self.parts = place.with_suffix(".parts")
        with explained(self.parts, cache):
            for left in reversed(range(10)):
                try:
                    self.parts.mkdir(exist_ok=True)
                    break
                except FileExistsError:  # removed at the very moment, by a rank that is done
                    if not left:
                        raise
        self.before = self._state()

    @contextlib.contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """The file whose bytes are locked.

        One descriptor a process: to close any gives up all locks.
        """
        with explained(self.place, self.cache):
            lock = open(self.place.with_suffix(".lock"), "ab")  # noqa: SIM115
        with lock:
            yield lock

    def key(self, chunk: Sequence[int]) -> str:
        return hashlib.sha256(
            "\0".join(self.names[number] for number in chunk).encode("utf-8", "surrogateescape")
        ).hexdigest()[:12]

    def run(self, chunks: dict[str, list[int]], lock: IO[bytes], progress: Progress) -> bool:
        """Make chunks until all are there; False where the manifest changed meanwhile."""
        left = list(chunks)
        start = random.randrange(
            len(left)
        )  # ranks that begin together need not race for each chunk
        left, wait = left[start:] + left[:start], POLL_SECONDS[0]
        while left:
            done, worked = self._done(), False
            others = [key for key in left if key in done]
            if others:
                progress.advance(sum(len(chunks[key]) for key in others))
            left = [key for key in left if key not in done]
            for key in left[:CLAIMS]:
                byte = 1 + int(key, 16)
                if _locked(lock, byte) is not False:
                    try:
                        if self._state() != self.before:
                            return False
                        if not self._part(key).exists():
                            self._make(key, chunks[key], progress)
                    finally:
                        _release(lock, byte)
                    left.remove(key)
                    worked = True
                    break
            if left and not worked:
                if self._state() != self.before:
                    return False
                progress.advance(0)
                time.sleep(wait)
                wait, left = min(2 * wait, POLL_SECONDS[1]), left[CLAIMS:] + left[:CLAIMS]
        return True

    def _make(self, key: str, chunk: Sequence[int], progress: Progress) -> None:
        entries, blob = [], f"{key}.{secrets.token_hex(4)}.tables"
        for old in self.parts.glob(f"{key}.*.tables"):  # of a process that was killed
            old.unlink(missing_ok=True)
        with explained(self.parts, self.cache):
            self.parts.mkdir(
                exist_ok=True
            )  # a process that took over the last part may have removed it
            file = open(self.parts / blob, "wb")  # noqa: SIM115
        with file:
            for number in chunk:
                entry = self.make(number)
                with explained(self.parts, self.cache):
                    file.write(entry.table)
                entries.append(entry)
                progress.advance(1)
            with explained(self.parts, self.cache):
                file.flush()
        with explained(self.parts, self.cache):
            Manifest.of_entries(blob, [self.names[number] for number in chunk], entries).save(
                self._part(key)
            )

    def merge(self, lock: IO[bytes], progress: Progress) -> None:
        """Take all parts over into the file of tables, whoever made them."""
        with alone(lock, MERGING, progress) as sure:
            self._merge(sure, progress)

    def _merge(self, sure: bool, progress: Progress) -> None:
        parts = {self._part(key): Manifest.load(self._part(key)) for key in sorted(self._done())}
        found = [
            (file.with_name(part.blob), part) for file, part in parts.items() if part is not None
        ]
        old, folder = Manifest.load(self.place), self.place.parent
        if found:
            moved: list[Manifest] = []
            wasted = 0 if old is None else old.end - int(old.rows["bytes"].sum())
            anew = old is None or not sure or wasted > max(WASTED, old.end // 2)
            blob = (
                f"{self.place.stem}.{secrets.token_hex(4)}.tables"
                if anew or old is None
                else old.blob
            )
            with open(folder / blob, "wb" if anew else "r+b") as target:
                base = Manifest.of_entries(blob, [], [])
                if old is not None and not anew:
                    base = old
                elif old is not None:
                    rows = old.rows.copy()
                    with open(folder / old.blob, "rb") as source:
                        for number, row in enumerate(old.rows):
                            rows["offset"][number] = target.tell()
                            _copy(source, target, int(row["offset"]), int(row["bytes"]), progress)
                    moved.append(
                        Manifest(
                            blob,
                            0,
                            old.names,
                            rows,
                            old.tags,
                            old.tag_rows,
                            old.tag_codes,
                            old.tag_counts,
                        )
                    )
                target.seek(
                    base.end if not anew else target.tell()
                )  # a merger that was killed may have left bytes there
                for file, part in found:
                    start = target.tell()
                    with open(file, "rb") as source:
                        _copy(source, target, 0, part.end, progress)
                    moved.append(part.moved(start))
                end = target.tell()
                target.flush()
                os.fsync(target.fileno())
            base.joined(moved, end).save(self.place)
            if anew and sure:
                for other in folder.glob(f"{self.place.stem}.????????.tables"):
                    if other.name != blob:
                        other.unlink(missing_ok=True)
        for file in parts:
            file.unlink(missing_ok=True)
            for tables in self.parts.glob(f"{file.stem}.*.tables"):
                tables.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.parts.rmdir()

    def _part(self, key: str) -> Path:
        return self.parts / f"{key}.part"

    def _done(self) -> set[str]:
        try:
            return {
                name.removesuffix(".part")
                for name in os.listdir(self.parts)
                if name.endswith(".part") and not name.startswith(".")
            }
        except FileNotFoundError:  # taken over
            return set()

    def _state(self) -> tuple[int, int]:
        try:
            status = os.stat(self.place)
        except OSError:
            return 0, 0
        return status.st_ino, status.st_mtime_ns


def _copy(source: IO[bytes], target: IO[bytes], offset: int, size: int, progress: Progress) -> None:
    source.seek(offset)
    while size > 0:
        content = source.read(min(size, COPIED_AT_ONCE))
        if not content:
            raise OSError(f"a file of tables ended {size} bytes early")
        target.write(content)
        size -= len(content)
        progress.advance(0)


def _locked(lock: IO[bytes], byte: int) -> bool | None:
    """Return whether this process now has the byte; None on a file system without locks, where
    work is done twice, not wrong.
    """
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _release(lock: IO[bytes], byte: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, byte)


@contextlib.contextmanager
def alone(lock: IO[bytes], byte: int, progress: Progress) -> Iterator[bool]:
    """Wait until no other process has the byte of a file; yields False where the file system has
    no locks.
    """
    wait = POLL_SECONDS[0]
    while (have := _locked(lock, byte)) is False:
        progress.advance(0)
        time.sleep(wait)
        wait = min(2 * wait, POLL_SECONDS[1])
    try:
        yield bool(have)
    finally:
        _release(lock, byte)
