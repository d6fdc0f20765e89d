"""What a source gives: rows, each with its place, in parts that are worked at one by one.

A part is small to send to another process: lines of text, or only where rows lie in a Parquet or
Arrow file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from sailplan.config.fields import JsonView


class Dropped(Exception):
    """A row that cannot become a record; its text is the reason, one line."""


@dataclass(frozen=True)
class Row:
    """One row of a source.

    `values`: column -> value as the file has it; `problem`: why it cannot be read, else None.
    """

    file: str  # as it is named in messages and ids: relative to the source
    line: int  # from 1: of a text file the line where the row begins, else the row's number
    number: int  # of the row in its file, from 0
    values: JsonView
    problem: str | None = None
    repaired: bool = False  # its bytes were no text of the encoding that they seem to be in

    @property
    def id(self) -> str:
        """Return an id that depends on the source alone, for rows that name none."""
        return f"{self.file}/{self.number}"


class Part(Protocol):
    """Neighbouring rows of one file; can be pickled."""

    @property
    def split(self) -> str | None:
        """Return the split that the file's name tells, None where it tells none."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows, in the file's order."""


class Source(Protocol):
    """Rows from outside, in a fixed order."""

    def parts(self, size: int) -> Iterator[Part]:
        """Yield parts of at most `size` rows; the same ones for the same files."""

    def files(self) -> list[str]:
        """Return the paths that the rows come from, for noticing that they changed."""


SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(
        (
            "test",
            "testing",
            "val",
            "valid",
            "validation",
            "dev",
            "eval",
            "held_out",
            "heldout",
            "holdout",
        ),
        "held_out",
    ),
}


def split_name(value: str) -> str:
    """Return the name of a split as sailplan has it: train or held_out; others stay."""
    return SPLITS.get(value.strip().lower().replace("-", "_"), value)


def split_of_file(stem: str) -> str | None:
    """Return the split that a file's or folder's name begins with: 'test-00000-of-00001' ->
    'held_out'; None for other names.
    """
    word = stem.lower().replace(".", "-").replace("_", "-").split("-")[0]
    return SPLITS.get(word)
