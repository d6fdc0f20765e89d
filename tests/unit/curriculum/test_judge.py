"""Balancing with another model's weights: the weights that a run of that model would get."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sailplan.checkpoint.store import folder_of, save
from sailplan.config.schema import BalanceConfig, Config, StageConfig
from sailplan.curriculum.stages import prepare_stage
from sailplan.curriculum.testing import write_pack
from sailplan.data.datasets import open_datasets
from sailplan.embed.context import RunContext
from sailplan.errors import ConfigurationError
from sailplan.model.build import build_encoder
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import run_ranks

BALANCE = BalanceConfig(sample=30, clusters=4, bootstrap=3)


def staged(config: Config, balance: BalanceConfig) -> Config:
    stage = StageConfig(data={"things": 1.0, "choices": 3.0}, balance=balance)
    return replace(config, stages={"balanced": stage}, order=["balanced"])


def test_a_checkpoint_embeds_the_samples(tmp_path: Path) -> None:
    config = write_pack(tmp_path / "pack")

    def prepared(rank: int, ranks: int, seed: int, given: str | None) -> dict[str, Any]:
        parallel = join_layout(1)
        chosen = staged(config, replace(BALANCE, initialise_from=given))
        encoder = build_encoder(config.model, config.parallel, parallel, seed=seed)
        context = RunContext(chosen, parallel, encoder, {}, open_datasets(config))
        folder = tmp_path / f"{seed}-{given is not None}-{ranks}"
        found = prepare_stage(context, "balanced", folder).stats
        assert not list(folder.glob("*vectors*"))
        return found

    def write(rank: int, ranks: int) -> None:
        parallel = join_layout(1)
        encoder = build_encoder(config.model, config.parallel, parallel, seed=7)
        checkpoint = folder_of(tmp_path / "run" / "checkpoints", 4)
        whole = nn.ModuleDict({"encoder": encoder})
        save(checkpoint, model=whole, optimizer=None, extra={"step": 4}, parallel=parallel)

    run_ranks(write, 1)
    given = str(tmp_path / "run")
    own, other = (run_ranks(prepared, 1, seed, None)[0] for seed in (0, 7))
    for ranks in (1, 2):
        found = run_ranks(prepared, ranks, 0, given)[0]
        for name, row in other["balance"].items():
            assert found["balance"][name] == pytest.approx(row, abs=1e-6)
        assert found["balance"]["things"]["mean"] != pytest.approx(
            own["balance"]["things"]["mean"], abs=1e-4
        )
        assert found["balance_model"] == given
    assert own["balance_model"] == "the run's own"

    def refused(rank: int, ranks: int) -> str:
        try:
            prepared(rank, ranks, 0, str(tmp_path / "nowhere"))
        except ConfigurationError as error:
            return str(error)
        return ""

    for text in run_ranks(refused, 2):
        assert text.startswith("balance.initialise_from=") and "expected a run folder" in text
