"""ID embeddings that a recommender brings as files: mapped, found by item id through an index
that all ranks build.

    FOLDER/teachers.json        per teacher: where its vectors lie, rows, dimension
    FOLDER/NAME.hashes.npy      uint64 [n], sorted: 64-bit hashes of the ids
    FOLDER/NAME.rows.npy        int64 [n]: the row of each
    FOLDER/NAME.vectors.npy     [n, d] of a parquet file, which cannot be mapped itself

Building takes 24 bytes of disk a row (and a parquet file's vectors once more). Each rank hashes its
share of the ids and sorts its share of the hashes, so nothing holds all rows. A look-up touches a
few pages. Among 10^8 rows one unknown id in 10^11 would be taken for another's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from sailplan.config.fields import JsonObject
from sailplan.data.config import TeacherConfig
from sailplan.data.index import id_hash
from sailplan.errors import BadDataError, ConfigurationError
from sailplan.runtime.arrays import Array
from sailplan.runtime.files import write_whole
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import in_turns, meet, sum_over_ranks

MANIFEST = "teachers.json"
UNIT_BYTES = 16 << 20  # of a text file of ids
UNIT_ROWS = 1 << 20
PART_ROWS = 1 << 22  # hashes sorted at once, on average
TOP_BITS = 16


@dataclass(frozen=True)
class TeacherShape:
    """What a teacher's file holds."""

    rows: int
    dimension: int
    dtype: str


def teacher_shape(name: str, config: TeacherConfig) -> TeacherShape:
    """Return the shape of a teacher's file, from its header.

    Raises ConfigurationError where it is not what the configuration says.
    """
    key, path = f"data.teachers.{name}", Path(config.path).expanduser()
    if not path.is_file():
        raise ConfigurationError(
            f"{key}.path={config.path}: there is no such file; expected .npy or .parquet"
        )
    try:
        found = _parquet_shape(path, key, config) if path.suffix == ".parquet" else _npy_shape(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigurationError(
            f"{key}.path={config.path}: cannot be read ({reason}); expected a whole .npy or "
            ".parquet"
        ) from error
    if found.dtype not in ("float16", "float32", "float64") or not found.rows:
        raise ConfigurationError(
            f"{key}.path={config.path}: found {found.rows} rows of {found.dtype}, expected rows of "
            "float16 or float32"
        )
    if config.dimension is not None and found.dimension != config.dimension:
        raise ConfigurationError(
            f"{key}.dimension={config.dimension}: found vectors of {found.dimension} in "
            f"{config.path}; set it to that"
        )
    if path.suffix != ".parquet" and (
        config.ids is None or not Path(config.ids).expanduser().is_file()
    ):
        raise ConfigurationError(
            f"{key}.ids={config.ids}: there is no such file; expected a text file with the item id "
            "of each row, one a line"
        )
    return found


def build_teachers(
    parallel: Parallel, teachers: Mapping[str, TeacherConfig], folder: Path
) -> JsonObject:
    """Index the teachers' files below `folder`; return rows and dimensions.

    Collective, the work is shared by all ranks.

    Raises BadDataError for another number of ids than vectors, and for an id that is there twice.
    """
    manifest: JsonObject = {}
    for name, config in teachers.items():
        shape = teacher_shape(name, config)
        manifest[name] = {
            "vectors": _index(parallel, name, config, shape, folder),
            "rows": shape.rows,
            "dimension": shape.dimension,
        }
    problem = None
    if parallel.is_main:
        try:
            write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))
        except OSError as error:
            problem = error
    meet(parallel, f"writing {folder / MANIFEST}", problem)
    return {
        "items": {name: one["rows"] for name, one in manifest.items()},
        "dimensions": {name: one["dimension"] for name, one in manifest.items()},
    }


