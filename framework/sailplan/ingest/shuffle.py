"""Bring rows with one key together without holding them all: parts are sorted into buckets on
disk, buckets are worked at one by one.

Each part becomes one Arrow file with a batch for every bucket, so all parts and all buckets can be
worked at in parallel. A bucket's rows come in the order of the source, whoever wrote them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sailplan.config.fields import JsonValue
from sailplan.data.index import id_hash
from sailplan.ingest.rows import Dropped, Part, Row
from sailplan.ingest.work import STATE, Drops, Outcome

BUCKET_BYTES = (
    4 << 20
)  # of the source; a bucket is in memory, as Arrow has it, while it is worked at
SPILL_ROWS = 16_384  # of a part that is sorted into buckets: each bucket reads from every such part
TAKEN_AT_ONCE = 4096  # rows


@dataclass(frozen=True)
class Keyed:
    """A row for its bucket."""

    key: str
    value: JsonValue
    file: str
    line: int


@dataclass(frozen=True)
class TaggedPart:
    """A part of one of several sources; `tag` says which."""

    part: Part
    tag: str


def tagged(parts: Iterable[Part], tag: str) -> Iterator[TaggedPart]:
    """Yield the parts with their tag."""
    return (TaggedPart(part, tag) for part in parts)


def buckets_of(files: Iterable[str]) -> int:
    """Return how many buckets the rows of files are sorted into: a matter of their bytes alone."""
    return 1 + sum(os.path.getsize(name) for name in files) // BUCKET_BYTES


@dataclass(frozen=True)
class Spill:
    """Sort a part's rows into buckets by `pick`, which returns a row's key and value, or raises
    Dropped.
    """

    folder: Path
    phase: str
    buckets: int
    pick: Callable[[str, Row, str | None], tuple[str, JsonValue]]

    def __post_init__(self) -> None:
        import pyarrow.compute
        import pyarrow.parquet  # noqa: F401  before workers are forked: they share its memory

    def __call__(self, number: int, tagged_part: TaggedPart) -> Outcome:
        import pyarrow as pa

        outcome, name = Outcome(), f"{STATE}/{self.phase}/{number:06d}.arrow"
        # Key, value as JSON, file and line: a part's rows are all here, so each is to be small
        found: list[list[tuple[str, str, str, int]]] = [[] for _ in range(self.buckets)]
        with Drops((self.folder / name).with_suffix(".dropped")).opened(outcome) as note:
            for row in tagged_part.part.rows():
                outcome.rows += 1
                outcome.repaired += row.repaired
                try:
                    if row.problem is not None:
                        raise Dropped(row.problem)
                    key, value = self.pick(tagged_part.tag, row, tagged_part.part.split)
                except Dropped as problem:
                    note(row.file, row.line, str(problem))
                    continue
                found[id_hash(key) % self.buckets].append(
                    (key, json.dumps(value), row.file, row.line)
                )
        schema = pa.schema(
            [
                ("key", pa.string()),
                ("value", pa.string()),
                ("file", pa.string()),
                ("line", pa.int64()),
            ]
        )
        temporary = self.folder / f"{name}.{os.getpid()}.tmp"
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for rows in found:
                columns = zip(*rows, strict=True) if rows else [()] * len(schema)
                writer.write_batch(
                    pa.record_batch(
                        [
                            pa.array(column, field.type)
                            for column, field in zip(columns, schema, strict=True)
                        ],
                        schema,
                    )
                )
        outcome.files = {name: temporary.stat().st_size}
        os.replace(temporary, self.folder / name)
        return outcome


def read_bucket(folder: Path, phase: str, bucket: int) -> Iterator[tuple[str, list[Keyed]]]:
    """Yield the bucket's rows by key, keys sorted, rows in the order of the source; only one
    key's rows are Python objects.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    batches = []
    for path in sorted((folder / STATE / phase).glob("*.arrow")):
        with pa.OSFile(str(path)) as file:  # copied, not mapped: of 10^4 parts no map is kept open
            batches.append(pa.ipc.open_file(file).get_batch(bucket))
    if not batches:
        return
    table = pa.Table.from_batches(batches)
    order = pc.sort_indices(table["key"])  # stable
    group: list[Keyed] = []
    for start in range(0, len(order), TAKEN_AT_ONCE):
        for row in table.take(order[start : start + TAKEN_AT_ONCE]).to_pylist():
            if group and group[0].key != row["key"]:
                yield group[0].key, group
                group = []
            group.append(Keyed(row["key"], json.loads(row["value"]), row["file"], row["line"]))
    if group:
        yield group[0].key, group
