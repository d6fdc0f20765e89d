"""Read logs of user events, parquet or JSON lines, in parts that fit in memory: user, item, time
and labels.

A log is one file or a folder of files. It is cut into units of some 64 MB (row groups of a parquet
file, a range of bytes of a JSON lines file), which the ranks share; a unit is read in batches by
Arrow. Whatever the columns' types are, a batch has users and items as text, times as integers that
rise with time, and labels as bits.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sailplan.data.config import InterestsConfig
from sailplan.errors import BadDataError, ConfigurationError

if TYPE_CHECKING:
    import pyarrow as pa


UNIT_BYTES = 64 << 20
BATCH_ROWS = 1 << 18
JSON_ROW_BYTES = 64  # an estimate that decides into how many buckets users are cut
ENDINGS = (".parquet", ".jsonl")
ONE_LABEL = "event"  # the label of every event of a log without labels
OTHERS_KEPT = 20


@dataclass(frozen=True)
class EventUnit:
    """Part `part` of `parts` of a file."""

    path: Path
    part: int
    parts: int


@dataclass(frozen=True)
class EventBatch:
    """n events.

    users and items: Arrow text arrays; times int64 [n]; labels uint64 [n], bit i: positive label
    number i.
    """

    users: pa.Array
    items: pa.Array
    times: NDArray[np.int64]
    labels: NDArray[np.uint64]


@dataclass
class EventCounts:
    """What a rank's share of a log held."""

    rows: int = 0
    incomplete: int = 0  # rows without a user, an item or a time, left out
    labels: Counter[str] = field(default_factory=Counter)  # positive label -> times seen
    others: list[str] = field(
        default_factory=list
    )  # a few labels that are not positive, for a message
    time_kinds: set[str] = field(default_factory=set)


def event_files(key: str, events: str) -> list[Path]:
    """Return the log's files, sorted by name. Raises ConfigurationError where there is none."""
    root = Path(events).expanduser()
    found = [root] if root.is_file() else []
    if root.is_dir():
        with os.scandir(root) as entries:
            found = sorted(
                Path(entry.path) for entry in entries if not entry.name.startswith((".", "_"))
            )
    files = [path for path in found if path.suffix in ENDINGS]
    if not files:
        raise ConfigurationError(
            f"{key}={events}: found no file that ends in {' or '.join(ENDINGS)}; expected one, or "
            "a folder of them"
        )
    return files


def file_size(path: Path) -> tuple[int, int]:
    """Return a file's bytes and its events (of JSON lines: an estimate)."""
    size = path.stat().st_size
    if path.suffix == ".parquet":
        with _explained(path):
            from pyarrow import parquet

            return size, int(parquet.read_metadata(path).num_rows)
    return size, size // JSON_ROW_BYTES