class TeacherFiles:
    """Mapped teachers, as `build_teachers` indexed them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self._open: dict[str, tuple[Array, NDArray[np.uint64], NDArray[np.int64]]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # a mapped array would travel whole

    @property
    def names(self) -> list[str]:
        """The teachers' names, sorted."""
        return sorted(self.manifest)

    def dimension(self, teacher: str) -> int:
        """Return the length of the teacher's vectors."""
        return int(self.manifest[teacher]["dimension"])

    def look_up(self, teacher: str, item_ids: Iterable[str]) -> Tensor:
        """Return float32 [n, d] of the items, zero rows where the teacher has none.

        Raises BadDataError for numbers that are not finite.
        """
        names = list(item_ids)
        vectors, hashes, rows = self._mapped(teacher)
        wanted = np.fromiter(map(id_hash, names), np.uint64, len(names))
        places = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
        known = np.flatnonzero(hashes[places] == wanted)
        result = np.zeros((len(names), self.dimension(teacher)), dtype=np.float32)
        result[known] = vectors[rows[places[known]]]
        wrong = np.flatnonzero(~np.isfinite(result).all(1))
        if len(wrong):
            where = self.manifest[teacher]["vectors"]
            raise BadDataError(
                f"data.teachers.{teacher}: the vector of {names[wrong[0]]} is not finite; leave "
                f"such rows out of {where}"
            )
        return torch.from_numpy(result)

    def _mapped(self, teacher: str) -> tuple[Array, NDArray[np.uint64], NDArray[np.int64]]:
        if teacher not in self._open:
            paths = (
                Path(self.manifest[teacher]["vectors"]),
                self.folder / f"{teacher}.hashes.npy",
                self.folder / f"{teacher}.rows.npy",
            )
            try:
                vectors, hashes, rows = (np.load(path, mmap_mode="r") for path in paths)
            except (OSError, ValueError) as error:
                raise BadDataError(
                    f"data.teachers.{teacher}: {error}; the file went away or changed since the "
                    "stage began"
                ) from error
            if vectors.shape != (
                self.manifest[teacher]["rows"],
                self.manifest[teacher]["dimension"],
            ):
                raise BadDataError(
                    f"{paths[0]}: found the shape {vectors.shape}, another than when the stage "
                    "began; put that file back"
                )
            self._open[teacher] = vectors, hashes, rows
        return self._open[teacher]


# ---------------------------------------------------------------- parts
@dataclass(frozen=True)
class _Unit:
    """Some rows of a teacher's file: a row group of parquet, a range of bytes of a text of ids."""

    number: int
    start: int
    stop: int


def _npy_shape(path: Path) -> TeacherShape:
    vectors = np.load(path, mmap_mode="r")
    if vectors.ndim != 2:
        raise ValueError(f"the shape is {vectors.shape}, expected [rows, dimension]")
    return TeacherShape(len(vectors), vectors.shape[1], str(vectors.dtype))


def _parquet_shape(path: Path, key: str, config: TeacherConfig) -> TeacherShape:
    import pyarrow as pa
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    for column in (config.ids or "id", config.vector):
        if column not in names:
            raise ConfigurationError(
                f"{key}: {config.path} has the columns {', '.join(names)}, expected {column}; name "
                f"them in {key}.ids and {key}.vector"
            )
    kind = file.schema_arrow.field(config.vector).type
    values = getattr(kind, "value_type", pa.null())
    dtype = {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64"}.get(
        values, str(kind)
    )
    first = next(file.iter_batches(batch_size=1, columns=[config.vector]), None)
    size = len(first.column(0)[0]) if first is not None and len(first) else 0
    return TeacherShape(
        int(file.metadata.num_rows), size, "float32" if dtype == "float64" else dtype
    )


