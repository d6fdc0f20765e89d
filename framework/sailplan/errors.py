"""The errors a user can cause, each tied to the process exit code that launch scripts act on.

Every message is one line: what key or file, what was found, what was expected, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_BAD_CONFIGURATION = 64
EXIT_BAD_DATA = 65
EXIT_HANG = 70
EXIT_STOPPED = 75


class SailplanError(Exception):
    """Base of all errors that are reported in one line, without a traceback."""

    exit_code = EXIT_FAILURE


class ConfigurationError(SailplanError):
    """A configuration key, override or option that cannot work (exit code 64)."""

    exit_code = EXIT_BAD_CONFIGURATION


class BadDataError(SailplanError):
    """More broken samples than the configured limit (exit code 65).

    samples: those of the step, (record id, reason).
    """

    exit_code = EXIT_BAD_DATA

    def __init__(self, message: str, samples: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.samples = list(samples)

    def __reduce__(self) -> tuple[object, ...]:
        return BadDataError, (str(self), self.samples)


class UnavailableError(SailplanError):
    """Something outside that did not answer in time and may another time (exit code 75)."""

    exit_code = EXIT_STOPPED


class StopRequested(SailplanError):
    """A signal asked for a stop; progress is saved and the run can be resumed (exit code 75)."""

    exit_code = EXIT_STOPPED
