"""Risks: a start that asks a store for each of 10^5 shards, or opens files for them; a step that asks
for more than its own rows.

A server on loopback has one shard under 10^5 names, and beside them the index that `sailplan data
index` would have written of all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from sailplan.data.datasets import open_datasets
from sailplan.data.loader import StepLoader
from sailplan.data.plan import Plan
from sailplan.data.stream.client import open_streams
from sailplan.data.testing import (
    repeat_manifest,
)

sys.path.insert(0, str(Path(__file__).parent))
from remote_sets import BATCH, config_of, write_many
from servers import WebServer

RECORDS = 64
INDEX_FILES = 4  # of records and of lengths: a manifest and a file of tables each
COMPARED = 8  # shards of a set that are looked at when it is opened
_opened: list[str] = []
sys.addaudithook(
    lambda event, arguments: _opened.append(str(arguments[0])) if event == "open" else None
)


class SameShard(Mapping[str, bytes]):
    """One shard under many names, and the files of its index."""

    def __init__(self, shard: bytes, index: dict[str, bytes]) -> None:
        self.shard, self.index = shard, index

    def __getitem__(self, name: str) -> bytes:
        return self.shard if name.endswith(".tar") else self.index[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


def served(root: Path, shards: int) -> SameShard:
    """The files of a set of so many shards, all of them the same."""
    folder = root / f"set{shards}"
    write_many(root, folder.name, RECORDS, RECORDS)
    open_datasets(config_of(root, str(folder), root / "none"))
    for file in (folder / ".index").glob("*.manifest"):
        repeat_manifest(file, [f"part-{number:06d}.tar" for number in range(shards)])
    index = {f".index/{file.name}": file.read_bytes() for file in (folder / ".index").iterdir()}
    return SameShard((folder / "part-000.tar").read_bytes(), index)


def costs(root: Path, shards: int) -> dict[str, int]:
    """Requests, bytes and opened files of a start and of its first step."""
    files, cache = served(root, shards), root / f"cache{shards}"
    server = WebServer(files)
    with server.running():
        pattern = f"{server.url}/part-{{000000..{shards - 1:06d}}}.tar"
        config = config_of(root, pattern, cache, ahead=0)
        _opened.clear()
        readers = open_datasets(config)
        opened = [name for name in _opened if name.startswith(str(cache))]
        assert len(readers["many"]) == shards * RECORDS
        start = server.counts.copy()
        stage = config.stages["only"]
        plan = Plan(config, "only", stage, {"many": 1.0}, readers)
        with StepLoader(plan, readers, config, stage, stop_step=1) as loader:
            ((batch,),) = loader
        open_streams(cache, config.data.stream).close()
    assert len(batch.record_ids) == BATCH and not batch.quarantined
    step = server.counts - start
    index = sum(map(len, files.index.values()))
    return {
        "requests": start["GET"] + start["HEAD"],
        "bytes beside the index": start["bytes"] - index,
        "files": len(opened),
        "requests of a step": step["GET"] + step["HEAD"],
        "bytes of a step": step["bytes"],
        "shard": len(files.shard),
    }


def test_a_start_at_100_000_shards_asks_for_no_more_than_at_1_000(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, many = (costs(tmp_path / str(shards), shards) for shards in (1_000, 100_000))
    with capsys.disabled():
        print(f"\n1,000 shards: {few}\n100,000 shards: {many}")
    # A manifest and a file of tables, of records and of lengths, and what some shards are compared
    # by; what is asked for at a time is asked for once or twice, as it happens
    assert many["requests"] <= few["requests"] + 4 <= 2 * INDEX_FILES + 4 * COMPARED
    # The 32 headers of each shard that is compared are read from the cache, one by one
    assert many["files"] <= few["files"] + 32 <= 64 * COMPARED
    assert many["bytes beside the index"] <= COMPARED * few["shard"]
    # A shard that was not open: its state, its headers; then the segment of each row, if no other
    # row has it, and its tables
    assert many["requests of a step"] <= 6 * BATCH
    assert many["bytes of a step"] <= 2 * BATCH * many["shard"]
