"""The watchdog: a thread that ends this rank with exit code 70 when no step has finished for too long.

A collective that waits for a lost peer cannot be interrupted from Python, so the thread writes every
thread's stack to stderr and leaves the process; the launcher then ends the other ranks.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sailplan.errors import EXIT_HANG


class Watchdog:
    """`beat()` says that work is going on; silence for `seconds` ends the process."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last = time.monotonic()
        self._done = threading.Event()

    def beat(self) -> None:
        self._last = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No limit on the work inside the block (mining, evaluation): there each collective has the group's own time-out."""
        self._last = float("inf")
        try:
            yield
        finally:
            self.beat()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > self.seconds:
                print(f"sailplan: no progress for {silent:.0f} s (parallel.timeout_seconds={self.seconds:.0f}): a rank hangs; stacks follow", file=sys.stderr)
                faulthandler.dump_traceback(file=sys.stderr)
                sys.stderr.flush()
                os._exit(EXIT_HANG)


@contextmanager
def watchdog(seconds: float) -> Iterator[Watchdog]:
    dog = Watchdog(seconds)
    thread = threading.Thread(target=dog._watch, name="sailplan-watchdog", daemon=True)
    thread.start()
    try:
        yield dog
    finally:
        dog._done.set()
        thread.join()
