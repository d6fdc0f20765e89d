"""Semantic IDs: the same codes at any number of ranks, as good as scikit-learn's k-means, new items
by stored code books, statistics as counted in one process, and a stop that is gone on from.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from sailplan.cli.main import main
from sailplan.config.fields import JsonObject
from sailplan.embed import residual_k_means
from sailplan.errors import ConfigurationError, StopRequested
from sailplan.export import semantic_ids as product
from sailplan.export.semantic_ids import load_code_books, parse_sizes, semantic_ids
from sailplan.export.vector_folder import MANIFEST, embeddings_file, ids_file, labels_file
from sailplan.model.testing import join_layout
from sailplan.runtime import tally as tallies
from sailplan.runtime.tally import tally
from sailplan_kernels.testing import run_ranks

DIMENSION = 16


def write_vectors(folder: Path, rows: int, shard: int, seed: int = 0) -> NDArray[np.float32]:
    """Write a folder as `embed` does: groups of vectors, whose number is the label of most rows."""
    random = np.random.default_rng(seed)
    groups = np.random.default_rng(0).standard_normal((40, DIMENSION))
    labels = random.integers(0, 40, rows)
    found = groups[labels] + 0.4 * random.standard_normal((rows, DIMENSION))
    vectors = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    folder.mkdir(parents=True)
    starts = range(0, rows, shard)
    for number, start in enumerate(starts):
        part = range(start, min(rows, start + shard))
        np.save(folder / embeddings_file(number), vectors[part.start : part.stop])
        (folder / ids_file(number)).write_text("".join(f"set/{row}\n" for row in part))
        names = ["" if row % 7 == 0 else f"group {labels[row]}" for row in part]
        (folder / labels_file(number)).write_text("".join(f"{name}\n" for name in names))
    shards = [{"rows": min(shard, rows - start)} for start in starts]
    about = {"dimensions": DIMENSION, "rows": rows, "label": "group", "shards": shards}
    (folder / MANIFEST).write_text(json.dumps(about))
    return vectors


def codes_in(folder: Path) -> tuple[list[str], NDArray[np.int64]]:
    tables = [parquet.read_table(path) for path in sorted(folder.glob("part-*.parquet"))]
    ids = [name for table in tables for name in table["id"].to_pylist()]
    return ids, np.array([row for table in tables for row in table["codes"].to_pylist()])


def make(rank: int, ranks: int, vectors: Path, out: Path, batch: int) -> JsonObject:
    residual_k_means.BATCH = batch
    residual_k_means.STEPS = 30
    tallies.BUCKET_ROWS = 512  # several buckets
    return semantic_ids(join_layout(1), vectors, out, sizes=[[32, 16, 8], [8, 8]])


@pytest.mark.parametrize("batch", [1024, 1 << 14])  # mini-batches; all rows in each
def test_any_number_of_ranks_makes_the_same_bytes(tmp_path: Path, batch: int) -> None:
    write_vectors(tmp_path / "vectors", 2500, 450)
    told = {
        ranks: run_ranks(make, ranks, tmp_path / "vectors", tmp_path / f"at-{ranks}", batch)
        for ranks in (1, 2, 3)
    }
    assert all(each == told[1][0] for found in told.values() for each in found)
    for path in sorted((tmp_path / "at-1").rglob("*")):
        for ranks in (2, 3):
            other = tmp_path / f"at-{ranks}" / path.relative_to(tmp_path / "at-1")
            assert (
                path.is_dir()
                or path.name == "begun.json"
                or (other.read_bytes() == path.read_bytes())
            ), path
    assert set(told[1][0]) == {"32-16-8", "8-8"}


def test_the_books_are_as_good_as_k_means_of_all_rows_and_rebuild_the_vectors(
    tmp_path: Path,
) -> None:
    vectors = write_vectors(tmp_path / "vectors", 5000, 900)
    left, best = vectors.astype(np.float64), []
    for size in (32, 16, 8):
        fitted = KMeans(size, n_init=1, random_state=0).fit(left)
        left = left - fitted.cluster_centers_[fitted.labels_]
        best.append(float(np.square(left).sum(1).mean()))
    for batch, near in ((1024, 1.1), (1 << 14, 1.03)):
        found = run_ranks(make, 1, tmp_path / "vectors", tmp_path / str(batch), batch)[0]["32-16-8"]
        pairs = zip(found["errors"], best, strict=True)
        assert all(one < near * other for one, other in pairs), (batch, found["errors"], best)
    folder = tmp_path / str(1 << 14) / "32-16-8"
    ids, codes = codes_in(folder)
    books = load_code_books(folder)
    assert ids == [f"set/{row}" for row in range(5000)]
    rebuilt = np.square(vectors - books.decode(codes)).sum(1).mean()
    assert rebuilt == pytest.approx(found["errors"][-1], rel=1e-5)
    assert np.array_equal(books.encode(vectors), codes)


def test_statistics_are_those_of_one_process(tmp_path: Path) -> None:
    write_vectors(tmp_path / "vectors", 5000, 900)
    found = run_ranks(make, 2, tmp_path / "vectors", tmp_path / "out", 1024)[0]["8-8"]
    codes = codes_in(tmp_path / "out" / "8-8")[1]
    _, back, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    names = "".join(
        path.read_text() for path in sorted((tmp_path / "vectors").glob("labels-*"))
    ).splitlines()
    here = np.array([bool(name) for name in names])
    known = [name for name in names if name]
    wanted = [
        normalized_mutual_info_score(known, codes[here, 0]),
        normalized_mutual_info_score(known, back.ravel()[here]),
    ]
    assert found["nmi"] == pytest.approx(wanted, abs=1e-9) and 0.3 < found["nmi"][0] < 0.95
    assert found["collision_rate"] == pytest.approx((counts[back.ravel()] > 1).mean())
    assert (found["unique"], found["largest_bucket"]) == (len(counts), counts.max())
    assert found["used"] == [len(np.unique(column)) for column in codes.T]
    assert (found["labels"], found["labelled_rows"], found["rows"]) == (40, here.sum(), 5000)


def test_new_items_get_codes_of_stored_books(tmp_path: Path) -> None:
    write_vectors(tmp_path / "vectors", 3000, 900)
    new = write_vectors(tmp_path / "new", 700, 300, seed=1)
    run_ranks(make, 1, tmp_path / "vectors", tmp_path / "out", 1024)
    books = tmp_path / "out" / "32-16-8"

    def assign(rank: int, ranks: int, out: Path, sources: list[Path]) -> JsonObject:
        return semantic_ids(join_layout(1), tmp_path / "new", out, books=sources)

    found = run_ranks(assign, 2, tmp_path / "assigned", [books])[0]["32-16-8"]
    ids, codes = codes_in(tmp_path / "assigned" / "32-16-8")
    assert len(ids) == found["rows"] == 700
    assert np.array_equal(codes, load_code_books(books).encode(new))
    # Nothing of the books is lost where they and their codes would lie in one place
    with pytest.raises(Exception, match="another --out"):
        run_ranks(assign, 1, tmp_path / "out", [books])
    assert len(load_code_books(books).levels) == 3


def test_equal_vectors_share_their_codes_and_books_are_cut(tmp_path: Path) -> None:
    vectors = write_vectors(tmp_path / "vectors", 3, 900)
    vectors[1] = vectors[0]
    np.save(tmp_path / "vectors" / embeddings_file(0), vectors)

    def make_small(rank: int, ranks: int) -> JsonObject:
        return semantic_ids(join_layout(1), tmp_path / "vectors", tmp_path / "out", sizes=[[4, 4]])

    found = run_ranks(make_small, 2)[0]["4-4"]
    codes = codes_in(tmp_path / "out" / "4-4")[1]
    assert codes[0].tolist() == codes[1].tolist() != codes[2].tolist()
    assert found["errors"][-1] < 1e-12 and found["sizes"] == [2, 1]
    assert found["collision_rate"] == pytest.approx(2 / 3) and found["largest_bucket"] == 2


def test_a_stopped_call_goes_on_with_the_levels_and_parts_that_are_there(tmp_path: Path) -> None:
    write_vectors(tmp_path / "vectors", 3000, 400)

    def stopped(rank: int, ranks: int, out: Path, stop_at: str) -> list[int]:
        fitted: list[int] = []
        fit, write = product.fit_level, product._Maker.write

        def counting(parallel, blocks, books, *rest):  # type: ignore[no-untyped-def]
            if stop_at == f"level {len(books)}":
                raise StopRequested("stopped")
            fitted.append(len(books))
            return fit(parallel, blocks, books, *rest)

        def writing(self, shard, *rest):  # type: ignore[no-untyped-def]
            if stop_at == f"part {shard}":
                raise StopRequested("stopped")
            write(self, shard, *rest)

        product.fit_level, product._Maker.write = counting, writing
        try:
            semantic_ids(join_layout(1), tmp_path / "vectors", out, sizes=[[8, 8, 8]])
        except StopRequested:
            assert stop_at
        return fitted

    assert run_ranks(stopped, 2, tmp_path / "out", "level 2") == [[0, 1]] * 2
    assert run_ranks(stopped, 3, tmp_path / "out", "part 5") == [[2]] * 3
    folder = tmp_path / "out" / "8-8-8"
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    assert 3 <= len(written) < 8 and not (folder / "semantic_ids.json").exists()
    assert run_ranks(stopped, 1, tmp_path / "out", "") == [[]]
    assert all((folder / name).stat().st_mtime_ns == when for name, when in written.items())
    assert run_ranks(stopped, 1, tmp_path / "whole", "") == [[0, 1, 2]]
    for path in (tmp_path / "whole" / "8-8-8").glob("[cps]*"):
        assert (folder / path.name).read_bytes() == path.read_bytes(), path


def test_a_tally_is_that_of_one_process_and_a_key_of_all_rows_is_a_row_a_part(
    tmp_path: Path,
) -> None:
    random = np.random.default_rng(0)
    keys = np.where(random.random(40_000) < 0.5, 7, random.integers(-(2**63), 2**63, 40_000))
    keys[:9000] = random.integers(0, 50, 9000)
    sizes: list[int] = []

    def count(rank: int, ranks: int) -> tuple[tallies.Tally, list[int]]:
        read, add = tallies.Spill.read, tallies.Spill.add

        def counting(self, found, rows):  # type: ignore[no-untyped-def]
            sizes.append(int((found == 7).sum()))
            add(self, found, rows)

        tallies.Spill.add, tallies.BUCKET_ROWS = counting, 5000
        assert read is tallies.Spill.read
        found = tally(
            join_layout(1), tmp_path / str(ranks), 10, 40_000, lambda part: keys[part::10]
        )
        return found, sizes

    _, counts = np.unique(keys, return_counts=True)
    alone, two = run_ranks(count, 1)[0], run_ranks(count, 2)[0]
    assert alone[0] == two[0] and alone[1] == [1] * 10
    assert alone[0].distinct == len(counts) and alone[0].largest == counts.max()
    assert alone[0].shared == counts[counts > 1].sum() and alone[0].rows == 40_000
    shares = counts / 40_000
    assert alone[0].entropy == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12)
    assert not list(tmp_path.iterdir())


def test_bad_sizes_are_refused(tmp_path: Path) -> None:
    for given in ("3,x", "", "0,4", "4,,4"):
        with pytest.raises(ConfigurationError, match="64,64,64"):
            parse_sizes("--sizes", [given])
    with pytest.raises(ConfigurationError, match="twice"):
        parse_sizes("--sizes", ["4,4", "4,4"])
    assert math.prod(parse_sizes("--sizes", ["64,32"])[0]) == 2048


def test_what_is_no_folder_of_vectors_is_refused(tmp_path: Path) -> None:
    def refused(rank: int, ranks: int) -> str:
        try:
            semantic_ids(join_layout(1), tmp_path, tmp_path / "out", sizes=[[4]])
        except ConfigurationError as error:
            return str(error)
        return ""

    assert all("sailplan embed" in text for text in run_ranks(refused, 2))


def test_the_command_fits_and_assigns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_vectors(tmp_path / "vectors", 600, 400)
    vectors, out = str(tmp_path / "vectors"), str(tmp_path / "codes")
    line = ["semantic-ids", "--vectors", vectors, "--sizes", "8,8", "--sizes", "4"]
    assert main([*line, "--out", out]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["8-8"]["rows"] == 600 and set(told) == {"8-8", "4"}
    books = ["--code-books", str(tmp_path / "codes" / "8-8")]
    assert main(["semantic-ids", "--vectors", vectors, *books]) == 0
    assert json.loads(capsys.readouterr().out)["8-8"] == told["8-8"]
    ids, codes = codes_in(tmp_path / "vectors" / "semantic_ids" / "8-8")
    assert len(ids) == 600 and np.array_equal(codes, codes_in(tmp_path / "codes" / "8-8")[1])
    assert main(["semantic-ids", "--vectors", vectors]) == 64
    assert "--sizes 64,64,64" in capsys.readouterr().err
