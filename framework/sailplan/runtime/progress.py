"""How far a command is: rate and time left, on a terminal in one line that is drawn again, else in
plain lines every few seconds; nothing of work that is done in three.

Only the first rank shows it, and only a command that asked for it (`showing_progress`): a training
run has a screen of its own. Where nothing of a command counts, a thread says what it is at, and for
how long.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sailplan.runtime.watch import current

QUIET_SECONDS = 3.0  # of work that need not be shown
REDRAWN_SECONDS = 0.2  # on a terminal
LINE_SECONDS = 10.0  # between plain lines
_shown = False
_said = 0.0  # when a meter last had something to say


@contextmanager
def showing_progress(command: str) -> Iterator[None]:
    """Have the work of this process shown while the block runs."""
    global _shown, _said
    former, done = _shown, threading.Event()
    _shown, _said = True, time.monotonic()
    thread = threading.Thread(target=_tell, args=(command, done), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        _shown = former
        done.set()
        thread.join()


def _tell(command: str, done: threading.Event) -> None:
    """Say what a command is at, where nothing that it counts has said so for a while."""
    if os.environ.get("RANK", "0") != "0":
        return
    began, line = time.monotonic(), Line()
    pause = QUIET_SECONDS
    while not done.wait(min(1.0, pause / 4)):
        now = time.monotonic()
        if now - _said < pause:
            continue
        watch = current()
        phase = watch.note.phase if watch is not None else ""
        line.say(f"{phase or command}: for {duration(now - began)} so far", now)
        pause = REDRAWN_SECONDS if line.terminal else LINE_SECONDS
    line.close()


def duration(seconds: float) -> str:
    """Seconds as a short text: "12 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Line:
    """Where progress is said: one line of a terminal, else lines."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self._drawn = 0  # characters on the terminal

    def say(self, text: str, now: float) -> None:
        """Write a text, in place of the one before on a terminal."""
        global _said
        _said = now
        if not self.terminal:
            print(text, file=sys.stderr, flush=True)
            return
        print("\r" + text.ljust(self._drawn), end="", file=sys.stderr, flush=True)
        self._drawn = max(self._drawn, len(text))

    def close(self) -> None:
        """Leave nothing on a terminal."""
        if self._drawn:
            print("\r" + " " * self._drawn + "\r", end="", file=sys.stderr, flush=True)
            self._drawn = 0


class Meter:
    """Counts units of work and says how far it is. total: None where nobody knows."""

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._unit, self._clock = what, total, unit, clock
        self._done, self._began, self._said = 0, clock(), float("-inf")
        self._line = Line()

    def advance(self, count: int = 1) -> None:
        """So much more is done."""
        self._done += count
        now = self._clock()
        pause = REDRAWN_SECONDS if self._line.terminal else LINE_SECONDS
        if now - self._began >= QUIET_SECONDS and now - self._said >= pause:
            self._said = now
            self._line.say(self.text(now), now)

    def text(self, now: float) -> str:
        """Return the line."""
        rate = self._done / max(now - self._began, 1e-9)
        of = f" of {self._total:,}" if self._total else ""
        text = f"{self._what}: {self._done:,}{of} {self._unit}, {rate:,.3g} {self._unit}/s"
        if self._total and rate:
            text += f", {duration(max(0, self._total - self._done) / rate)} left"
        return text

    def close(self) -> None:
        """Leave nothing on a terminal."""
        self._line.close()


@contextmanager
def progress(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield what counts the block's work, in a process that shows it."""
    if not _shown or os.environ.get("RANK", "0") != "0":
        yield lambda count: None
        return
    meter = Meter(what, total, unit)
    try:
        yield meter.advance
    finally:
        meter.close()
