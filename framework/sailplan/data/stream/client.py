"""Asks the fetching process of this rank, which the first request starts.

A forked worker inherits the address and makes a connection of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import BinaryIO, cast

from sailplan.config.fields import JsonObject
from sailplan.data.config import StreamConfig
from sailplan.data.places import cache_root, explained
from sailplan.data.stream.disk import range_name, whole_name
from sailplan.data.stream.ranges import Range
from sailplan.errors import BadDataError, ConfigurationError, UnavailableError

START_SECONDS = 120.0  # on a busy machine
_opened: dict[tuple[Path, str], Streams] = {}
_opening = threading.Lock()


class NoRanges(Exception):
    """The server answers no requests for a part."""


def open_streams(cache: Path | None, settings: StreamConfig | None = None) -> Streams:
    """Return what fetches into this cache: one process for all data sets of a rank."""
    settings = settings or StreamConfig()
    folder = Path(settings.folder).expanduser() if settings.folder else cache_root(cache) / "stream"
    with _opening:
        return _opened.setdefault((folder, repr(settings)), Streams(folder, settings))


class Streams:
    """Bytes of URLs, fetched into a folder. For any thread and any forked process."""

    def __init__(self, folder: Path, settings: StreamConfig) -> None:
        self.folder, self.settings = folder, settings
        self._address: str | None = None
        self._owner = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._local, self._lock = threading.local(), threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "settings": self.settings, "_address": self._address}

    def __setstate__(self, state: JsonObject) -> None:
        self.__init__(state["folder"], state["settings"])  # type: ignore[misc]
        self._address = state["_address"]

    def head(self, url: str, *, fresh: bool = False) -> tuple[int, int]:
        """Return size and version of what lies at a URL. fresh: ask the server again."""
        found = self._ask(what="head", url=url, fresh=fresh)
        return found["size"], found["version"]

    def names(self, folder: str) -> list[str]:
        """Return the URLs right below a folder of an object store."""
        found: list[str] = self._ask(what="names", folder=folder)["names"]
        return found

    def fetch(self, url: str, version: int, ranges: list[Range], *, wait: bool = True) -> None:
        """Have ranges of a URL on disk. wait: until they are; else they come meanwhile."""
        if ranges:
            self._ask(what="ranges", url=url, version=version, ranges=ranges, wait=wait)

    def fetch_whole(self, url: str, *, wait: bool = True) -> int:
        """Have all bytes of a URL on disk, decompressed; return how many, 0 without waiting."""
        return int(self._ask(what="whole", url=url, wait=wait).get("size", 0))

    def counts(self) -> dict[str, int]:
        """Return requests, retries and bytes of the fetching process so far."""
        return self._ask(what="counts")

    def path(self, url: str, version: int, one: Range) -> str:
        """Return the path of a fetched range."""
        return os.path.join(self.folder, range_name(url, version, *one))

    def whole_path(self, url: str) -> str:
        """Return the path of a URL that was fetched as a whole."""
        return os.path.join(self.folder, whole_name(url))

    def start(self) -> None:
        """Start the fetching process, where there is none: before workers are forked, so that
        they share it.
        """
        with self._lock:
            if self._address is not None and (
                self._owner != os.getpid() or (self._process and self._process.poll() is None)
            ):
                return
            if self._address is None:
                atexit.register(self.close)
            with explained(self.folder, None):
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder = tempfile.mkdtemp(prefix="sailplan-")
            address, settings = os.path.join(folder, "fetch"), self.settings
            command = [sys.executable, "-m", "sailplan.data.stream.service"]
            for name, value in (
                ("socket", address),
                ("cache", self.folder),
                ("limit", settings.cache_bytes),
                ("in-flight", settings.in_flight),
                ("deadline", settings.deadline_seconds),
                ("timeout", settings.timeout_seconds),
                ("parent", os.getpid()),
            ):
                command += [f"--{name}", str(value)]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            assert self._process.stdout is not None
            if self._process.stdout.readline() != b"ready\n":
                raise ConfigurationError(
                    f"{self.folder}: the process that fetches shards could not start (exit code "
                    f"{self._process.wait()}); expected a folder that can be written: set "
                    "data.cache"
                )
            self._address, self._owner = address, os.getpid()

    def close(self) -> None:
        """End the fetching process, where this process started it."""
        with self._lock:
            if self._process is not None and self._owner == os.getpid():
                self._process.kill()
                self._process.wait()
                if self._process.stdout is not None:
                    self._process.stdout.close()
                shutil.rmtree(os.path.dirname(self._address or ""), ignore_errors=True)
                self._process, self._address = None, None

    # ---------------------------------------------------------------- parts
    def _ask(self, **request: object) -> JsonObject:
        self.start()
        try:
            stream = self._connection()
            stream.write(json.dumps(request).encode() + b"\n")
            stream.flush()
            if not request.get("wait", True):
                return {}
            line = stream.readline()
        except OSError as error:
            raise self._ended() from error
        if not line:
            raise self._ended()
        found: JsonObject = json.loads(line)
        if "error" in found:
            raise self._error(str(request.get("url", "")), found["error"], found["reason"])
        return found

    def _connection(self) -> BinaryIO:
        key = (os.getpid(), self._address)
        if getattr(self._local, "key", None) != key:
            one = socket.socket(socket.AF_UNIX)
            one.connect(self._address or "")
            self._local.stream, self._local.key = one.makefile("rwb"), key
            one.close()  # the file holds it
        return cast(BinaryIO, self._local.stream)

    def _ended(self) -> UnavailableError:
        self._local.key = None
        with contextlib.suppress(AttributeError):
            self._local.stream = None
        return UnavailableError(
            f"{self.folder}: the process that fetches shards has ended; start again"
        )

    def _error(self, url: str, kind: str, reason: str) -> Exception:
        if kind == "NoRanges":
            return NoRanges(url)
        if kind == "Changed":
            return BadDataError(
                f"{url}: changed since it was indexed, expected the same content; run `sailplan "
                "data index`, then start again"
            )
        if kind == "OutOfTime":
            return UnavailableError(
                f"{reason}, data.stream.deadline_seconds={self.settings.deadline_seconds:g}; "
                "check the network and the server, start again"
            )
        if kind == "NoRoom":
            return ConfigurationError(
                f"data.stream.cache_bytes={self.settings.cache_bytes}: found {reason}, expected "
                "room for what is read together; give it more"
            )
        if kind == "Disk":
            return ConfigurationError(
                f"{self.folder} cannot be used as a cache ({reason}); set data.cache, or "
                "data.stream.folder, to a folder of this machine that can be written"
            )
        return BadDataError(f"{reason}; check the URL, the credentials and the network")
