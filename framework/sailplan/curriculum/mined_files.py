"""Mined negatives as files for others and for later runs: ids and scores, a row a query.

    FOLDER/part-00000.parquet    dataset, pattern, id: text; negatives: list of texts; scores: list
                                 of float32
    FOLDER/round.json            what the round notes of each pattern, its thresholds among it

Each rank writes a part and reads its share of the row groups. Records are found by id, so a later
run may have more of them, or others; those that it lacks are counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from numpy.typing import NDArray

from sailplan.config.fields import JsonObject
from sailplan.config.schema import PatternKey
from sailplan.curriculum.rounds import Rounds
from sailplan.data.negatives import ROUND
from sailplan.data.reader import RecordReader
from sailplan.errors import BadDataError, ConfigurationError
from sailplan.runtime.arrays import SharedArray
from sailplan.runtime.files import write_whole
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import apart, in_turns, sum_over_ranks
from sailplan.runtime.watch import alone

ROWS = 1 << 14  # of a row group
_KINDS = ("negatives", "scores")
SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("pattern", pa.string()),
        ("id", pa.string()),
        ("negatives", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
    ]
)


def write_mined(
    parallel: Parallel, readers: Mapping[str, RecordReader], mined: Path, folder: Path
) -> None:
    """Write a round of mining (its folder) as parquet files below `folder`. Collective."""
    note = json.loads((mined / ROUND).read_text(encoding="utf-8"))

    def clear() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob("part-*.parquet"), folder / ROUND]:
            path.unlink(missing_ok=True)

    on_main(parallel, f"clearing {folder}", clear)

    def write() -> None:
        with parquet.ParquetWriter(folder / f"part-{parallel.rank:05d}.parquet", SCHEMA) as file:
            for name, about in note["patterns"].items():
                key = PatternKey.parse(name)
                arrays = [np.load(mined / about[kind], mmap_mode="r") for kind in _KINDS]
                units = range(0, len(arrays[0]), ROWS)
                for start in units[parallel.rank :: parallel.world_size]:
                    alone()
                    negatives, scores = (np.array(part[start : start + ROWS]) for part in arrays)
                    file.write_table(_table(key, readers[key.dataset], start, negatives, scores))

    apart(parallel, f"writing {folder}", write)
    on_main(
        parallel,
        f"writing {folder}",
        lambda: write_whole(folder / ROUND, json.dumps(note, indent=1)),
    )


def _table(
    key: PatternKey,
    reader: RecordReader,
    start: int,
    negatives: NDArray[np.int64],
    scores: NDArray[np.float32],
) -> pa.Table:
    """Return the records of a part that have negatives."""
    there = negatives >= 0
    rows = np.flatnonzero(there.any(1))
    counts = there[rows].sum(1)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    named = reader.ids(negatives[rows][there[rows]])
    return pa.table(
        [
            pa.array([key.dataset] * len(rows), pa.string()),
            pa.array([key.pattern] * len(rows), pa.string()),
            pa.array(reader.ids(start + rows), pa.string()),
            pa.ListArray.from_arrays(offsets, pa.array(named, pa.string())),
            pa.ListArray.from_arrays(offsets, pa.array(scores[rows][there[rows]], pa.float32())),
        ],
        schema=SCHEMA,
    )


def read_mined(
    parallel: Parallel,
    readers: Mapping[str, RecordReader],
    patterns: Mapping[str, Sequence[str]],
    per_query: int,
    source: Path,
    rounds: Rounds,
) -> dict[str, JsonObject]:
    """Put negatives that `write_mined` wrote in force as the round of step 0; return what it notes
    of each pattern. Collective.

    A query's first `per_query` are taken. Raises ConfigurationError where the folder has no
    negatives of a pattern, BadDataError for files of another form.
    """
    wanted = [PatternKey(name, pattern) for name, names in patterns.items() for pattern in names]

    def look() -> JsonObject:
        if not (source / ROUND).is_file():
            raise ConfigurationError(
                f"hard_negatives.from_folder={source}: found no {ROUND}, expected a folder that `sailplan "
                "mine` has written"
            )
        note = json.loads((source / ROUND).read_text(encoding="utf-8"))
        lacking = [str(key) for key in wanted if str(key) not in note["patterns"]]
        if lacking:
            raise ConfigurationError(
                f"hard_negatives.from_folder={source}: found negatives of "
                f"{', '.join(note['patterns']) or 'nothing'}, expected {lacking[0]} among them; mine "
                "it, too, or name others in hard_negatives.patterns"
            )
        files = sorted(source.glob("part-*.parquet"))
        groups = [parquet.ParquetFile(path).num_row_groups for path in files]
        return {
            "patterns": note["patterns"],
            "units": [
                (str(file), one)
                for file, count in zip(files, groups, strict=True)
                for one in range(count)
            ],
        }

    found = on_main(parallel, f"looking into {source}", look)
    working = rounds.working(0)
    arrays: dict[PatternKey, list[SharedArray]] = {}
    about: dict[str, JsonObject] = {}
    for number, key in enumerate(wanted):
        name, shape = str(key), (len(readers[key.dataset]), per_query)
        arrays[key] = [
            SharedArray(working / f"{number}.{kind}.npy", shape, dtype)
            for kind, dtype in zip(_KINDS, ("int64", "float32"), strict=True)
        ]
        about[name] = found["patterns"][name] | {
            kind: array.path.name for kind, array in zip(_KINDS, arrays[key], strict=True)
        }

    def create() -> None:
        rounds.begin(0, str(source))
        for array in (one for both in arrays.values() for one in both):
            array.create()

    on_main(parallel, f"making {working}", create)

    def empty() -> None:
        for negatives, scores in arrays.values():
            units = range(0, negatives.shape[0], ROWS)
            for start in units[parallel.rank :: parallel.world_size]:
                alone()
                rows = min(ROWS, negatives.shape[0] - start)
                negatives.write(start, np.full((rows, per_query), -1))
                scores.write(start, np.full((rows, per_query), -np.inf))

    apart(parallel, f"making {working}", empty)
    counts = np.zeros((len(wanted), 2), dtype=np.int64)  # records with negatives, records lacking

    def read(unit: tuple[str, int]) -> None:
        try:
            table = parquet.ParquetFile(unit[0]).read_row_group(unit[1], SCHEMA.names)
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise BadDataError(
                f"{unit[0]}: {error}; write it again with `sailplan mine`"
            ) from error
        for number, key in enumerate(wanted):
            here = np.array(table["dataset"].to_pylist()) == key.dataset
            here &= np.array(table["pattern"].to_pylist()) == key.pattern
            own = table.filter(pa.array(here))
            if len(own):
                counts[number] += _put(own, readers[key.dataset], arrays[key], per_query)

    in_turns(parallel, f"reading {source}", [tuple(unit) for unit in found["units"]], read)
    for name, (there, lacking) in zip(about, sum_over_ranks(counts).tolist(), strict=True):
        about[name] |= {"with_negatives": there, "records_lacking": lacking}
    on_main(parallel, f"writing {rounds.path(0)}", lambda: rounds.publish(0, str(source), about))
    return about


def _put(
    table: pa.Table, reader: RecordReader, arrays: Sequence[SharedArray], per_query: int
) -> NDArray[np.int64]:
    """Write the rows of a pattern; return how many there are, and how many this run has not."""
    positions = [reader.find(name) for name in table["id"].to_pylist()]
    found = np.array([-1 if one is None else one for one in positions], dtype=np.int64)
    negatives = np.full((len(found), per_query), -1, dtype=np.int64)
    scores = np.full((len(found), per_query), -np.inf, dtype=np.float32)
    for row, (names, values) in enumerate(
        zip(table["negatives"].to_pylist(), table["scores"].to_pylist(), strict=True)
    ):
        known = [
            (place, value)
            for name, value in zip(names, values, strict=True)
            if (place := reader.find(name)) is not None
        ]
        for column, (place, value) in enumerate(known[:per_query]):
            negatives[row, column], scores[row, column] = place, value
    order = np.argsort(found, kind="stable")
    order = order[np.searchsorted(found[order], 0) :]
    runs = np.flatnonzero(np.diff(found[order], prepend=-2) != 1)
    for first, stop in zip(runs, [*runs[1:], len(order)], strict=True):
        part = order[first:stop]
        arrays[0].write(int(found[part[0]]), negatives[part])
        arrays[1].write(int(found[part[0]]), scores[part])
    return np.array([int((negatives[order] >= 0).any(1).sum()), int((found < 0).sum())])
