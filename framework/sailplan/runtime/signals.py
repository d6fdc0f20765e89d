"""Stopping on request: a signal only sets a flag; the loop asks all ranks at a step's edge
whether one was set.

SIGTERM, SIGUSR1 (Slurm's early warning), SIGUSR2 (submitit's) and SIGINT ask for a stop: the run
saves and exits with 75.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Set by the first stop signal; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Installs the handlers for the time of the block; the former ones come back after it."""
    flag = StopFlag()
    former = {number: signal.signal(number, flag._handle) for number in STOP_SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
