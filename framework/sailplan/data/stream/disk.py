"""A folder of fetched bytes that never holds more than it may, shared by all processes of a
machine.

Space is taken in a ledger (SQLite: safe across processes and after a kill) before a byte is
written, and what was used longest ago makes room. A reader says that it uses a file by its time of
change, which costs it no lock; the ledger looks at that when it needs room. Which of several
processes fetches a file is decided by a lock on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 60.0  # seconds, for another process's change of the ledger
ABANDONED = 3600.0  # seconds after which a file that nobody finished may make room
TABLES = """
CREATE TABLE IF NOT EXISTS files (
    name TEXT PRIMARY KEY, bytes INTEGER NOT NULL, used REAL NOT NULL, ready INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON files (ready, used);
CREATE TABLE IF NOT EXISTS total (one INTEGER PRIMARY KEY CHECK (one = 1), bytes INTEGER NOT NULL);
INSERT OR IGNORE INTO total VALUES (1, 0);
"""


class NoRoom(Exception):
    """What is to be kept is larger than all that may be kept."""


class DiskCache:
    """Files by name, at most `limit` bytes together.

    For one process and thread; others open their own on the same folder.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Open the cache; raises OSError or sqlite3.Error where the folder cannot be used."""
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._ledger = sqlite3.connect(
            folder / "ledger.sqlite", timeout=PATIENCE, isolation_level=None
        )
        self._ledger.execute("PRAGMA journal_mode=WAL")
        # A ledger that a power cut damages costs no more than what is in the cache
        self._ledger.execute("PRAGMA synchronous=OFF")
        self._ledger.executescript(TABLES)

    def path(self, name: str) -> Path:
        """Return where a file lies once it is there."""
        return self.folder / name

    @contextlib.contextmanager
    def claimed(self, name: str) -> Iterator[Path | None]:
        """Yield the path to write a file to, None where another process is writing it."""
        temporary = self.folder / f"{name}.part"
        temporary.parent.mkdir(exist_ok=True)
        with open(temporary, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            try:
                # Another may have finished and removed it between the opening and the lock
                own = os.path.exists(temporary) and os.path.samefile(temporary, file.fileno())
                yield temporary if own else None
            finally:
                with contextlib.suppress(OSError):
                    if os.path.samefile(temporary, file.fileno()):
                        os.unlink(temporary)

    def reserve(self, name: str, size: int) -> None:
        """Take room for a file of `size` bytes, more than before where it grew.

        Raises NoRoom where it would be larger than the cache.
        """
        with self._change():
            row = self._ledger.execute("SELECT bytes FROM files WHERE name = ?", [name]).fetchone()
            more = size - (row[0] if row else 0)
            (total,) = self._ledger.execute("SELECT bytes FROM total").fetchone()
            total = self._make_room(total, more, name)
            self._ledger.execute(
                "INSERT INTO files VALUES (?, ?, ?, 0) ON CONFLICT (name) DO UPDATE SET "
                "bytes = excluded.bytes, used = excluded.used, ready = 0",
                [name, size, time.time()],
            )
            self._ledger.execute("UPDATE total SET bytes = ?", [total + more])

    def finish(self, name: str, temporary: Path) -> bool:
        """Put a written file in its place; False where its room was given away meanwhile."""
        with self._change():
            changed = self._ledger.execute(
                "UPDATE files SET ready = 1, used = ? WHERE name = ?", [time.time(), name]
            )
            if not changed.rowcount:
                return False
            os.replace(temporary, self.path(name))
            return True

    def give_up(self, name: str) -> None:
        """Return the room of a file that was not written."""
        with self._change():
            row = self._ledger.execute(
                "DELETE FROM files WHERE name = ? AND ready = 0 RETURNING bytes", [name]
            ).fetchone()
            if row:
                self._ledger.execute("UPDATE total SET bytes = bytes - ?", [row[0]])

    def _make_room(self, total: int, more: int, name: str) -> int:
        while total + more > self.limit:
            row = self._ledger.execute(
                "SELECT name, bytes, used FROM files WHERE name != ? AND (ready = 1 OR used < ?) "
                "ORDER BY used LIMIT 1",
                [name, time.time() - ABANDONED],
            ).fetchone()
            if row is None:
                raise NoRoom(f"{more} more bytes beside {total}, at most {self.limit}")
            victim, size, used = row
            with contextlib.suppress(OSError):
                touched = os.stat(self.path(victim)).st_mtime
                if touched > used:  # read since: others go first
                    self._ledger.execute(
                        "UPDATE files SET used = ? WHERE name = ?", [touched, victim]
                    )
                    continue
            for file in (self.path(victim), self.folder / f"{victim}.part"):
                file.unlink(missing_ok=True)
            self._ledger.execute("DELETE FROM files WHERE name = ?", [victim])
            total -= size
        return total

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        self._ledger.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._ledger.execute("ROLLBACK")
            raise
        self._ledger.execute("COMMIT")


def range_name(url: str, version: int, start: int, stop: int) -> str:
    """Return the name of bytes start .. stop - 1 of what lay at a URL in one version."""
    return f"{_digest(f'{version} {url}')}/{start}-{stop}"


def whole_name(url: str) -> str:
    """Return the name of all bytes of a URL, decompressed."""
    return f"{_digest(url)}/whole"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:20]
