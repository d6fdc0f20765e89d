"""Semantic IDs: an item's embedding as a short tuple of codes, coarse to fine, by residual k-means
(recipe section 5).

Items that share the first codes are alike; the tuple is what a ranking or a generative model uses in
place of an arbitrary item id. The vectors are a folder that `sailplan embed` wrote; code books are
fitted on it (`embed.residual_k_means`), or are those of an earlier call, which new items then share.

    OUT/64-64-64/part-00000.parquet   id: text, codes: list of int32; a part a shard of the vectors
    OUT/64-64-64/code_books.npz       level_0, level_1, ...: float32 [k, D]
    OUT/64-64-64/semantic_ids.json    how well they do; written last

The ranks share the batches of the fit, the shards and the counting. A call that was stopped or
killed goes on with the levels and parts that are there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from numpy.typing import NDArray

from sailplan.config.fields import JsonObject
from sailplan.embed.residual_k_means import CodeBooks, chosen, fit_level
from sailplan.errors import ConfigurationError
from sailplan.export.vector_folder import VectorFolder
from sailplan.runtime.arrays import save
from sailplan.runtime.files import write_whole
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.tally import Tally, tally
from sailplan.runtime.turns import apart, everywhere, in_turns, sum_over_ranks
from sailplan.runtime.watch import alone

STATISTICS, BOOKS, BEGUN = "semantic_ids.json", "code_books.npz", "begun.json"
SQUARED = b"squared_residuals"  # of a part's rows after each level, in the part's metadata
EXACT_KEYS = 2**62  # tuples up to so many are numbered; of more there is a hash
Integers = NDArray[np.int64]


def semantic_ids(
    parallel: Parallel,
    vectors: Path,
    out: Path,
    *,
    sizes: Sequence[Sequence[int]] = (),
    books: Sequence[Path] = (),
    seed: int = 0,
) -> JsonObject:
    """Write the codes of a folder of vectors below `out`; return the statistics by name. Collective.

    sizes: of code books to fit, such as [[64, 64, 64], [256, 256]]. books: folders of an earlier
    call, whose code books are used. The same codes come out at any number of ranks.
    Raises ConfigurationError for other folders and sizes, StopRequested on all ranks.
    """
    names = ["-".join(map(str, each)) for each in sizes] + [path.name for path in books]
    folder = everywhere(
        parallel, f"opening {vectors}", lambda: _checked(vectors, out, names, sizes, books)
    )
    makers = [_Maker(parallel, folder, out / name) for name in names]
    for maker, each in zip(makers, sizes, strict=False):
        maker.begin(each, None, seed)
    for maker, path in zip(makers[len(sizes) :], books, strict=True):
        maker.begin((), path / BOOKS, seed)
    _assign(parallel, folder, makers)
    return {name: maker.finish() for name, maker in zip(names, makers, strict=True)}


def load_code_books(folder: Path) -> CodeBooks:
    """Return the code books of a folder. Raises ConfigurationError where there are none."""
    if not (folder / BOOKS).is_file():
        raise ConfigurationError(
            f"{folder}: found no {BOOKS}, expected a folder that `sailplan semantic-ids` has written"
        )
    with np.load(folder / BOOKS) as found:
        return CodeBooks(tuple(found[f"level_{level}"] for level in range(len(found.files))))


def parse_sizes(key: str, given: Sequence[str]) -> list[list[int]]:
    """Return sizes of code books from texts such as "64,64,64". Raises ConfigurationError."""
    found: list[list[int]] = []
    for text in given:
        parts = text.split(",")
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ConfigurationError(
                f"{key} {text}: expected sizes of code books, such as 64,64,64"
            )
        if [int(part) for part in parts] in found:
            raise ConfigurationError(f"{key} {text}: found twice, expected once")
        found.append([int(part) for part in parts])
    return found


class _Maker:
    """One set of code books and the codes that they give."""

    def __init__(self, parallel: Parallel, vectors: VectorFolder, out: Path) -> None:
        self._parallel, self._vectors, self.out = parallel, vectors, out
        self.books = CodeBooks(())

    def begin(self, sizes: Sequence[int], given: Path | None, seed: int) -> None:
        """Fit code books of these sizes, or take those of a file. Collective."""
        about: JsonObject = {"vectors": self._vectors.identity, "seed": seed, "sizes": list(sizes)}
        if given is not None:
            about["books"] = hashlib.sha256(given.read_bytes()).hexdigest()

        def clear() -> None:
            note = self.out / BEGUN
            if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == about:
                return
            shutil.rmtree(self.out, ignore_errors=True)
            write_whole(note, json.dumps(about))
            if given is not None:
                shutil.copy(given, self.out / BOOKS)

        on_main(self._parallel, f"looking into {self.out}", clear)
        if given is None:
            self._fit(sizes, seed)
        self.books = everywhere(
            self._parallel, f"reading {self.out}", partial(load_code_books, self.out)
        )

    def _fit(self, sizes: Sequence[int], seed: int) -> None:
        levels: list[NDArray[np.float32]] = []
        for level, size in enumerate(sizes):
            path = self.out / f"level-{level}.npy"
            done = on_main(self._parallel, f"looking for {path}", path.is_file)
            if not done:
                found = fit_level(self._parallel, self._vectors, levels, size, seed, *sizes)
                on_main(self._parallel, f"writing {path}", partial(save, path, found))
            levels.append(np.load(path))

        def join() -> None:
            temporary = self.out / ".code_books.npz"
            arrays = {f"level_{level}": book for level, book in enumerate(levels)}
            np.savez(temporary, allow_pickle=False, **arrays)
            os.replace(temporary, self.out / BOOKS)

        on_main(self._parallel, f"writing {self.out / BOOKS}", join)

    def part(self, shard: int) -> Path:
        """Return the file of a shard's codes."""
        return self.out / f"part-{shard:05d}.parquet"

    def write(self, shard: int, ids: list[str], codes: Integers, squared: list[float]) -> None:
        """Write a part, whole or not at all."""
        flat = pa.array(codes.astype(np.int32).ravel(), pa.int32())
        lists = pa.FixedSizeListArray.from_arrays(flat, codes.shape[1])
        table = pa.table({"id": pa.array(ids, pa.string()), "codes": lists})
        temporary = self.out / f".part-{shard:05d}.{os.getpid()}"
        parquet.write_table(
            table.replace_schema_metadata({SQUARED: json.dumps(squared)}), temporary
        )
        os.replace(temporary, self.part(shard))

    def codes(self, shard: int) -> Integers:
        """Return the codes int64 [k, L] of a part."""
        column = parquet.read_table(self.part(shard), columns=["codes"])["codes"]
        flat = column.combine_chunks().flatten().to_numpy().astype(np.int64)
        return flat.reshape(-1, len(self.books.levels))

    # ---------------------------------------------------------------- how well they do
    def finish(self) -> JsonObject:
        """Count, write and return the statistics. Collective."""
        parallel, folder, levels = self._parallel, self._vectors, len(self.books.levels)
        squared = np.zeros((len(folder.sizes), levels))
        used = [np.zeros(size, dtype=np.int64) for size in self.books.sizes]

        def look() -> None:
            for shard in range(parallel.rank, len(folder.sizes), parallel.world_size):
                alone()
                schema = parquet.read_schema(self.part(shard))
                squared[shard] = json.loads(schema.metadata[SQUARED])
                for level, codes in enumerate(self.codes(shard).T):
                    used[level] += np.bincount(codes, minlength=len(used[level]))

        apart(parallel, f"counting codes of {self.out}", look)
        squared = sum_over_ranks(squared)
        counts = [sum_over_ranks(each) for each in used]
        whole = self._tally(lambda shard: self._keys(shard, levels))
        found: JsonObject = {
            "sizes": list(self.books.sizes),
            "rows": folder.rows,
            "errors": [math.fsum(each) / folder.rows for each in squared.T],
            "used": [int((each > 0).sum()) for each in counts],
            "unique": whole.distinct,
            "collision_rate": whole.shared / whole.rows,
            "largest_bucket": whole.largest,
        }
        if folder.labelled:
            found |= self._agreement()
        on_main(
            parallel,
            f"writing {self.out / STATISTICS}",
            lambda: write_whole(self.out / STATISTICS, json.dumps(found, indent=1)),
        )
        return found

    def _agreement(self) -> JsonObject:
        """Return the normalised mutual information of the rows' labels and their first codes, for
        one code up to all: 2 I / (H(labels) + H(codes)), of rows with a label. Collective.
        """
        labels = self._tally(lambda shard: self._labels(shard)[1])
        found: list[float] = []
        for depth in range(1, len(self.books.levels) + 1):

            def codes(shard: int, depth: int = depth) -> Integers:
                return self._keys(shard, depth)[self._labels(shard)[0]]

            def both(shard: int, depth: int = depth) -> Integers:
                here, names = self._labels(shard)
                return _mixed(_mixed(self._keys(shard, depth)[here]) + names)

            own, joint = self._tally(codes), self._tally(both)
            total = labels.entropy + own.entropy
            found.append(2 * (total - joint.entropy) / total if total else 1.0)
        return {"nmi": found, "labels": labels.distinct, "labelled_rows": labels.rows}

    def _tally(self, keys_of: Callable[[int], Integers]) -> Tally:
        folder = self._vectors
        work = self.out / "counting"
        return tally(self._parallel, work, len(folder.sizes), folder.rows, keys_of)

    def _keys(self, shard: int, depth: int) -> Integers:
        """Return a number int64 [k] of each row's first codes, equal for equal codes."""
        codes, sizes = self.codes(shard), self.books.sizes[:depth]
        found = np.zeros(len(codes), dtype=np.int64)
        for size, column in zip(sizes, codes.T, strict=False):
            found = (
                found * size + column if math.prod(sizes) < EXACT_KEYS else _mixed(found) + column
            )
        return found

    def _labels(self, shard: int) -> tuple[NDArray[np.bool_], Integers]:
        """Return which rows have a label, bool [k], and a hash of theirs."""
        names = np.array(self._vectors.labels(shard), dtype=object)
        here = names != ""
        distinct, back = np.unique(names[here].astype(str), return_inverse=True)
        hashes = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in distinct]
        return here, np.frombuffer(b"".join(hashes), dtype=np.int64)[back]


