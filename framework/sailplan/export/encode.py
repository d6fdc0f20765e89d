"""A file of items as vectors: read in order, encoded shard by shard, and put together when all
shards are there.

A shard that is written is never encoded again: the same command after a stop goes on behind the
last whole one. Memory holds one shard, whatever the number of items (a faiss index is held whole by
its nature).

    OUTPUT.parts/job.json, 00000.npy, ...   until the end; job.json says what they are of
    OUTPUT            .npy [n, D] | .parquet (id, vector) | .faiss
    OUTPUT.ids.txt    a line an item, beside .npy and .faiss
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sailplan.config.fields import JsonObject
from sailplan.errors import BadDataError, ConfigurationError
from sailplan.export.load import Model
from sailplan.export.standalone.items import KEYS, SUFFIXES
from sailplan.runtime.arrays import Array
from sailplan.runtime.files import write_whole
from sailplan.runtime.progress import progress

Precision = Literal["float32", "float16", "int8", "binary"]
OUTPUTS, INPUTS = (".npy", ".parquet", ".faiss"), (".jsonl", ".txt", ".parquet")
JOB, SCALE = "job.json", "scale.json"
HEADROOM = 1.5  # later shards have larger numbers, which would be cut


def encode_file(
    model: Model,
    source: Path,
    output: Path,
    *,
    view: str | None = None,
    prompt: str | None = None,
    dimension: int | None = None,
    precision: Precision = "float32",
    batch_size: int = 32,
    shard_rows: int = 8192,
    identity: str = "",
) -> JsonObject:
    """Encode the items of `source` into `output`; return rows, dimensions and the shards that
    were encoded now.

    source: .jsonl (a text, or {"id", "text", "image", "audio"} a line; paths are relative to the
    file), .txt (a text a line), .parquet (these columns), or a folder of pictures and sound.
    precision: int8 is the numbers times one scale, 127 over 1.5 times the largest of the first
    shard, larger ones cut: inner products then order as cosines, and a faiss index is asked with
    vectors times the `scale` that is returned; binary: a bit a dimension, 1 above zero, eight a
    byte. identity: of the model, so that shards of another one are not gone on with.

    Raises ConfigurationError for kinds of files that are not known or whose library is missing, and
    for shards of another job;
    BadDataError for an item that cannot be encoded, with its place.
    """
    check_files(source, output)
    size = model.dimension if dimension is None else dimension
    if precision == "binary" and output.suffix == ".faiss" and size % 8:
        raise ConfigurationError(
            f"--dimension {size}: expected a multiple of 8 for a binary faiss index"
        )
    parts = output.with_name(output.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    stat = source.stat()
    job = {
        "model": identity,
        "source": str(source.resolve()),
        "bytes": stat.st_size,
        "modified": stat.st_mtime_ns,
        "view": view,
        "prompt": prompt,
    }
    job |= {"dimension": size, "precision": precision, "shard_rows": shard_rows}
    found = (
        json.loads((parts / JOB).read_text(encoding="utf-8")) if (parts / JOB).is_file() else job
    )
    if found != job:
        other = next(name for name in job if found.get(name) != job[name])
        raise ConfigurationError(
            f"{parts}: holds shards of another job ({other} is {found.get(other)}, now "
            f"{job[other]}); delete it, or choose another --output"
        )
    write_whole(parts / JOB, json.dumps(job))
    encoded = rows = shards = 0
    with progress("encoding", None, "items") as advance:
        for number, items in enumerate(_shards(read_items(source), shard_rows)):
            file, rows, shards = parts / f"{number:05d}.npy", rows + len(items), number + 1
            if file.is_file() and file.with_suffix(".txt").is_file():
                continue
            try:
                vectors = model.encode(
                    [item for _, item in items],
                    view=view,
                    prompt=prompt,
                    dimension=size,
                    batch_size=batch_size,
                )
            except (ValueError, OSError) as error:
                first, last = number * shard_rows, number * shard_rows + len(items) - 1
                raise BadDataError(
                    f"{source}: items {first} to {last}: {error}; correct or leave out the item"
                ) from error
            write_whole(file.with_suffix(".txt"), "".join(f"{name}\n" for name, _ in items))
            with open(file.with_suffix(".tmp"), "wb") as opened:
                np.save(opened, quantised(vectors, precision, _scale(parts, vectors, number)))
            os.replace(file.with_suffix(".tmp"), file)
            encoded += 1
            advance(len(items))
    if not rows:
        raise BadDataError(f"{source}: found no item, expected at least one")
    scale = {"scale": _scale(parts, np.zeros((1, 1), np.float32), 1)} if precision == "int8" else {}
    _put_together(
        [parts / f"{number:05d}.npy" for number in range(shards)], output, rows, size, precision
    )
    shutil.rmtree(parts)
    return {
        "output": str(output),
        "rows": rows,
        "dimensions": size,
        "precision": precision,
        "shards": shards,
        "encoded_now": encoded,
    } | scale


def check_files(source: Path, output: Path) -> None:
    """Raise ConfigurationError before any work for files that cannot be read or written."""
    if not source.exists():
        raise ConfigurationError(
            f"--input {source}: no such file or folder; expected a folder or a file that ends in "
            f"{', '.join(INPUTS)}"
        )
    if source.is_file() and source.suffix not in INPUTS:
        raise ConfigurationError(
            f"--input {source}: expected a folder or a file that ends in {', '.join(INPUTS)}"
        )
    if output.suffix not in OUTPUTS:
        raise ConfigurationError(
            f"--output {output}: expected a name that ends in {', '.join(OUTPUTS)}"
        )
    if output.suffix == ".faiss":
        _library("faiss", "faiss-cpu")
    if ".parquet" in (source.suffix, output.suffix):
        _library("pyarrow.parquet", "pyarrow")


def _scale(parts: Path, vectors: NDArray[np.float32], number: int) -> float:
    """Return the scale of int8, which the first shard tells."""
    if number == 0:
        largest = min(1.0, HEADROOM * float(np.abs(vectors).max())) or 1.0
        write_whole(parts / SCALE, json.dumps(127.0 / largest))
    return float(json.loads((parts / SCALE).read_text(encoding="utf-8")))


def quantised(vectors: NDArray[np.float32], precision: Precision, scale: float = 127.0) -> Array:
    """Return vectors [n, D] in a smaller type: float16, int8 [n, D] times `scale`, or uint8 [n,
    ceil(D / 8)] of bits.
    """
    if precision == "int8":
        return np.rint(vectors * scale).clip(-127, 127).astype(np.int8)
    if precision == "binary":
        return np.packbits(vectors > 0, axis=1)
    return vectors.astype(precision)


def read_items(source: Path) -> Iterator[tuple[str, object]]:
    """Yield (id, item) in the file's order; without an id its number."""
    if source.is_dir():
        for path in sorted(
            path
            for path in source.rglob("*")
            if path.suffix.lower() in {end for ends in SUFFIXES.values() for end in ends}
        ):
            yield str(path.relative_to(source)), path
        return
    for number, row in enumerate(_rows(source)):
        if isinstance(row, str):
            yield str(number), row
            continue
        if not isinstance(row, dict):
            raise BadDataError(
                f"{source}: item {number} is a {type(row).__name__}, expected a text or an object "
                f"with some of {', '.join(KEYS)}"
            )
        item = {
            key: row[key] if key == "text" else _beside(source, row[key])
            for key in KEYS
            if row.get(key) is not None
        }
        yield str(row.get("id", number)), item


