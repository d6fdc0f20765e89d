"""Mining on the embedding store: the negatives of brute force at any number of ranks, ties and a
popular query included; a killed round changes nothing and is gone on with.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sailplan.config.schema import Config, HardNegativeConfig, StageConfig
from sailplan.curriculum import hard_negatives
from sailplan.curriculum.hard_negatives import PatternMiner
from sailplan.curriculum.mined_files import read_mined, write_mined
from sailplan.curriculum.rounds import CURRENT, Rounds
from sailplan.curriculum.stages import ROUNDS, prepare_stage, refresh_hard_negatives
from sailplan.curriculum.testing import write_pack
from sailplan.data.datasets import open_datasets
from sailplan.data.negatives import HardNegativeStore
from sailplan.embed import search
from sailplan.embed.context import RunContext
from sailplan.embed.rows import EmbeddedRows
from sailplan.embed.search import Excluded, KeyFiles, SearchStats, nearest
from sailplan.embed.shards import Shards
from sailplan.errors import SailplanError
from sailplan.model.build import build_encoder
from sailplan.model.testing import join_layout
from sailplan.runtime.arrays import SharedArray
from sailplan_kernels.testing import RankFailure, run_ranks


def rows(vectors: torch.Tensor, ids: list[int], positions: list[int]) -> EmbeddedRows:
    return EmbeddedRows(vectors, torch.tensor(ids), np.array(positions), np.array(ids) >= 0)


class Records(SimpleNamespace):
    """What mining asks of a reader: a name, a length, and whether its pairs are graded."""

    def __len__(self) -> int:
        return 200


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return normalize(vectors.double(), dim=-1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_mined_negatives_equal_brute_force(world_size: int, ties: bool, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    n = 40
    items = torch.randn(25, 7, generator=random)
    if ties:
        items = items.sign()  # groups of items with equal cosines, which are odd sevenths
    own = torch.randint(0, 25, (n,), generator=random)
    query_ids = torch.where(
        torch.arange(n) < 4, 900, 1000 + torch.arange(n)
    )  # four queries with the same text
    vectors = items[own] + 0.7 * torch.randn(n, 7, generator=random)
    query_ids[7] = -1  # a record that lacks a side
    queries = rows(vectors.sign() if ties else vectors, query_ids.tolist(), list(range(100, 140)))
    targets = rows(items[own], own.tolist(), list(range(100, 100 + n)))
    hard = HardNegativeConfig(per_query=3, sample=n)

    def mined(rank: int, world: int) -> tuple[Any, Any, Any]:
        folder = tmp_path / f"{world}"
        arrays = [
            SharedArray(folder / "negatives.npy", (200, 3), "int64"),
            SharedArray(folder / "scores.npy", (200, 3), "float32"),
        ]
        reader: Any = Records(name="set", scored=False)
        miner = PatternMiner(
            join_layout(1),
            reader,
            "pattern",
            queries,
            targets,
            queries.positions,
            hard,
            folder / "work",
            arrays,
        )
        found = miner.run(0, [3, 7])
        return found.threshold, found.prefixes, np.load(arrays[0].path).tolist()

    alone = run_ranks(mined, 1)[0]
    for threshold, prefixes, table in run_ranks(mined, world_size):
        assert table == alone[2] and prefixes == alone[1] and list(prefixes) == ["3"]
        assert replace(threshold, value=0.0) == replace(alone[0], value=0.0)
        assert threshold.value == pytest.approx(alone[0].value, rel=2**-23)  # rounded once
        assert all(set(row) == {-1} for row in [*table[:100], *table[140:], table[107]])
        cosines = (unit(queries.fused) @ unit(items).T).float()
        first = [own.tolist().index(item) if item in own else -1 for item in range(25)]
        first = [
            row
            if row != 7
            else own.tolist().index(int(own[7]), 8)
            if int(own[7]) in own[8:].tolist()
            else -1
            for row in first
        ]
        for row in range(n):
            if row == 7:
                continue
            right = {int(own[other]) for other in range(n) if query_ids[other] == query_ids[row]}
            ranked = sorted(
                (
                    (-float(cosines[row, item]), first[item])
                    for item in range(25)
                    if first[item] >= 0
                    and item not in right
                    and float(cosines[row, item]) < threshold.value
                ),
            )
            found = [position - 100 for position in table[100 + row] if position >= 0]
            assert found == [place for _, place in ranked[:3]]


def key_files(folder: Path, vectors: np.ndarray, size: int) -> KeyFiles:
    files = []
    for start in range(0, len(vectors), size):
        files.append((folder / f"{start}.rows.npy", folder / f"{start}.vectors.npy"))
        np.save(files[-1][0], np.arange(start, min(start + size, len(vectors))) * 2)
        np.save(files[-1][1], vectors[start : start + size])
    return KeyFiles(files)


@pytest.mark.parametrize("equal", [False, True])
def test_search_is_exact_in_small_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equal: bool
) -> None:
    """Random vectors are proved at once; equal scores come to float64; rows of files are even."""
    monkeypatch.setattr(search, "KEYS", 16)
    monkeypatch.setattr(search, "ROWS", 8)
    monkeypatch.setattr(search, "MANY", 3)
    random = np.random.default_rng(0)
    keys = random.standard_normal((150, 8)).astype(np.float32)
    queries = torch.from_numpy(random.standard_normal((30, 8)).astype(np.float32))
    if equal:
        keys, queries = np.sign(keys), queries.sign()
    groups = random.integers(-1, 6, 30)
    pairs = [
        (g, 2 * int(k)) for g in range(6) for k in random.permutation(150)[: 1 if g < 3 else 60]
    ]
    pairs.sort(key=lambda pair: pair[1])
    excluded = Excluded(groups, *map(np.array, zip(*pairs, strict=True)))  # type: ignore[arg-type]
    stats = SearchStats()
    scores, found = nearest(
        queries, key_files(tmp_path, keys, 40), 5, max_score=0.5, excluded=excluded, stats=stats
    )
    cosines = (unit(queries) @ unit(torch.from_numpy(keys)).T).float().numpy()
    for query in range(30):
        left_out = {key for group, key in pairs if group == groups[query]}
        ranked = sorted(
            (-score, 2 * key)
            for key, score in enumerate(cosines[query].tolist())
            if score < np.float32(0.5) and 2 * key not in left_out
        )[:5]
        assert found[query].tolist() == [key for _, key in ranked]
        np.testing.assert_array_equal(scores[query].numpy(), [-score for score, _ in ranked])
    again = stats.again.get("torch.float64", 0)
    assert again > 15 if equal else again == 0


def test_a_popular_query_costs_little_more(tmp_path: Path) -> None:
    """3,000 of 6,000 records share one query text: 3,000 excluded keys for each of them."""
    random = np.random.default_rng(0)
    keys = random.standard_normal((6000, 64)).astype(np.float32)
    queries = torch.from_numpy(random.standard_normal((6000, 64)).astype(np.float32))
    files = key_files(tmp_path, keys, 6000)
    own = 2 * np.arange(6000)
    plain = Excluded(np.arange(6000), np.arange(6000), own)
    group = np.arange(6000) - np.arange(6000) % 2 * (np.arange(6000) - 1)  # odd ones: group 1
    popular = Excluded(group, group, own)

    def seconds(excluded: Excluded) -> float:
        before = time.process_time()
        for start in range(0, 6000, 2000):
            part = np.arange(start, start + 2000)
            nearest(queries[start : start + 2000], files, 4, excluded=excluded.take(part))
        return time.process_time() - before

    tries = [(seconds(plain), seconds(popular)) for _ in range(2)]
    assert min(many for _, many in tries) <= 1.3 * min(few for few, _ in tries) + 0.1


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    found = write_pack(tmp_path_factory.mktemp("pack"))
    found.parallel.dtype, found.store.shard_rows = "float64", 5
    found.stages = {
        "mined": StageConfig(
            data={"things": 1.0, "choices": 3.0},
            hard_negatives=HardNegativeConfig(per_query=3, sample=30),
        )
    }
    return found


def start(config: Config, seed: int = 0) -> RunContext:
    parallel = join_layout(1)
    encoder = build_encoder(config.model, config.parallel, parallel, seed=seed)
    return RunContext(config, parallel, encoder, {}, open_datasets(config))


def counted(log: Path, limit: int | None = None) -> None:
    """Note every shard that is written; kill the process before it writes number `limit`."""
    write, count = Shards.write, [0]

    def noted(self: Shards, shard: int, *arrays: Any) -> None:
        if count[0] == limit:
            os._exit(9)
        count[0] += 1
        write(self, shard, *arrays)
        with open(log, "a") as file:
            file.write(f"{self.folder}/{shard}\n")

    Shards.write = noted  # type: ignore[method-assign]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_round_leaves_the_last_in_force_and_is_gone_on_with(
    config: Config, tmp_path: Path, world_size: int
) -> None:
    folder, log = tmp_path / "mined", tmp_path / "log"

    def first(rank: int, world: int) -> dict[str, Any]:
        state = prepare_stage(start(config), "mined", folder)
        assert state.negatives is not None
        return {str(key): np.array(table) for key, table in state.negatives.positions.items()}

    before = run_ranks(first, world_size)[0]

    def refresh(rank: int, world: int, limit: int | None, where: Path, step: int) -> Any:
        counted(log, limit)
        context = start(config, seed=9)
        state = prepare_stage(start(config), "mined", where) if where != folder else None
        from sailplan.curriculum.stages import load_stage

        state = load_stage(config, context.readers, "mined", where, 0)
        found = refresh_hard_negatives(context, "mined", where, state, step)
        assert found.negatives is not None
        return {str(key): np.array(table) for key, table in found.negatives.positions.items()}

    with pytest.raises((RankFailure, SailplanError)):
        run_ranks(refresh, world_size, 3, folder, 40, timeout=60)
    killed = log.read_text().splitlines()
    assert (folder / ROUNDS / CURRENT).read_text() == "round-00000000"
    last = Rounds(folder / ROUNDS).last(40)
    assert last is not None
    for key, table in HardNegativeStore.load(last).positions.items():
        assert np.array_equal(table, before[str(key)])
    after = run_ranks(refresh, world_size, None, folder, 40)[0]
    every = log.read_text().splitlines()
    assert 1 <= len(killed) < len(every) and len(every) - len(set(every)) == 0
    assert (folder / ROUNDS / CURRENT).read_text() == "round-00000040"
    log.unlink()
    straight = run_ranks(refresh, world_size, None, tmp_path / "other", 40)[0]
    assert all(np.array_equal(after[key], table) for key, table in straight.items())
    assert not (folder / "vectors").exists()


def test_a_later_run_is_given_what_was_mined(config: Config, tmp_path: Path) -> None:
    folder, out = tmp_path / "mined", tmp_path / "files"
    patterns = {"things": ["image_to_name"], "choices": ["text_to_item"]}

    def run(rank: int, world: int) -> None:
        context = start(config)
        prepare_stage(context, "mined", folder)
        mined = Rounds(folder / ROUNDS).path(0)
        write_mined(context.parallel, context.readers, mined, out)
        rounds = Rounds(tmp_path / "given")
        about = read_mined(context.parallel, context.readers, patterns, 3, out, rounds)
        assert all(found["records_lacking"] == 0 for found in about.values())
        given, own = (HardNegativeStore.load(path) for path in (rounds.path(0), mined))
        assert given.thresholds == own.thresholds
        for key, table in own.positions.items():
            assert np.array_equal(given.positions[key], table) and (table >= 0).any()

    run_ranks(run, 2)
    assert json.loads((out / "round.json").read_text())["patterns"]


def test_rounds_that_checkpoints_go_on_from_stay(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path)
    for step in range(0, 100, 10):
        rounds.begin(step, "model")
        rounds.publish(step, "model", {})
    rounds.prune([35, 60])  # of a checkpoint after 35 steps of the stage, and one after 60
    left = sorted(path.name for path in tmp_path.glob("round-*"))
    assert left == [f"round-{step:08d}" for step in (30, 60, 80, 90)]
    assert rounds.last(35) == rounds.path(30) and rounds.last(60) == rounds.path(60)
    rounds.prune([-5])  # of a stage before this one
    assert len(list(tmp_path.glob("round-*"))) == 2 and rounds.last(25) is None


@pytest.mark.parametrize("world_size", [1, 2])
def test_candidates_are_read_twice_a_block_and_ranks_share_the_blocks(
    tmp_path: Path, world_size: int
) -> None:
    n, dimension, block = 3000, 16, 250
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(n, dimension, generator=random)
    noise = 0.5 * torch.randn(n, dimension, generator=random)
    queries = rows(vectors + noise, list(range(n, 2 * n)), list(range(n)))
    targets = rows(vectors, list(range(n)), list(range(n)))

    def mined(rank: int, world: int) -> tuple[int, dict[str, int]]:
        opened: list[KeyFiles] = []

        def kept(files: Any) -> KeyFiles:
            opened.append(KeyFiles(files))
            return opened[-1]

        module: Any = hard_negatives
        module.KeyFiles, module.BLOCK_ROWS = kept, block
        arrays = [
            SharedArray(tmp_path / f"{kind}.npy", (n, 3), dtype)
            for kind, dtype in (("negatives", "int64"), ("scores", "float32"))
        ]
        reader: Any = Records(name="set", scored=False)
        settings = HardNegativeConfig(per_query=3, sample=500)
        miner = PatternMiner(
            join_layout(1),
            reader,
            "pattern",
            queries,
            targets,
            queries.positions,
            settings,
            tmp_path / "work",
            arrays,
        )
        miner.run(0, [dimension])
        return opened[0].bytes, miner.stats.again

    found = run_ranks(mined, world_size)
    for read, again in found:
        assert set(again) == {"torch.float32"}  # nothing had to be searched again
        assert read == 2 * (n // (block * world_size)) * n * dimension * 4
