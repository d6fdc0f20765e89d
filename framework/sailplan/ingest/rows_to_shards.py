"""A part of rows becomes one shard: items, or pairs that hold their texts and media themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sailplan.data.index import id_hash
from sailplan.data.tar import HeldOut
from sailplan.ingest.records import Record, RecordMaker
from sailplan.ingest.rows import Dropped, Part
from sailplan.ingest.shards import write_shard
from sailplan.ingest.work import STATE, Drops, Outcome


@dataclass(frozen=True)
class WriteShard:
    """Write the records of a part into folder/NAME-NUMBER.tar, its dropped rows and the hashes
    of its ids beside the state.

    by_file: whether a file's name tells the split of its rows.
    """

    folder: Path
    phase: str
    name: str  # of the data set, which its shards' names begin with
    make: RecordMaker
    held_out: HeldOut
    by_file: bool = True

    def __call__(self, number: int, part: Part) -> Outcome:
        outcome, hashes = Outcome(), list[int]()
        state = self.folder / STATE / self.phase
        with Drops(state / f"{number:06d}.dropped").opened(outcome) as note:
            records = self._records(part, outcome, note, hashes)
            outcome.files = write_shard(self.folder, f"{self.name}-{number:06d}.tar", records)
        np.save(state / f"{number:06d}.ids.npy", np.asarray(hashes, dtype=np.uint64))
        return outcome

    def _records(
        self, part: Part, outcome: Outcome, note: Callable[[str, int, str], None], hashes: list[int]
    ) -> Iterator[Mapping[str, bytes]]:
        for row in part.rows():
            outcome.rows += 1
            outcome.repaired += row.repaired
            try:
                record = self.make.make(row, part.split if self.by_file else None)
                members = record.members()
            except Dropped as problem:
                note(row.file, row.line, str(problem))
                continue
            hashes.append(id_hash(record.body["id"]))
            count(record, outcome, self.held_out)
            yield members


def count(record: Record, outcome: Outcome, held_out: HeldOut) -> None:
    """Count a record in the split that it will be in."""
    split = record.body.get("split") or held_out.split(record.body["id"], record.body)
    outcome.splits[split] = outcome.splits.get(split, 0) + 1
    if "score" in record.body:
        outcome.notes["scored"] = outcome.notes.get("scored", 0) + 1
