"""Cut a log of events by user into buckets that fit in memory, with all ranks and through files.

Each rank reads its share of the log and appends the events, sorted by bucket, to one file of its
own, a chunk at a time. A bucket is read back from the pieces in every rank's file. Which bucket a
user is in depends on the user's name and the number of buckets alone, and that number on the log
alone: any number of ranks gives the same buckets.

    FOLDER/rank-00000.arrow    one record batch a chunk: user, item, id, time, label
    FOLDER/rank-00000.npy      int64 [chunks, buckets + 1] where each bucket begins in a chunk

What it costs: a rank holds one chunk (`CHUNK_ROWS`) or one bucket; the files together hold every
event once (some 45 bytes each); with 1,024 ranks and 10^4 buckets there are 2,048 files, and each
is opened once for each bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sailplan.curriculum.interests import Events, mixed
from sailplan.data.events import EventCounts, EventReader, EventUnit, event_units, file_size
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import any_over_ranks, in_turns, meet, sum_over_ranks

if TYPE_CHECKING:
    import pyarrow as pa


BUCKET_EVENTS = 1 << 18  # events of a bucket, on average: some 100 MB while it is worked on
CHUNK_ROWS = 1 << 20
FNV_START, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


@dataclass(frozen=True)
class Bucket:
    """The events of the users of one bucket."""

    events: Events  # items are catalogue positions
    users: list[str]  # names, sorted; events.users counts them
    hashes: NDArray[np.uint64]  # [users]
    ids: dict[int, str]  # catalogue position -> id of every item here


class EventBuckets:
    """Written by `cut_by_user`; `load(bucket)` reads one back."""

    def __init__(self, folder: Path, count: int, ranks: int) -> None:
        self.folder, self.count, self.ranks = folder, count, ranks

    def load(self, bucket: int) -> Bucket:
        """Return one bucket; the same whatever the number of ranks that wrote it."""
        import pyarrow as pa

        pieces = []
        for rank in range(self.ranks):
            stem = self.folder / f"rank-{rank:05d}"
            offsets = np.load(f"{stem}.npy", mmap_mode="r")[:, bucket : bucket + 2].tolist()
            # Mapped anew each time: what was read for a bucket leaves memory with it.
            reader = pa.ipc.open_file(pa.memory_map(f"{stem}.arrow"))
            pieces += [
                reader.get_batch(chunk).slice(start, stop - start)
                for chunk, (start, stop) in enumerate(offsets)
                if stop > start
            ]
        table = pa.Table.from_batches(pieces, schema=_schema())
        codes, names, hashes = _named(table["user"])
        items = table["item"].to_numpy()
        places, first = np.unique(items, return_index=True)
        ids = dict(zip(places.tolist(), table["id"].take(pa.array(first)).to_pylist(), strict=True))
        return Bucket(
            Events(codes, items, table["time"].to_numpy(), table["label"].to_numpy()),
            names,
            hashes,
            ids,
        )


@dataclass(frozen=True)
class Cut:
    """What `cut_by_user` made and saw."""

    buckets: EventBuckets
    counts: EventCounts  # of this rank's share
    known: int  # events of this rank's share whose item is in the catalogue
    unknown: int
    used: NDArray[np.uint8]  # [catalogue] 1 for each item with a positive event, of all ranks


def cut_by_user(
    parallel: Parallel,
    reader: EventReader,
    files: list[Path],
    folder: Path,
    find: Callable[[object], NDArray[np.int64]],
    items: int,
    *,
    bucket_events: int = BUCKET_EVENTS,
) -> Cut:
    """Write the log's events below `folder`, cut by user.

    Collective; every rank reads its share of the log.

    find: catalogue positions int64 [n] of ids (an Arrow text array), -1 where unknown; such events
    are left out.
    items: size of the catalogue. Memory: a chunk of events, and two bytes an item of the catalogue.
    """
    sizes = _sizes(parallel, files)
    count = max(1, -(-int(sizes[:, 1].sum()) // bucket_events))
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(folder / f"rank-{parallel.rank:05d}", count)
    used = np.zeros(items, dtype=np.uint8)
    known = unknown = 0

    def read(unit: EventUnit) -> None:
        nonlocal known, unknown
        for batch in reader.batches(unit):
            found = find(batch.items)
            kept = found >= 0
            unknown += int((~kept).sum())
            known += int(kept.sum())
            used[found[kept & (batch.labels != 0)]] = 1
            writer.add(batch.users, found, batch.items, batch.times, batch.labels, kept)

    in_turns(parallel, "reading events", event_units(files, sizes[:, 0]), read)
    problem = None
    try:
        writer.close()
    except OSError as error:
        problem = error
    meet(parallel, "writing events by user", problem)
    return Cut(
        EventBuckets(folder, count, parallel.world_size),
        reader.counts,
        known,
        unknown,
        any_over_ranks(used),
    )


def text_hashes(values: pa.Array) -> NDArray[np.uint64]:
    """Return a hash of each text of an Arrow large_string array, uint64 [n]: FNV-1a with
    well-mixed bits, the same everywhere.
    """
    _, offsets, data = values.buffers()
    starts = np.frombuffer(offsets, dtype=np.int64)[values.offset : values.offset + len(values) + 1]
    content = (
        np.frombuffer(data, dtype=np.uint8) if data is not None else np.empty(0, dtype=np.uint8)
    )
    lengths, result = np.diff(starts), np.full(len(values), FNV_START, dtype=np.uint64)
    rows, byte = np.flatnonzero(lengths > 0), 0
    while len(rows):
        result[rows] = (result[rows] ^ content[starts[rows] + byte]) * FNV_PRIME
        byte += 1
        rows = rows[lengths[rows] > byte]
    return mixed(result)


# ---------------------------------------------------------------- parts
class _Writer:
    """A rank's file: chunks of events sorted by bucket."""

    def __init__(self, stem: Path, buckets: int) -> None:
        self.stem, self.buckets = stem, buckets
        self.waiting: list[pa.RecordBatch] = []
        self.rows = 0
        self.offsets: list[NDArray[np.int64]] = []
        import pyarrow as pa

        self.file = pa.ipc.new_file(f"{stem}.arrow", _schema())

    def add(
        self,
        users: object,
        items: NDArray[np.int64],
        ids: object,
        times: NDArray[np.int64],
        labels: NDArray[np.uint64],
        kept: NDArray[np.bool_],
    ) -> None:
        import pyarrow as pa

        batch = pa.RecordBatch.from_arrays(
            [users, pa.array(items), ids, pa.array(times), pa.array(labels)], schema=_schema()
        )
        batch = batch if kept.all() else batch.filter(pa.array(kept))
        if len(batch):
            self.waiting.append(batch)
            self.rows += len(batch)
        if self.rows >= CHUNK_ROWS:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        import pyarrow as pa

        batch = pa.Table.from_batches(self.waiting).combine_chunks().to_batches()[0]
        buckets = (text_hashes(batch["user"]) % np.uint64(self.buckets)).astype(np.int64)
        order = np.argsort(buckets, kind="stable")
        self.file.write_batch(batch.take(pa.array(order)))
        self.offsets.append(
            np.searchsorted(buckets[order], np.arange(self.buckets + 1)).astype(np.int64)
        )
        self.waiting, self.rows = [], 0

    def close(self) -> None:
        self.flush()
        self.file.close()
        np.save(
            f"{self.stem}.npy", np.array(self.offsets, dtype=np.int64).reshape(-1, self.buckets + 1)
        )


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("user", pa.large_string()),
            ("item", pa.int64()),
            ("id", pa.large_string()),
            ("time", pa.int64()),
            ("label", pa.uint64()),
        ]
    )


def _sizes(parallel: Parallel, files: list[Path]) -> NDArray[np.int64]:
    """Return (bytes, events) of each file, int64 [files, 2]; each rank looks at its share."""
    sizes, problem = np.zeros((len(files), 2), dtype=np.int64), None
    try:
        for number in range(parallel.rank, len(files), parallel.world_size):
            sizes[number] = file_size(files[number])
    except Exception as error:
        problem = error
    meet(parallel, "looking at the files of events", problem)
    return sum_over_ranks(sizes)


def _named(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str], NDArray[np.uint64]]:
    """Return (codes int64 [n], names sorted, hashes uint64 [names]) of a column of texts."""
    import pyarrow as pa
    from pyarrow import compute

    if not len(column):
        return np.empty(0, dtype=np.int64), [], np.empty(0, dtype=np.uint64)
    encoded = column.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    order = compute.array_sort_indices(encoded.dictionary)
    names = encoded.dictionary.take(order)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order.to_numpy()] = np.arange(len(order))
    return rank[encoded.indices.to_numpy()], names.to_pylist(), text_hashes(names)
