"""Risks: ranks of one machine fetch the same bytes once each; what one of them pushes out of the
cache is missing, or other bytes, for another.

Two processes train their halves of each step from one cache, filled from a server on loopback.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from sailplan.config.schema import Config
from sailplan.data.datasets import open_datasets
from sailplan.data.loader import StepLoader
from sailplan.data.plan import Plan
from sailplan.data.stream.client import open_streams

sys.path.insert(0, str(Path(__file__).parent))
from remote_sets import BATCH, SEGMENT, config_of, write_many
from servers import WebServer, files_of

SHARDS, RECORDS, STEPS = 10, 160, 50  # half an epoch
Rows = dict[str, str]  # record id -> hash of what the record holds


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_many(root, "many", SHARDS * RECORDS, RECORDS)
    return root


def rows_of(config: Config, rank: int, size: int) -> list[Rows]:
    """What a rank reads in each step."""
    readers = open_datasets(config)
    stage = config.stages["only"]
    plan = Plan(config, "only", stage, {"many": 1.0}, readers)
    result = []
    with StepLoader(
        plan, readers, config, stage, data_parallel_rank=rank, data_parallel_size=size
    ) as loader:
        for (batch,) in loader:
            assert not batch.quarantined
            found = {}
            for name, position in zip(batch.record_ids, batch.positions, strict=True):
                item = readers["many"].read(position).item
                assert item is not None
                found[name] = hashlib.sha256(repr((item.fields, item.images)).encode()).hexdigest()
            result.append(found)
    return result


def _rank(config: Config, rank: int, connection: Connection) -> None:
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    connection.send(rows_of(config, rank, 2))
    open_streams(Path(config.data.cache or ""), config.data.stream).close()


def two_ranks(config: Config) -> list[Rows]:
    """What two processes read together in each step."""
    context, running = multiprocessing.get_context("fork"), []
    for rank in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(config, rank, theirs))
        process.start()
        theirs.close()
        running.append((process, ours))
    halves = [connection.recv() for _, connection in running]
    for process, _ in running:
        process.join()
        assert process.exitcode == 0
    assert all(len(a) == len(b) == BATCH // 2 for a, b in zip(*halves, strict=True))
    return [a | b for a, b in zip(*halves, strict=True)]


def shard_requests(server: WebServer) -> Counter[tuple[str, str]]:
    return Counter({key: count for key, count in server.asked.items() if key[0].endswith(".tar")})


@pytest.mark.parametrize("room", [1.0, 0.25])
def test_two_ranks_of_a_machine_share_what_is_fetched(
    root: Path, tmp_path: Path, room: float, capsys: pytest.CaptureFixture[str]
) -> None:
    files = files_of(root / "many")
    whole = sum(map(len, files.values()))
    expected = rows_of(config_of(root, str(root / "many"), tmp_path / "local", steps=STEPS), 0, 1)
    server = WebServer(files, pause=0.001)
    with server.running():
        pattern = f"{server.url}/part-{{000..{SHARDS - 1:03d}}}.tar"
        config = config_of(
            root, pattern, tmp_path / "far", steps=STEPS, cache_bytes=int(room * whole) + 65536
        )
        open_datasets(config)  # the index is made, once
        open_streams(tmp_path / "far", config.data.stream).close()
        config.data.stream.folder = str(tmp_path / "cache")  # which has nothing
        server.asked.clear()
        assert two_ranks(config) == expected
    asked = shard_requests(server)
    with capsys.disabled():
        print(f"\n{asked.total()} requests for {len(asked)} ranges, room for {room:.0%}")
    runs = SHARDS * RECORDS // SEGMENT
    if room == 1:
        assert set(asked.values()) == {1}, "a range was fetched by both ranks"
        assert asked.total() <= runs
    else:
        assert asked.total() <= 1.5 * runs
