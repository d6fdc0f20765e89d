"""One job at a time in a run folder: the second is refused, and a crashed one does not block the
next.

The first rank holds a lock on `running.json`, which the kernel releases however the process ends,
and writes into it who it is, again every few seconds. Where the file system carries locks between
hosts, the lock decides; where it does not, a record of another host that is still being written
does.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from sailplan.errors import ConfigurationError
from sailplan.runtime.watch import beat

FILE = "running.json"
HEARTBEAT = 3.0
# Seconds for workers of a killed job to go, and for another host to write its record again
PATIENCE = 12.0


class Claim:
    """The right to write into a run folder, until `release` or the end of the process."""

    def __init__(
        self,
        folder: Path,
        *,
        heartbeat: float = HEARTBEAT,
        patience: float = PATIENCE,
        remedy: str = "wait for it, end it, or choose another name=",
    ) -> None:
        """Raises ConfigurationError where another job works in the folder; remedy: what to do."""
        self.path, self._done, self._remedy = folder / FILE, threading.Event(), remedy
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+")  # noqa: SIM115  held until the release
        self._wait_for_lock(patience)
        self._wait_for_silence(2.5 * heartbeat)
        self._write()
        self._thread = threading.Thread(
            target=self._keep, args=(heartbeat,), name="sailplan-claim", daemon=True
        )
        self._thread.start()

    def _wait_for_lock(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                held = self._read()
                here = held.get("host") == socket.gethostname()
                if (held and not (here and not _lives(held))) or time.monotonic() > deadline:
                    self._file.close()
                    raise self._refusal(held) from error
            beat()
            time.sleep(0.2)  # its process is gone, but a worker that it forked still has the file

    def _wait_for_silence(self, seconds: float) -> None:
        """Another host's record may be written by a live job that the lock does not reach: see
        whether it changes.
        """
        held = self._read()
        if not held or held.get("host") == socket.gethostname():
            return
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            beat()
            time.sleep(0.2)
            now = self._read()
            if not now:
                return
            if now != held:
                self._file.close()
                raise self._refusal(now)

    def _refusal(self, held: dict[str, object]) -> ConfigurationError:
        who = f"host {held.get('host', '?')}, pid {held.get('pid', '?')}, job {held.get('job') or 'none'}, last heard of at {held.get('heartbeat', '?')}"
        return ConfigurationError(
            f"{self.path.parent}: another job is writing here ({who}): {self._remedy}"
        )

    def _read(self) -> dict[str, object]:
        try:
            found = json.loads(self.path.read_text())
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            return {}

    def _write(self) -> None:
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or ""
        record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": job,
            "heartbeat": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(record))
        self._file.flush()

    def _keep(self, heartbeat: float) -> None:
        while not self._done.wait(heartbeat):
            try:
                self._write()
            except OSError:  # a full disk is said by what is kept there
                continue

    def release(self) -> None:
        """Let the next job in."""
        self._done.set()
        self._thread.join()
        self._file.seek(0)
        self._file.truncate()
        self._file.close()


def _lives(held: dict[str, object]) -> bool:
    try:
        os.kill(int(str(held["pid"])), 0)
    except (KeyError, ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
