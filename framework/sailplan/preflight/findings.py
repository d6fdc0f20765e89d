"""What a preflight found, as one table for people and one line for the job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from sailplan.errors import EXIT_BAD_CONFIGURATION, BadDataError, ConfigurationError, SailplanError

State = Literal["ok", "note", "warning", "failed"]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Finding:
    """One row of the table. note: nothing was looked at, or nothing can be wrong with it."""

    what: str
    state: State
    text: str


@dataclass
class Findings:
    """Rows in the order in which they were found; the same on all ranks."""

    rows: list[Finding] = field(default_factory=list)
    errors: list[SailplanError] = field(default_factory=list)

    def add(self, what: str, state: State, text: str) -> None:
        self.rows.append(Finding(what, state, text))

    def refuse(self, what: str, error: SailplanError) -> None:
        """Keep an error, which ends the preflight once everything has been looked at."""
        self.add(what, "failed", str(error))
        self.errors.append(error)

    def attempt(self, what: str, work: Callable[[], Value]) -> Value | None:
        """Return what a check returns; None where it refused, which is kept as a failed row.

        work: a check that raises on all ranks or on none.
        """
        try:
            return work()
        except (ConfigurationError, BadDataError) as error:
            self.refuse(what, error)
            return None

    def table(self) -> list[str]:
        """Return a heading and a line for each row."""
        rows = [
            ("check", "result", "found"),
            *((row.what, row.state, row.text) for row in self.rows),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return [f"{what:<{widths[0]}}  {state:<{widths[1]}}  {text}" for what, state, text in rows]

    def verdict(self, job: str) -> str:
        """Return the job's line; raise the error of the checks that failed, 64 before 65."""
        warnings = sum(row.state == "warning" for row in self.rows)
        if not self.errors:
            return f"{job}: ready" + (f", {_counted(warnings, 'warning')}" if warnings else "")
        kind = min(self.errors, key=lambda error: error.exit_code != EXIT_BAD_CONFIGURATION)
        text = "; ".join(dict.fromkeys(str(error) for error in self.errors))
        raise type(kind)(f"check: {_counted(len(self.errors), 'problem')}: {text}")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def names(of: Sequence[str], shown: int = 3) -> str:
    """Return some of many names: "a, b, c and 5 more"."""
    rest = len(of) - shown
    return ", ".join(of[:shown]) + (f" and {rest} more" if rest > 0 else "")


def size(count: float) -> str:
    """Return a number of bytes for people, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"
