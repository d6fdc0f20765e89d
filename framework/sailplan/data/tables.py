"""Tables of a data set's shards: found through manifests, made where they are missing, read
where they lie.

Opening reads one manifest, whatever the number of records; a shard's table is looked at when a
record of it is. Manifests may lie beside the shards and in the cache (`data.places`): each shard's
row is taken from the first that has a current one.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sailplan.data.columns import Columns, Damaged, mapped
from sailplan.data.filling import Progress, fill
from sailplan.data.manifest import ROW, Entry, Manifest, Rows
from sailplan.data.places import kept_places, place_to_write
from sailplan.data.shard_files import Shard
from sailplan.data.stream.published import Published, published
from sailplan.data.stream.shard import RemoteShard
from sailplan.errors import BadDataError

ATTEMPTS = 3  # to index shards that are stale again when they have just been indexed
Stale = Callable[
    ["Tables", NDArray[np.int64]], NDArray[np.bool_]
]  # the tables that there are, numbers of shards [k] -> which are old [k]


@dataclass(frozen=True)
class Source:
    """A manifest and where it lies."""

    file: Path
    manifest: Manifest
    published: Published | None = None  # beside shards that lie elsewhere: tables lie there, too


class Tables:
    """The rows of s shards, and their tables.

    `rows`: [s] of manifest.ROW; memory: the manifests, whatever the number of records.
    """

    def __init__(
        self, sources: list[Source], source: NDArray[np.int64], row: NDArray[np.int64]
    ) -> None:
        """source, row: [s] which of the sources has the shard, and in which row."""
        self._sources, self._source, self._row = sources, source, row
        self.rows: Rows = np.zeros(len(row), dtype=ROW)
        for number, one in enumerate(sources):
            own = source == number
            self.rows[own] = one.manifest.rows[row[own]]
        self._blobs: dict[int, mmap.mmap] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_blobs": {}}

    def tags(self) -> list[str]:
        """Return the tags of these shards, in the order in which the shards have them first."""
        first: dict[str, tuple[int, int]] = {}
        for number, one in enumerate(self._sources):
            of_row = np.full(len(one.manifest.names), len(self.rows), dtype=np.int64)
            own = np.flatnonzero(self._source == number)
            np.minimum.at(of_row, self._row[own], own)
            shards = of_row[one.manifest.tag_rows]
            order = np.lexsort((np.arange(len(shards)), shards))
            codes, places = np.unique(one.manifest.tag_codes[order], return_index=True)
            for code, place in zip(codes.tolist(), places.tolist(), strict=True):
                shard = int(shards[order[place]])
                if shard < len(self.rows):
                    name = one.manifest.tags[code]
                    first[name] = min(
                        first.get(name, (shard, int(order[place]))), (shard, int(order[place]))
                    )
        return sorted(first, key=first.__getitem__)

    def counts(self, tag: str) -> NDArray[np.int64]:
        """Return a tag's count in each shard, int64 [s]."""
        result = np.zeros(len(self.rows), dtype=np.int64)
        for number, one in enumerate(self._sources):
            if tag in one.manifest.tags:
                chosen = one.manifest.tag_codes == one.manifest.tags.index(tag)
                of_row = np.zeros(len(one.manifest.names), dtype=np.int64)
                of_row[one.manifest.tag_rows[chosen]] = one.manifest.tag_counts[chosen]
                own = self._source == number
                result[own] = of_row[self._row[own]]
        return result

    def table(self, shard: int) -> Columns:
        """Return a shard's table, mapped.

        Raises BadDataError where the file of tables went away or is damaged.
        """
        number = int(self._source[shard])
        published, row = self._sources[number].published, self.rows[shard]
        try:
            if published is not None:
                manifest = self._sources[number].manifest
                published.ensure(manifest.blob, manifest.end, int(row["offset"]), int(row["bytes"]))
            if number not in self._blobs:
                one = self._sources[number]
                self._blobs[number] = mapped(
                    one.file.with_name(one.manifest.blob), one.manifest.end
                )
            return Columns(self._blobs[number], int(row["offset"]), int(row["bytes"]))
        except (OSError, Damaged) as error:
            raise self.damaged(shard, error) from error

    def damaged(self, shard: int, error: Exception) -> BadDataError:
        """Return the error that names a damaged file of tables."""
        one = self._sources[int(self._source[shard])]
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        file = one.file.with_name(one.manifest.blob)
        return BadDataError(
            f"{file}: vanished or was damaged ({reason}), expected the tables of {one.file.name}; "
            "`sailplan data index` makes them anew"
        )


