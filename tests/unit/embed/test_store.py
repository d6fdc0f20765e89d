"""The embedding store: each row is encoded once and by one rank, what was cut short is gone on
with at any number of ranks, and workers change nothing.
"""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sailplan.config.schema import Config
from sailplan.curriculum.testing import write_pack
from sailplan.data.datasets import open_datasets
from sailplan.embed.context import RunContext
from sailplan.embed.embedder import Embedder
from sailplan.embed.fingerprint import fingerprint
from sailplan.embed.selection import MarkedPositions, SplitPositions, digest_of
from sailplan.embed.shards import Shards
from sailplan.model.build import build_encoder
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import RankFailure, run_ranks


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    found = write_pack(tmp_path_factory.mktemp("pack"))
    found.parallel.dtype, found.store.shard_rows = "float64", 4
    return found


def context(config: Config, folder: Path, seed: int = 0) -> RunContext:
    parallel = join_layout(1)
    encoder = build_encoder(config.model, config.parallel, parallel, seed=seed)
    return RunContext(config, parallel, encoder, {}, open_datasets(config), folder)


def written(limit: int | None = None) -> list[int]:
    """Rows of each shard that this process writes; it dies before number `limit`."""
    write = Shards.write
    found: list[int] = []

    def noted(self: Shards, shard: int, rows: Any, vectors: Any) -> None:
        if len(found) == limit:
            os._exit(9)
        found.append(len(rows))
        write(self, shard, rows, vectors)

    Shards.write = noted  # type: ignore[method-assign]
    return found


def vectors(config: Config, folder: Path, limit: int | None = None) -> tuple[list[int], Any]:
    found = written(limit)
    run = context(config, folder)
    reader = run.readers["things"]
    embedder = Embedder(run)
    few = embedder.rows(reader, "item", np.arange(3, 48, 7))
    every = embedder.table(reader, "item", SplitPositions(reader, None))
    assert torch.equal(every.take(np.arange(3, 48, 7)).fused, few.fused)
    return found, every.read(0, len(every)).fused


def test_each_row_is_encoded_once_by_one_rank(config: Config, tmp_path: Path) -> None:
    ((own, alone),) = run_ranks(lambda rank, world: vectors(config, tmp_path / "one"), 1)
    assert sum(own) == 48
    three = run_ranks(lambda rank, world: vectors(config, tmp_path / "three"), 3)
    assert sum(sum(rows) for rows, _ in three) == 48
    assert max(sum(rows) for rows, _ in three) <= 24
    for _, found in three:
        assert torch.allclose(found, alone, atol=1e-6)
    workers = replace(config, data=replace(config.data, workers=2))

    def forking(rank: int, world: int) -> tuple[list[int], Any]:
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        return vectors(workers, tmp_path / "workers")

    ((_, found),) = run_ranks(forking, 1)
    assert torch.equal(found, alone)


def test_what_a_kill_cut_short_is_gone_on_with_by_other_ranks(
    config: Config, tmp_path: Path
) -> None:
    with pytest.raises(RankFailure):
        run_ranks(lambda rank, world: vectors(config, tmp_path, 4), 2)
    before = len(list(tmp_path.rglob("*.rows.npy")))
    assert 4 <= before <= 8
    ((again, found),) = run_ranks(lambda rank, world: vectors(config, tmp_path), 1)
    ((every, straight),) = run_ranks(lambda rank, world: vectors(config, tmp_path / "x"), 1)
    assert len(again) < len(every) and sum(again) <= 48 - 4 * (before - 2)
    assert torch.allclose(found, straight, atol=1e-6)


def test_vectors_belong_to_their_model(config: Config, tmp_path: Path) -> None:
    def names(rank: int, world: int) -> list[str]:
        first = context(config, tmp_path)
        other = context(config, tmp_path, seed=1)
        again = context(config, tmp_path)
        return [fingerprint(run.encoder, run.config, run.parallel) for run in (first, other, again)]

    alone = run_ranks(names, 1)[0]
    assert alone[0] == alone[2] != alone[1]
    assert run_ranks(names, 2) == [alone, alone]  # sharded weights have the whole ones' digits


def test_a_part_of_the_memory_is_asked_for(config: Config, tmp_path: Path) -> None:
    """A read takes rows of the shards that it needs, and no more."""

    def run(rank: int, world: int) -> list[int]:
        embedder = Embedder(context(config, tmp_path))
        reader = embedder.context.readers["choices"]
        table = embedder.table(reader, "item", SplitPositions(reader, "train"))
        take, taken = Shards.take, []

        def noted(self: Shards, shard: int, name: str, places: Any) -> Any:
            found = take(self, shard, name, places)
            if name == "fused":
                taken.append(len(found))
            return found

        Shards.take = noted  # type: ignore[method-assign]
        rows = table.read(8, 12)
        assert (
            len(rows) == 4 and rows.positions.tolist() == reader.positions("train")[8:12].tolist()
        )
        return taken

    for taken in run_ranks(run, 2):
        assert sum(taken) <= 4


def test_selections_equal_arrays() -> None:
    marks = np.random.default_rng(0).random(200_003) < 0.3
    wanted = np.flatnonzero(marks)
    found = MarkedPositions(np.packbits(marks))
    assert len(found) == len(wanted)
    assert np.array_equal(found[1000:5000], wanted[1000:5000])
    some = np.array([5, 3, len(wanted) - 1, 40_000])
    assert np.array_equal(found[some], wanted[some])
    assert digest_of(wanted) == digest_of(wanted.copy()) != digest_of(wanted[1:])