def event_units(
    files: Sequence[Path], sizes: NDArray[np.int64], unit_bytes: int = UNIT_BYTES
) -> list[EventUnit]:
    """Return the units of files with these sizes in bytes [files]."""
    parts = [max(1, -(-int(size) // unit_bytes)) for size in sizes]
    return [
        EventUnit(path, part, count)
        for path, count in zip(files, parts, strict=True)
        for part in range(count)
    ]


class EventReader:
    """Read units of a log as its `InterestsConfig` describes it; `counts` adds up what was read."""

    def __init__(self, settings: InterestsConfig) -> None:
        self.settings = settings
        self.counts = EventCounts()
        self.positive = settings.positive_labels()
        self.columns = [
            name
            for name in (settings.user, settings.item, settings.time, settings.labels)
            if name is not None
        ]

    def batches(self, unit: EventUnit) -> Iterator[EventBatch]:
        """Yield the events of a unit.

        Raises BadDataError naming the file for columns that are missing or cannot be read.
        """
        with _explained(unit.path):
            tables = self._parquet(unit) if unit.path.suffix == ".parquet" else self._json(unit)
            for batch in tables:
                missing = [name for name in self.columns if name not in batch.schema.names]
                if missing:
                    raise BadDataError(
                        f"{unit.path}: found the columns {', '.join(batch.schema.names)}, expected "
                        f"{', '.join(missing)} too; "
                        "name the log's columns in the data set's `interests`"
                    )
                yield self._batch(unit.path, batch)

    def _parquet(self, unit: EventUnit) -> Iterator[pa.RecordBatch | pa.Table]:
        from pyarrow import parquet

        file = parquet.ParquetFile(unit.path)
        groups = [
            group
            for group in range(file.num_row_groups)
            if group * unit.parts // file.num_row_groups == unit.part
        ]
        known = [name for name in self.columns if name in file.schema_arrow.names]
        if len(known) < len(self.columns):
            yield file.schema_arrow.empty_table()
        yield from (
            file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, columns=known)
            if groups
            else ()
        )

    def _json(self, unit: EventUnit) -> Iterator[pa.RecordBatch | pa.Table]:
        import pyarrow as pa
        from pyarrow import json

        size = unit.path.stat().st_size
        start, stop = (size * part // unit.parts for part in (unit.part, unit.part + 1))
        with open(unit.path, "rb") as file:
            head = file.read(1 << 20)
            lines = head[: head.rfind(b"\n") + 1] or head + file.readline()
            types = (
                {column.name: column.type for column in json.read_json(io.BytesIO(lines)).schema}
                if lines.strip()
                else {}
            )
            kinds = [
                (name, pa.list_(pa.string()) if pa.types.is_null(types[name]) else types[name])
                for name in self.columns
                if name in types
            ]
            if types and len(kinds) < len(self.columns):
                yield pa.schema(list(types.items())).empty_table()
            options = json.ParseOptions(
                explicit_schema=pa.schema(kinds), unexpected_field_behavior="ignore"
            )
            file.seek(max(start - 1, 0))
            if start:
                file.readline()  # a line belongs to the unit in which it begins
            while file.tell() < stop:
                content = file.read(min(16 << 20, stop - file.tell()))
                content += b"" if content.endswith(b"\n") else file.readline()
                if content.strip():
                    yield from json.read_json(
                        io.BytesIO(content), parse_options=options
                    ).to_batches(max_chunksize=BATCH_ROWS)

    def _batch(self, path: Path, batch: pa.RecordBatch | pa.Table) -> EventBatch:
        import pyarrow as pa
        from pyarrow import compute

        settings, columns = self.settings, dict(zip(batch.schema.names, batch.columns, strict=True))
        columns = {
            name: column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            for name, column in columns.items()
        }
        users, items = (_text(columns[name]) for name in (settings.user, settings.item))
        times, kind = _times(columns[settings.time])
        labels = (
            self._labels(columns[settings.labels], path)
            if settings.labels is not None
            else np.ones(len(batch), dtype=np.uint64)
        )
        whole = compute.and_(compute.and_(users.is_valid(), items.is_valid()), times.is_valid())
        self.counts.rows += len(batch)
        if len(batch):
            self.counts.time_kinds.add(kind)
        if settings.labels is None:
            self.counts.labels[ONE_LABEL] += len(batch)
        if not compute.all(whole).as_py() and len(batch):
            self.counts.incomplete += len(batch) - int(compute.sum(whole).as_py())
            kept = np.asarray(whole.to_numpy(zero_copy_only=False), dtype=bool)
            users, items, times, labels = (
                users.filter(whole),
                items.filter(whole),
                times.filter(whole),
                labels[kept],
            )
        return EventBatch(
            users, items, times.to_numpy(zero_copy_only=False).astype(np.int64), labels
        )

    def _labels(self, column: pa.Array, path: Path) -> NDArray[np.uint64]:
        """Return the bits of the positive labels of each row, uint64 [n]."""
        import pyarrow as pa
        from pyarrow import compute

        result = np.zeros(len(column), dtype=np.uint64)
        if (
            pa.types.is_list(column.type)
            or pa.types.is_large_list(column.type)
            or pa.types.is_fixed_size_list(column.type)
        ):
            values, rows = (
                compute.list_flatten(column),
                compute.list_parent_indices(column).to_numpy(zero_copy_only=False).astype(np.int64),
            )
        else:
            values, rows = column, np.arange(len(column))
        if pa.types.is_nested(values.type):
            raise BadDataError(
                f"{path}: column {self.settings.labels} is {column.type}, expected text or a list "
                "of texts"
            )
        codes, names = _encoded(values)
        bits = np.zeros(len(names) + 1, dtype=np.uint64)  # the last one: null
        times = np.bincount(codes, minlength=len(names) + 1)
        for code, name in enumerate(names):
            if name in self.positive:
                bits[code] = np.uint64(1) << np.uint64(self.positive.index(name))
                self.counts.labels[name] += int(times[code])
            elif name and name not in self.counts.others and len(self.counts.others) < OTHERS_KEPT:
                self.counts.others.append(name)
        np.bitwise_or.at(result, rows, bits[codes])
        return result


def _encoded(values: pa.Array) -> tuple[NDArray[np.int64], list[str]]:
    """Return (codes int64 [n], names): the names of values; a null has the code len(names)."""
    import pyarrow as pa

    found = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    names = [str(name) for name in found.dictionary.to_pylist()]
    return found.indices.fill_null(len(names)).to_numpy(zero_copy_only=False).astype(
        np.int64
    ), names


def _text(column: pa.Array) -> pa.Array:
    """Return a column of ids as Arrow text with 64-bit offsets."""
    import pyarrow as pa

    return column.cast(pa.large_string())


def _times(column: pa.Array) -> tuple[pa.Array, str]:
    """Return (int64 Arrow array that rises with time, what the column holds)."""
    import pyarrow as pa

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        try:
            column = column.cast(pa.timestamp("us", "UTC"))
        except pa.ArrowInvalid:
            column = column.cast(pa.timestamp("us"))
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64()), "whole numbers"
    if pa.types.is_temporal(column.type):
        # Truncated, not refused: a nanosecond more or less is no order that a log can promise.
        stamp = column.cast(pa.timestamp("us", getattr(column.type, "tz", None)), safe=False)
        return stamp.cast(pa.int64()), "timestamps"
    if pa.types.is_floating(column.type):
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        bits = (values + 0.0).view(np.int64)  # + 0.0: -0.0 equals 0.0
        rising = np.where(bits < 0, bits ^ np.int64(2**63 - 1), bits)
        return pa.array(rising, mask=np.isnan(values)), "numbers with a fraction"
    raise BadDataError(
        f"times are {column.type}, expected numbers, timestamps or texts such as "
        "2026-11-29T12:00:00Z"
    )


class _explained:
    """Turn what Arrow or the disk says into a BadDataError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BadDataError) and str(self.path) not in str(error):
            raise BadDataError(f"{self.path}: {error}") from error
        if isinstance(error, OSError | ValueError | KeyError | TypeError) or type(
            error
        ).__module__.startswith("pyarrow"):
            reason = " ".join(str(error).split())[:300]
            raise BadDataError(
                f"{self.path}: cannot be read as events: {reason}; expected a whole file with one "
                "type a column"
            ) from error