def _assign(parallel: Parallel, folder: VectorFolder, makers: Sequence[_Maker]) -> None:
    """Write the codes of all shards, which are read once for all code books. Collective."""

    def write(shard: int) -> None:
        left = [maker for maker in makers if not maker.part(shard).is_file()]
        if not left:
            return
        books = [maker.books.on(parallel.device) for maker in left]
        codes = [np.empty((folder.sizes[shard], len(book)), dtype=np.int64) for book in books]
        squared = [[0.0] * len(book) for book in books]
        upto = 0
        for number in folder.blocks_of(shard):
            alone()
            rows = torch.from_numpy(folder.block_of(shard, number)).to(parallel.device)
            for each, found, errors in zip(books, codes, squared, strict=True):
                rest = rows
                for level, book in enumerate(each):
                    code, rest = chosen(rest, [book])
                    found[upto : upto + len(rows), level] = code[:, 0].cpu().numpy()
                    errors[level] += float(rest.double().square().sum())
            upto += len(rows)
        ids = folder.ids(shard)
        for maker, found, errors in zip(left, codes, squared, strict=True):
            maker.write(shard, ids, found, errors)

    in_turns(parallel, "writing semantic IDs", range(len(folder.sizes)), write)


def _checked(
    vectors: Path,
    out: Path,
    names: Sequence[str],
    sizes: Sequence[Sequence[int]],
    books: Sequence[Path],
) -> VectorFolder:
    folder = VectorFolder(vectors)
    if not names:
        raise ConfigurationError("semantic IDs: found neither sizes nor code books, expected some")
    if any(not each or min(each) < 1 for each in sizes):
        raise ConfigurationError(
            f"semantic IDs: found the sizes {[list(each) for each in sizes]}, expected code books of "
            "at least 1"
        )
    if not folder.rows:
        raise ConfigurationError(f"{vectors}: found no vectors, expected some")
    for name in names:
        known = {path.name for path in (out / name).glob("*")}
        if names.count(name) > 1 or (known and BEGUN not in known):
            raise ConfigurationError(
                f"{out / name}: found {'it twice' if not known else 'other files'}, expected a folder "
                "for one set of code books; write elsewhere"
            )
    for path in books:
        width = load_code_books(path).levels[0].shape[1]
        if path.resolve() == (out / path.name).resolve():
            raise ConfigurationError(
                f"{path}: found code books where their codes of {vectors} would lie, expected another "
                "place; give another --out"
            )
        if width != folder.dimension:
            raise ConfigurationError(
                f"{path}: found code books of {width} dimensions, expected {folder.dimension} as in "
                f"{vectors}; embed with the model that they were made with"
            )
    return folder


def _mixed(keys: Integers) -> Integers:
    """Return hashes of keys (splitmix64's finaliser)."""
    found = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (found ^ (found >> np.uint64(31))).astype(np.int64)
