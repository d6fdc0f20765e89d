"""Interactions (user, item, time, label) become one record a user, and the same rows as Parquet,
sorted by user and time.

A row whose item the items data set does not have is dropped; a user with fewer than two items stays
in the Parquet files only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sailplan.config.fields import JsonObject, JsonValue
from sailplan.data.names import given
from sailplan.data.tar import HeldOut
from sailplan.ingest.columns import Columns, number, seconds
from sailplan.ingest.known_ids import KnownIds
from sailplan.ingest.records import Record
from sailplan.ingest.rows import Dropped, Row
from sailplan.ingest.rows_to_shards import count
from sailplan.ingest.shards import write_shard
from sailplan.ingest.shuffle import Keyed, read_bucket
from sailplan.ingest.work import STATE, Drops, Outcome

# Events of a record, the most recent ones: a robot's history must not be one record of megabytes
LONGEST = 4096
TABLES = "interactions"
GROUP_ROWS = 50_000  # of a Parquet row group


@dataclass(frozen=True)
class PickInteraction:
    """Return user and [item, time, label] of a row. labels: whether they are numbers, or words."""

    columns: Columns
    numbers: bool = True

    def __call__(self, tag: str, row: Row, split: str | None) -> tuple[str, JsonValue]:
        names = {role: given(_whole(self.columns.of(role, row))) for role in ("user", "item")}
        for role, name in names.items():
            if name is None:
                raise Dropped(f"no {role}: the cell is empty")
        try:
            time = seconds(self.columns.of("time", row))
        except ValueError as error:
            raise Dropped(
                f"time: {' '.join(str(error).split())[:200]}; expected seconds or a date such as "
                "2024-05-31T12:00:00"
            ) from error
        if time is None and "time" in self.columns.roles:
            raise Dropped("no time: the cell is empty")
        value = self.columns.of("label", row)
        label = None if given(value) is None else number(value)
        if label is not None and self.numbers != isinstance(label, int | float):
            if self.numbers:
                raise Dropped(f"label is {value!r:.60}, expected a number as in the first rows")
            label = str(value)
        return str(names["user"]), [
            names["item"],
            time,
            float(label) if isinstance(label, int | float) else label,
        ]


def _whole(value: object) -> object:
    """A table's whole numbers beside an empty cell are floats: 7.0 is the id 7."""
    return (
        int(value)
        if isinstance(value, float) and math.isfinite(value) and value.is_integer()
        else value
    )


@dataclass(frozen=True)
class WriteHistories:
    """Write the users of a bucket: folder/NAME-NUMBER.tar and
    folder/interactions/part-NUMBER.parquet.
    """

    folder: Path
    phase: str
    spilled: str  # the phase that sorted the rows into buckets
    name: str
    known: Path
    held_out: HeldOut
    timed: bool
    numbers: bool = True

    def __call__(self, part_number: int, bucket: int) -> Outcome:
        outcome, known = Outcome(), KnownIds(self.known)
        table = _Table(self.folder, f"{TABLES}/part-{part_number:06d}.parquet", self.numbers)
        state = self.folder / STATE / self.phase / f"{part_number:06d}.dropped"
        with Drops(state).opened(outcome) as note:

            def records() -> Iterator[Mapping[str, bytes]]:
                for user, rows in read_bucket(self.folder, self.spilled, bucket):
                    kept = []
                    for row in rows:
                        if row.value[0] in known:
                            kept.append(row)
                        else:
                            note(
                                row.file,
                                row.line,
                                f"item {row.value[0]!r:.100} is not in the items data set",
                            )
                    record = self._record(user, kept, table)
                    if record is None:
                        outcome.notes["users with fewer than two items"] = (
                            outcome.notes.get("users with fewer than two items", 0) + 1
                        )
                        continue
                    count(record, outcome, self.held_out)
                    yield record.members()

            outcome.files = write_shard(
                self.folder, f"{self.name}-{part_number:06d}.tar", records()
            )
        outcome.files |= table.close()
        return outcome

    def _record(self, user: str, rows: list[Keyed], table: _Table) -> Record | None:
        events = [row.value for row in rows]
        if self.timed:
            events.sort(key=lambda event: event[1])  # stable: of one time, the source's order
        for item, time, label in events:
            table.add(user, item, time, label)
        events = events[-LONGEST:]
        if len({event[0] for event in events if event[2] != 0}) < 2:
            return None
        body: JsonObject = {"id": user, "items": [event[0] for event in events]}
        if self.timed:
            body["times"] = [event[1] for event in events]
        if any(event[2] is not None for event in events):
            body["labels"] = [event[2] for event in events]
        return Record(body, {})


class _Table:
    """A Parquet file of interactions, written by row groups; there under its name when it is
    closed.
    """

    def __init__(self, folder: Path, name: str, numbers: bool) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        label = pa.float64() if numbers else pa.string()
        self._schema = pa.schema(
            [("user", pa.string()), ("item", pa.string()), ("time", pa.float64()), ("label", label)]
        )
        self._folder, self._name = folder, name
        (folder / name).parent.mkdir(exist_ok=True)
        self._temporary = folder / f"{name}.{os.getpid()}.tmp"
        self._writer = pq.ParquetWriter(self._temporary, self._schema)
        self._rows: list[tuple[object, ...]] = []

    def add(self, *row: object) -> None:
        """Take user, item, time and label of an event."""
        self._rows.append(row)
        if len(self._rows) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(self._schema)
        self._writer.write_table(
            pa.table(
                [
                    pa.array(column, field.type)
                    for column, field in zip(columns, self._schema, strict=True)
                ],
                self._schema,
            )
        )
        self._rows = []

    def close(self) -> dict[str, int]:
        """Write what is left; return the file's name and bytes."""
        if self._rows:
            self._flush()
        self._writer.close()
        size = self._temporary.stat().st_size
        os.replace(self._temporary, self._folder / self._name)
        return {self._name: size}
