"""Parquet files, and Arrow files as Hugging Face's `save_to_disk` writes them.

A part says only where its rows lie.

Hugging Face keeps in the schema what columns mean: pictures and sound are structs of `bytes` and
`path`, classes are numbers with names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sailplan.errors import BadDataError
from sailplan.ingest.rows import Part, Row, split_of_file

if TYPE_CHECKING:
    import pyarrow as pa


READ_AT_ONCE = 256  # rows that are Python objects at a time
ENDINGS = (".parquet", ".arrow")


@dataclass(frozen=True)
class ColumnarPart:
    """Rows first .. first + count - 1 of a file."""

    path: Path
    file: str
    first: int
    count: int
    split: str | None = None

    def rows(self) -> Iterator[Row]:
        number = self.first
        for batch, classes in _batches(self.path, self.first, self.count):
            for values in batch.to_pylist():
                for name, words in classes.items():
                    value = values.get(name)
                    if isinstance(value, int) and 0 <= value < len(words):
                        values[name] = words[value]
                yield Row(self.file, number + 1, number, values)
                number += 1


@dataclass(frozen=True)
class ColumnarSource:
    """A Parquet or Arrow file. name: what it is called in messages and ids."""

    path: Path
    name: str
    split: str | None = None

    def files(self) -> list[str]:
        return [str(self.path)]

    def parts(self, size: int) -> Iterator[Part]:
        split, total = self.split or split_of_file(self.path.name), count_rows(self.path)
        for first in range(0, total, size):
            yield ColumnarPart(self.path, self.name, first, min(size, total - first), split)


def count_rows(path: Path) -> int:
    """Return the number of rows.

    Raises BadDataError for a file that is no Parquet or Arrow file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            return int(pq.ParquetFile(path).metadata.num_rows)
        with pa.memory_map(str(path)) as file:
            return sum(batch.num_rows for batch in _arrow_batches(file))
    except (pa.ArrowException, OSError) as error:
        raise BadDataError(
            f"{path}: {_line(error)}; expected a whole Parquet or Arrow file: copy or write it "
            "again"
        ) from error


def _batches(
    path: Path, first: int, count: int
) -> Iterator[tuple[pa.RecordBatch, Mapping[str, list[str]]]]:
    """Yield record batches of at most READ_AT_ONCE rows that cover the rows asked for, with the
    names of classes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            classes, groups, before = class_names(file.schema_arrow.metadata), [], 0
            offset = None
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if before + rows > first and before < first + count:
                    groups.append(group)
                    offset = before if offset is None else offset
                before += rows
            stream = file.iter_batches(READ_AT_ONCE, row_groups=groups)
            for batch in _cut(stream, first - (offset or 0), count):
                yield batch, classes
            return
        with pa.memory_map(str(path)) as mapped:
            for batch in _cut(_arrow_batches(mapped), first, count):
                yield batch, class_names(batch.schema.metadata)
    except (pa.ArrowException, OSError) as error:
        raise BadDataError(
            f"{path}: {_line(error)}; expected a whole Parquet or Arrow file: copy or write it "
            "again"
        ) from error


def _arrow_batches(file: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow stream, which `save_to_disk` writes, or of an Arrow file."""
    import pyarrow as pa

    head = file.read(6)
    file.seek(0)
    if head == b"ARROW1":
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(file)


def _cut(batches: Iterator[pa.RecordBatch], first: int, count: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows first .. first + count - 1 of a stream of batches."""
    for batch in batches:
        if first < batch.num_rows:
            for start in range(first, min(batch.num_rows, first + count), READ_AT_ONCE):
                yield batch.slice(
                    start, min(READ_AT_ONCE, batch.num_rows - start, first + count - start)
                )
        taken = max(0, min(batch.num_rows, first + count) - first)
        first, count = max(0, first - batch.num_rows), count - taken
        if count <= 0:
            return


def class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return column -> names of its classes, as Hugging Face keeps them in a schema."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            name: one["names"]
            for name, one in features.items()
            if isinstance(one, dict) and one.get("_type") == "ClassLabel" and one.get("names")
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