def _index(
    parallel: Parallel, name: str, config: TeacherConfig, shape: TeacherShape, folder: Path
) -> str:
    """Build a teacher's files; return where its vectors lie."""
    source, key = Path(config.path).expanduser().resolve(), f"data.teachers.{name}"
    parquet = source.suffix == ".parquet"
    units = _parquet_units(source) if parquet else _text_units(Path(config.ids or "").expanduser())
    counts, histogram = (
        np.zeros(len(units), dtype=np.int64),
        np.zeros(1 << TOP_BITS, dtype=np.int64),
    )

    def count(unit: _Unit) -> None:
        counts[unit.number] = sum(1 for _ in _lines(config.ids, unit))

    if parquet:
        counts[:] = [unit.stop - unit.start for unit in units]
    else:
        in_turns(parallel, f"{key}: counting ids", units, count)
        counts = sum_over_ranks(counts)
    if int(counts.sum()) != shape.rows:
        raise BadDataError(
            f"{key}.ids={config.ids}: found {int(counts.sum())} ids for {shape.rows} vectors of "
            f"{config.path}, expected one a row"
        )
    starts = np.cumsum(counts) - counts
    stem = folder / name
    vectors = f"{stem}.vectors.npy" if parquet else str(source)
    _make(parallel, stem, shape, vectors if parallel.is_main and parquet else None)

    def read(unit: _Unit) -> None:
        start = int(starts[unit.number])
        unsorted = np.load(f"{stem}.unsorted.npy", mmap_mode="r+")
        names = (
            _parquet_rows(source, config, unit, vectors, start)
            if parquet
            else list(_lines(config.ids, unit))
        )
        hashes = np.fromiter(map(id_hash, names), np.uint64, len(names))
        unsorted[start : start + len(names)] = hashes
        unsorted.flush()
        np.add.at(histogram, (hashes >> np.uint64(64 - TOP_BITS)).astype(np.int64), 1)

    in_turns(parallel, f"{key}: reading {source.name}", units, read)
    ends = np.cumsum(sum_over_ranks(histogram))
    parts = min(1 << TOP_BITS, -(-shape.rows // PART_ROWS))

    def order(part: int) -> None:
        low, high = ((1 << TOP_BITS) * part // parts, (1 << TOP_BITS) * (part + 1) // parts)
        unsorted = np.load(f"{stem}.unsorted.npy", mmap_mode="r")
        chosen = []
        for start in range(0, shape.rows, UNIT_ROWS):
            top = (unsorted[start : start + UNIT_ROWS] >> np.uint64(64 - TOP_BITS)).astype(np.int64)
            chosen.append(start + np.flatnonzero((top >= low) & (top < high)))
        rows = np.concatenate(chosen)
        hashes = unsorted[rows]
        sorting = np.argsort(hashes, kind="stable")
        hashes, rows = hashes[sorting], rows[sorting]
        twice = np.flatnonzero(hashes[1:] == hashes[:-1])
        if len(twice):
            first, second = rows[twice[0]], rows[twice[0] + 1]
            raise BadDataError(
                f"{key}: rows {first} and {second} of {config.path} have the same item id, "
                "expected each once; leave one out"
            )
        place = int(ends[low - 1]) if low else 0
        for ending, values in (("hashes", hashes), ("rows", rows)):
            array = np.load(f"{stem}.{ending}.npy", mmap_mode="r+")
            array[place : place + len(values)] = values
            array.flush()

    in_turns(parallel, f"{key}: sorting ids", range(parts), order)
    if parallel.is_main:
        Path(f"{stem}.unsorted.npy").unlink()
    return vectors


def _make(parallel: Parallel, stem: Path, shape: TeacherShape, vectors: str | None) -> None:
    """Make the files into which the ranks write their parts."""
    problem = None
    if parallel.is_main:
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            for ending, dtype in (
                ("unsorted", np.uint64),
                ("hashes", np.uint64),
                ("rows", np.int64),
            ):
                open_memmap(f"{stem}.{ending}.npy", "w+", dtype, (shape.rows,))
            if vectors is not None:
                open_memmap(vectors, "w+", np.dtype(shape.dtype), (shape.rows, shape.dimension))
        except OSError as error:
            problem = error
    meet(parallel, f"making {stem}", problem)


def _parquet_units(path: Path) -> list[_Unit]:
    from pyarrow import parquet

    metadata, start, units = parquet.read_metadata(path), 0, []
    for number in range(metadata.num_row_groups):
        rows = metadata.row_group(number).num_rows
        units.append(_Unit(number, start, start + rows))
        start += rows
    return units


def _parquet_rows(
    path: Path, config: TeacherConfig, unit: _Unit, target: str, start: int
) -> list[str]:
    """Write the vectors of a row group from row `start` of the .npy `target`; return its ids."""
    import pyarrow as pa
    from pyarrow import parquet

    file, names = parquet.ParquetFile(path), []
    vectors = np.load(target, mmap_mode="r+")
    for batch in file.iter_batches(
        batch_size=1 << 16, row_groups=[unit.number], columns=[config.ids or "id", config.vector]
    ):
        column = batch.column(batch.schema.names.index(config.vector))
        values = column.flatten().to_numpy(zero_copy_only=False)
        ids = batch.column(batch.schema.names.index(config.ids or "id"))
        if column.null_count or ids.null_count or len(values) != len(batch) * vectors.shape[1]:
            raise BadDataError(
                f"{path}: row group {unit.number} has rows without an id or with other than "
                f"{vectors.shape[1]} numbers; leave them out"
            )
        vectors[start : start + len(batch)] = values.reshape(len(batch), -1)
        names += ids.cast(pa.string()).to_pylist()
        start += len(batch)
    return names


def _text_units(path: Path) -> list[_Unit]:
    size = path.stat().st_size
    parts = max(1, -(-size // UNIT_BYTES))
    return [_Unit(part, size * part // parts, size * (part + 1) // parts) for part in range(parts)]


def _lines(path: str | None, unit: _Unit) -> Iterator[str]:
    """Yield the lines that begin in a range of bytes."""
    with open(Path(path or "").expanduser(), "rb") as file:
        file.seek(max(unit.start - 1, 0))
        if unit.start:
            file.readline()
        while file.tell() < unit.stop:
            yield file.readline().rstrip(b"\r\n").decode()