def open_tables(
    shards: Sequence[Shard],
    kind: str,
    cache: Path | None,
    make: Callable[[int], Entry],
    stale: Stale,
    progress: Progress,
    *,
    processes: int = 1,
    thorough: bool = False,
) -> Tables:
    """Return the tables of shards, of which those that are missing or stale are made, together
    with all other processes that do.

    kind: name of the manifest. make: entry of the shard with a number. thorough: compare each
    checksum of each table.
    Raises BadDataError for a shard that is damaged or that changes all the time, ConfigurationError
    where nothing can be written.
    """
    if not shards:
        return Tables([], np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    names, before, attempts = relative_names(shards), set[int](), 0
    while True:
        tables, missing = _look(
            shards[0], names, f"{kind}.manifest", cache, stale, thorough and not before
        )
        if not missing:
            return tables
        if before != set(missing):
            before, attempts = set(missing), 0
        if attempts >= ATTEMPTS:
            raise BadDataError(
                f"{shards[missing[0]]}: changes while it is indexed, found it changed {attempts} "
                "times; wait until it is written, start again"
            )
        attempts += fill(
            place_to_write(shards[0], f"{kind}.manifest", cache),
            names,
            missing,
            make,
            progress,
            cache,
            processes,
        )


def relative_names(shards: Sequence[Shard]) -> list[str]:
    """Return the shards' paths relative to the folder of the first."""
    base = str(shards[0].parent)
    start = "" if base == "." else base if base.endswith(os.sep) else base + os.sep
    paths, remote = map(str, shards), isinstance(shards[0], RemoteShard)
    return [
        path[len(start) :]
        if path.startswith(start)
        else path
        if remote
        else os.path.relpath(path, base)
        for path in paths
    ]


def _look(
    first: Shard, names: list[str], file: str, cache: Path | None, stale: Stale, thorough: bool
) -> tuple[Tables, list[int]]:
    """Return the tables that there are, and the numbers of the shards without a current one."""
    sources: list[Source] = []
    source, row = np.full(len(names), -1, dtype=np.int64), np.full(len(names), -1, dtype=np.int64)
    places: list[Path | None] = [*kept_places(first, file, cache)]
    if isinstance(first, RemoteShard):
        places.append(None)  # beside the shards
    for place in places:
        missing = np.flatnonzero(source < 0)
        if not len(missing):
            break
        beside = None
        if place is None and isinstance(first, RemoteShard):
            beside = published(first, file, cache)
            if beside is None:
                continue
            place = beside.file
        assert place is not None
        manifest = Manifest.load(place, alone=beside is not None)
        if manifest is None:
            continue
        known = {name: number for number, name in enumerate(manifest.names)}
        found = np.fromiter(
            (known.get(names[shard], -1) for shard in missing.tolist()), np.int64, len(missing)
        )
        there, found = missing[found >= 0], found[found >= 0]
        source[there], row[there] = len(sources), found
        sources.append(Source(place, manifest, beside))
        source[there[stale(Tables(sources, source, row), there)]] = -1
    tables = Tables(sources, source, row)
    if thorough:
        for shard in np.flatnonzero(source >= 0).tolist():
            try:
                tables.table(shard).check()
            except (BadDataError, Damaged):
                source[shard] = -1
    return tables, np.flatnonzero(source < 0).tolist()
