"""What `plan` says that a stage's start will embed bounds what it then embeds, closely."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sailplan.config.schema import Config, HardNegativeConfig, StageConfig, SubsetConfig
from sailplan.curriculum.config import BalanceConfig
from sailplan.curriculum.costs import StageCost, stage_cost
from sailplan.curriculum.stages import prepare_stage
from sailplan.curriculum.testing import write_pack
from sailplan.data.datasets import open_datasets
from sailplan.data.processor import processor_of
from sailplan.embed.context import RunContext
from sailplan.embed.shards import Shards
from sailplan.model.build import build_encoder
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import run_ranks

STAGES = {
    "balance": StageConfig(
        data={"things": 1.0, "choices": 1.0}, balance=BalanceConfig(sample=12, bootstrap=2)
    ),
    "subset": StageConfig(data={"things": 1.0}, subset=SubsetConfig(nearest=0.5, drop_noisy=0.25)),
    "interests": StageConfig(data={"sequences": 1.0}, artifacts=["interests"]),
    "mining": StageConfig(
        steps=100, data={"things": 1.0, "choices": 1.0}, hard_negatives=HardNegativeConfig()
    ),
    "given": StageConfig(
        data={"things": 1.0}, hard_negatives=HardNegativeConfig(from_folder="somewhere")
    ),
    "again": StageConfig(
        steps=100, data={"things": 1.0}, hard_negatives=HardNegativeConfig(refresh_steps=30)
    ),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return write_pack(tmp_path_factory.mktemp("pack"))


def cost(config: Config, name: str) -> StageCost:
    return stage_cost(config, STAGES[name], open_datasets(config), 1000, processor_of(config))


def prepared(rank: int, ranks: int, config: Config, name: str, folder: Path) -> tuple[int, int]:
    rows, size = [0], [0]
    write = Shards.write

    def counted(self, shard, found, vectors):  # type: ignore[no-untyped-def]
        rows[0] += len(found)
        size[0] += sum(part.nbytes for part in vectors.values())
        write(self, shard, found, vectors)

    Shards.write = counted  # type: ignore[method-assign]
    parallel = join_layout(1)
    encoder = build_encoder(config.model, config.parallel, parallel, seed=0)
    readers = open_datasets(config)
    prepare_stage(RunContext(config, parallel, encoder, {}, readers), name, folder)
    return rows[0], size[0]


@pytest.mark.parametrize("name", ["balance", "subset", "mining", "interests"])
def test_it_bounds_what_is_embedded(config: Config, tmp_path: Path, name: str) -> None:
    config = replace(config, stages={name: STAGES[name]}, order=[name])
    expected = cost(config, name)
    rows, size = run_ranks(prepared, 1, config, name, tmp_path, timeout=120)[0]
    assert 0.7 * expected["rows"] <= rows <= expected["rows"], (rows, expected)
    assert size >= 0.7 * expected["vector_bytes"]


def test_refreshes_and_given_negatives(config: Config) -> None:
    again, given = cost(config, "again"), cost(config, "given")
    assert again["refreshes"] == 3 and again["refresh_rows"] == again["rows"] > 0
    assert again["search_flop"] > 0 and again["encoder_flop"] >= 2000.0 * again["rows"]
    assert given["rows"] == given["search_flop"] == 0