def _rows(source: Path) -> Iterator[object]:
    if source.suffix == ".parquet":
        for batch in _library("pyarrow.parquet", "pyarrow").ParquetFile(source).iter_batches():
            yield from batch.to_pylist()
        return
    with open(source, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                yield json.loads(line) if source.suffix == ".jsonl" else line.rstrip("\n")
            except ValueError as error:
                raise BadDataError(
                    f"{source}: line {number + 1} is not JSON ({error}); correct it"
                ) from error


def _beside(source: Path, value: object) -> object:
    if isinstance(value, list):
        return [_beside(source, one) for one in value]
    return str(source.parent / value) if isinstance(value, str) else value


def _shards(items: Iterable[tuple[str, object]], rows: int) -> Iterator[list[tuple[str, object]]]:
    remaining = iter(items)
    while shard := list(itertools.islice(remaining, rows)):
        yield shard


def _put_together(
    files: list[Path], output: Path, rows: int, size: int, precision: Precision
) -> None:
    temporary = output.with_name(output.name + ".tmp")
    if output.suffix == ".parquet":
        _parquet(files, temporary)
    elif output.suffix == ".faiss":
        _faiss(files, temporary, size, precision)
    else:
        first = np.load(files[0], mmap_mode="r")
        whole = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=first.dtype, shape=(rows, first.shape[1])
        )
        start = 0
        for file in files:
            part = np.load(file)
            whole[start : start + len(part)] = part
            start += len(part)
        whole.flush()
    if output.suffix != ".parquet":
        with open(f"{output}.ids.txt", "w", encoding="utf-8") as ids:
            ids.writelines(file.with_suffix(".txt").read_text(encoding="utf-8") for file in files)
    os.replace(temporary, output)


def _parquet(files: list[Path], output: Path) -> None:
    parquet, arrow = _library("pyarrow.parquet", "pyarrow"), _library("pyarrow", "pyarrow")
    writer = None
    for file in files:
        vectors = np.load(file)
        column = arrow.FixedSizeListArray.from_arrays(
            arrow.array(vectors.ravel()), vectors.shape[1]
        )
        table = arrow.table(
            {
                "id": file.with_suffix(".txt").read_text(encoding="utf-8").splitlines(),
                "vector": column,
            }
        )
        writer = writer or parquet.ParquetWriter(output, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def _faiss(files: list[Path], output: Path, size: int, precision: Precision) -> None:
    faiss = _library("faiss", "faiss-cpu")
    if precision == "binary":
        index = faiss.IndexBinaryFlat(size)
    elif precision == "float32":
        index = faiss.IndexFlatIP(size)
    else:
        kind = (
            faiss.ScalarQuantizer.QT_fp16
            if precision == "float16"
            else faiss.ScalarQuantizer.QT_8bit_direct_signed
        )
        index = faiss.IndexScalarQuantizer(size, kind, faiss.METRIC_INNER_PRODUCT)
    for file in files:
        part = np.load(file)
        index.add(part if precision == "binary" else part.astype(np.float32))
    (faiss.write_index_binary if precision == "binary" else faiss.write_index)(index, str(output))


def _library(name: str, package: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"{name.split('.')[0]} is not installed, which this kind of file needs: pip install "
            f"{package}"
        ) from error
