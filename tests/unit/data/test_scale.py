"""Risks at a size that no test can write out: a step that reads tables of rows that are not this
rank's, an order that changes with the ranks or costs more with more shards. 10^5 shards of 10^4
records, all of them one
small file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import process_time

import pytest

from sailplan.config.schema import Config, StageConfig
from sailplan.data import plan as plan_module
from sailplan.data.collate import Collator
from sailplan.data.index import ShardIndex
from sailplan.data.plan import Plan
from sailplan.data.reader import RecordReader
from sailplan.data.testing import json_member, repeated, write_set

SHARDS, RECORDS, BATCH, LANES = 100_000, 10_000, 8_192, 1_024


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bodies = [
        {
            "id": f"t/{n}",
            "split": "held_out" if n % 100 == 7 else "train",
            "fields": {"title": f"red {n % 9}"},
        }
        for n in range(RECORDS)
    ]
    folder = write_set(
        tmp_path_factory.mktemp("scale"),
        [[json_member(f"{n}", body)] for n, body in enumerate(bodies)],
        RECORDS,
    )
    return folder / "part-000.tar"


def test_a_rank_reads_the_tables_of_its_own_rows_only(
    make_config: Callable[..., Config], shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "STREAMS", LANES)
    config = make_config(global_batch=BATCH, segment=64, window=512)
    config.step.dealing, config.step.token_budget = "lanes", 0
    config.data.sets = {"things": config.data.sets["things"]}
    stage = StageConfig(steps=100, patterns={"things": ["image_title"]})
    digests, rows = {}, BATCH // 64
    for size in (1, 2, 4, 64):
        reader = RecordReader(
            "things", config.data.sets["things"], repeated(ShardIndex([shard]), SHARDS)
        )
        plan = Plan(config, "first", stage, {"things": 1.0}, {"things": reader})
        digests[size] = [plan.digest(step) for step in (0, 1, 99)]
        assert reader.index.loaded == 0, "an order is numbers alone"
        began = process_time()
        for step in range(2, 12):
            plan.digest(step)
        print(f"{size} ranks: {(process_time() - began) * 100:.1f} ms CPU a digest")
    assert digests[1] == digests[2] == digests[4] == digests[64] and len(set(digests[1])) == 3
    (batch,) = Collator(config, stage, plan, {"things": reader}, 3, 64).batches(0)
    assert len(batch.record_ids) == rows and not batch.quarantined and batch.digest == digests[1][0]
    assert 0 < reader.index.loaded <= rows
