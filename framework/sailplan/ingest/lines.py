"""Text tables: CSV, TSV, lists of captions in a text file, JSON lines; plain or gzipped, in any
encoding.

One process finds where rows begin, which for CSV needs the whole line of quotes; JSON is parsed by
the workers. Files are read line by line, each line decoded as `data.parse` decodes a text, so that
a file of mixed encodings is read too.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from sailplan.config.fields import JsonView
from sailplan.data.kinds import kind_of
from sailplan.data.parse import decode_text, parse_json, wide_encoding
from sailplan.errors import BadDataError, ConfigurationError
from sailplan.ingest.rows import Part, Row, split_of_file

LONGEST_FIELD = (
    1 << 24
)  # characters; a quote that is never closed would else read the rest of the file as one field
LONGEST_LINE = 1 << 28  # bytes
SNIFFED = 1 << 16  # bytes
DELIMITERS = {".csv": ",;\t|", ".txt": "\t,;|", ".tsv": "\t"}
ENDINGS = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson")


def ending(path: Path) -> str:
    """Return a table's ending without a gzip's: 'a.csv.gz' -> '.csv'."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open(path: Path) -> BinaryIO:
    return cast(
        BinaryIO, gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")
    )


def read_lines(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Yield each line in UTF-8 or as it is in the file, with its end, and whether it had to be
    repaired.

    Raises BadDataError for a line that does not end, and for a gzip that is cut off.
    """
    try:
        with _open(path) as file:
            wide = wide_encoding(file.read(SNIFFED))
            file.seek(0)
            if wide is not None:
                with io.TextIOWrapper(file, wide, errors="replace", newline="\n") as text:
                    for line in text:
                        yield (
                            line.removeprefix("\ufeff").encode("utf-8", "replace"),
                            "\ufffd" in line,
                        )
                return
            for number in itertools.count(1):
                content = file.readline(LONGEST_LINE)
                if not content:
                    return
                if len(content) == LONGEST_LINE:
                    raise BadDataError(
                        f"{path}:{number}: a line of more than {LONGEST_LINE} bytes; expected one "
                        "row a line"
                    )
                yield (content.removeprefix(codecs.BOM_UTF8) if number == 1 else content), False
    except (EOFError, gzip.BadGzipFile) as error:
        raise BadDataError(
            f"{path}: {error}; the gzip is cut off or damaged: copy or write it again"
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its "
            "permissions"
        ) from error


@dataclass(frozen=True)
class TablePart:
    """Rows of a CSV or TSV: (line, cells)."""

    file: str
    first: int
    header: tuple[str, ...]
    cells: list[tuple[int, list[str], bool]] = field(repr=False)
    split: str | None = None

    def rows(self) -> Iterator[Row]:
        for number, (line, cells, repaired) in enumerate(self.cells, self.first):
            problem = None
            if len(cells) != len(self.header):
                problem = f"found {len(cells)} cells, expected {len(self.header)}"
            yield Row(
                self.file,
                line,
                number,
                dict(zip(self.header, cells, strict=False)),
                problem,
                repaired,
            )


@dataclass(frozen=True)
class JsonPart:
    """Rows of JSON lines: (line, bytes)."""

    file: str
    first: int
    lines: list[tuple[int, bytes, bool]] = field(repr=False)
    split: str | None = None

    def rows(self) -> Iterator[Row]:
        for number, (line, content, repaired) in enumerate(self.lines, self.first):
            values: JsonView = {}
            problem = None
            try:
                values = parse_json(content)
            except ValueError as error:
                problem = " ".join(f"broken JSON: {error}".split())[:300]
            yield Row(self.file, line, number, values, problem, repaired)


@dataclass(frozen=True)
class LinesSource:
    """A text table. name: what it is called in messages and ids."""

    path: Path
    name: str
    header: tuple[str, ...] | None = None  # of a table without one
    split: str | None = None

    def files(self) -> list[str]:
        return [str(self.path)]

    def parts(self, size: int) -> Iterator[Part]:
        split = self.split or split_of_file(self.path.name.split(".")[0])
        if ending(self.path) in (".jsonl", ".ndjson"):
            rows = (
                (line, content, fixed)
                for line, (content, fixed) in enumerate(read_lines(self.path), 1)
                if content.strip()
            )
            for first in itertools.count(0, size):
                taken = list(itertools.islice(rows, size))
                if not taken:
                    return
                yield JsonPart(self.name, first, taken, split)
            return
        header, cells = self._table()
        for first in itertools.count(0, size):
            found = list(itertools.islice(cells, size))
            if not found:
                return
            yield TablePart(self.name, first, header, found, split)

    def _table(self) -> tuple[tuple[str, ...], Iterator[tuple[int, list[str], bool]]]:
        delimiter = delimiter_of(self.path)
        rows = _tabbed(self.path) if delimiter == "\t" else _quoted(self.path, delimiter)
        first = next(rows, None)
        if first is None:
            raise BadDataError(
                f"{self.path}: the table is empty; expected a line of column names and rows"
            )
        header = self.header or _header(first[1])
        if header is None:  # pictures from the first line on
            header = (
                "image",
                "title",
                *(f"column_{number}" for number in range(3, len(first[1]) + 1)),
            )
            rows = itertools.chain([first], rows)
        elif self.header:
            rows = itertools.chain([first], rows)
        names = [name.strip() for name in header]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise BadDataError(
                f"{self.path}: the column {twice[0]!r} is there twice; expected different names: "
                "rename one"
            )
        return tuple(names), rows


def _header(cells: list[str]) -> tuple[str, ...] | None:
    """Column names; None where the first line is a row already, as it names a picture."""
    return (
        None
        if kind_of(cells[0].rpartition("/")[2].partition(".")[2].lower()) in ("picture", "sound")
        else tuple(cells)
    )


def delimiter_of(path: Path) -> str:
    """Return what stands between a table's cells: of those that its ending allows, the most
    frequent in the first line.
    """
    first = next(read_lines(path), (b"", False))[0]
    text, candidates = decode_text(first).text, DELIMITERS[ending(path)]
    outside = "".join(text.split('"')[::2])  # what is in quotes is no delimiter
    return max(
        candidates,
        key=lambda sign: (
            outside.count(sign) if sign != "\t" else 2 * outside.count(sign),
            -candidates.index(sign),
        ),
    )


def _decoded(path: Path, state: dict[str, bool]) -> Iterator[str]:
    for content, fixed in read_lines(path):
        text = decode_text(content)
        state["repaired"] |= fixed or text.repaired
        yield text.text


def _quoted(path: Path, delimiter: str) -> Iterator[tuple[int, list[str], bool]]:
    """Rows of a CSV: line where each begins, cells, repaired.

    Raises BadDataError for a quote that is not closed.
    """
    csv.field_size_limit(LONGEST_FIELD)
    state = {"repaired": False}
    reader = csv.reader(_decoded(path, state), delimiter=delimiter)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise BadDataError(
                f"{path}:{line}: {error}; is a quote open? expected CSV with quotes doubled inside "
                "quotes"
            ) from error
        if cells:
            yield line, cells, state["repaired"]
        state["repaired"] = False


def _tabbed(path: Path) -> Iterator[tuple[int, list[str], bool]]:
    """Rows of a TSV, one a line: quotes are text, but around a whole cell."""
    state = {"repaired": False}
    for line, text in enumerate(_decoded(path, state), 1):
        if text.strip():
            yield line, [_bare(cell) for cell in text.rstrip("\r\n").split("\t")], state["repaired"]
        state["repaired"] = False


def _bare(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell
