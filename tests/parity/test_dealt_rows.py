"""Risk: rows that are dealt by length, or cut by a token budget, and items that are encoded once
for several rows, change the loss or the gradients of the full batch.

From shards to gradients in float64: 1, 2 and 4 ranks, each with its own collator, must have the
same loss and the same full gradients, whatever the number and sizes of the micro-batches; and a
resume in the middle sees the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sailplan.checkpoint.layout import local
from sailplan.config.compose import compose
from sailplan.config.schema import (
    AudioConfig,
    Config,
    ModelConfig,
    ParallelConfig,
    StageConfig,
    TransformerShape,
    VisionConfig,
)
from sailplan.data.datasets import open_datasets
from sailplan.data.loader import StepLoader
from sailplan.data.plan import Plan
from sailplan.data.record import StepBatch
from sailplan.data.testing import made_up_config, micro_batches_of, write_shards
from sailplan.embed.exchange import exchange_of
from sailplan.errors import BadDataError
from sailplan.model.build import build_encoder
from sailplan.model.testing import join_layout, rows_of
from sailplan.objective.registry import build_objectives
from sailplan.objective.temperature import Temperatures
from sailplan.runtime.config import Dtype
from sailplan.step.training_step import TrainingStep
from sailplan.train.trainer import check_shares
from sailplan_kernels.testing import run_ranks

EXACT = 1e-10
OBJECTIVES = {"infonce": 1.0, "seq2item": 1.0}
WEIGHTS = {"things": 1.0, "choices": 1.0, "histories": 1.0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("shards")
    write_shards(root)
    open_datasets(made_up_config(root))  # ranks that fork race for nothing
    return root


def configuration(shards: Path, budget: int, dealing: str, dtype: Dtype = "float64") -> Config:
    config = made_up_config(shards, global_batch=16, micro_batch=6)
    small = TransformerShape(layers=1, hidden=16, heads=2, feed_forward=32)
    config.model = ModelConfig(
        vocabulary=256,
        embedding=16,
        prefixes=[8, 16],
        tower=small,
        vision=VisionConfig(stem_width=8, latents=2, encoder=small, perceiver=small),
        audio=AudioConfig(encoder=small, stem_width=8, mel_bins=16, output=16),
    )
    config.parallel = ParallelConfig(dtype=dtype)
    config.step.token_budget, config.step.dealing = budget, dealing
    config.objectives = {
        name: {"_target_": compose([]).objectives[name]["_target_"]} for name in OBJECTIVES
    }
    return config


def whole(batch: StepBatch) -> StepBatch:
    """The rows as they are."""
    return batch


def apart(batch: StepBatch) -> StepBatch:
    """The same rows, each encoded by itself."""
    views = {}
    for key, view in batch.views.items():
        rows = [
            rows_of(inputs, row, row + 1)
            for inputs in micro_batches_of(batch, key)
            for row in range(inputs.rows)
        ]
        views[key] = replace(
            view,
            micro_batches=[rows[place] for place in view.order.tolist()],
            order=torch.arange(len(view.order)),
            encoded_with=None,
        )
    return replace(batch, views=views)


def _steps(
    rank: int,
    world_size: int,
    shards: Path,
    budget: int,
    dealing: str,
    first: int,
    change: Callable[[StepBatch], StepBatch] = whole,
    dtype: Dtype = "float64",
) -> list[tuple[float, dict[str, torch.Tensor], str, int]]:
    parallel = join_layout(1)
    config = configuration(shards, budget, dealing, dtype)
    encoder = build_encoder(config.model, config.parallel, parallel, config.seed)
    wide = torch.float64 if dtype == "float64" else torch.float32
    narrow = ParallelConfig(dtype="float32")  # the same weights, whatever computes
    drawn = build_encoder(config.model, narrow, parallel, config.seed)
    with torch.no_grad():
        for one, other in zip(encoder.parameters(), drawn.parameters(), strict=True):
            local(one).copy_(local(other))
    objectives = build_objectives(
        config.objectives,
        config.model.embedding,
        config.data.sets,
        allowed_targets=config.allowed_targets,
        seed=0,
    ).to(wide)
    temperatures = Temperatures(config.data.sets).to(wide)
    optimizer = torch.optim.SGD([*encoder.parameters(), *temperatures.parameters()], lr=0.0)
    step = TrainingStep(
        encoder, objectives, temperatures, optimizer, config, parallel, exchange_of(parallel)
    )
    stage, readers = StageConfig(steps=6, mixed_fraction=0.5), open_datasets(config, names=WEIGHTS)
    plan, found = Plan(config, "first", stage, WEIGHTS, readers), []
    ranks: dict[str, Any] = {
        "data_parallel_rank": parallel.data_parallel_rank,
        "data_parallel_size": parallel.data_parallel_size,
    }
    with StepLoader(plan, readers, config, stage, start_step=first, stop_step=4, **ranks) as loader:
        for number, read in enumerate(loader, start=first):
            batches = [change(batch) for batch in read]
            loss, *_ = step.gradients(batches, OBJECTIVES, step=number, stage="first")
            gradients = {
                name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
                for name, p in [*encoder.named_parameters(), *temperatures.named_parameters()]
                if p.grad is not None
            }
            optimizer.zero_grad(set_to_none=True)
            micro_batches = sum(
                len(view.micro_batches) for batch in batches for view in batch.views.values()
            )
            found.append(
                (float(loss), gradients, "+".join(batch.digest for batch in batches), micro_batches)
            )
    return found


@pytest.fixture(scope="module")
def alone(shards: Path) -> list[tuple[float, dict[str, torch.Tensor], str, int]]:
    return run_ranks(_steps, 1, shards, 0, "length", 0)[0]


@pytest.mark.parametrize(
    ("world_size", "budget", "dealing", "first"),
    [
        (1, 50, "length", 0),
        (2, 0, "length", 0),
        (4, 50, "length", 0),
        (4, 50, "length", 2),
        (4, 25, "lanes", 0),
        (5, 50, "length", 0),
        (7, 0, "lanes", 0),
    ],
)
def test_loss_and_gradients_are_the_full_batch_s(
    world_size: int, budget: int, dealing: str, first: int, shards: Path, alone: Any
) -> None:
    ranks = run_ranks(_steps, world_size, shards, budget, dealing, first)
    assert all(len(own) == 4 - first for own in ranks)
    for own in ranks:
        for (loss, gradients, digest, _), (expected, full, same, _) in zip(
            own, alone[first:], strict=True
        ):
            assert digest == same and loss == pytest.approx(expected, rel=EXACT, abs=EXACT)
            assert gradients.keys() == full.keys() and len(full) > 20
            for name, gradient in gradients.items():
                assert (gradient - full[name]).norm() <= EXACT * max(
                    1.0, float(full[name].norm())
                ), name
    assert [[step[3] for step in own] for own in ranks] == [
        [step[3] for step in ranks[0]]
    ] * world_size, "as many micro-batches on all ranks"


@pytest.mark.parametrize("world_size", [1, 2])
def test_items_encoded_once_have_the_gradients_of_all_rows_that_show_them(
    world_size: int, shards: Path, alone: Any
) -> None:
    ranks = run_ranks(_steps, world_size, shards, 0, "length", 0, apart)
    for number, (loss, gradients, _, calls) in enumerate(ranks[0]):
        expected, full, _, fewer = alone[number]
        assert calls * world_size > 3 * fewer
        assert loss == pytest.approx(expected, rel=EXACT, abs=EXACT)
        assert gradients.keys() == full.keys()
        for name, gradient in gradients.items():
            assert (gradient - full[name]).norm() <= EXACT * max(1.0, float(full[name].norm())), (
                name
            )


def test_in_bfloat16_they_are_no_further_off_than_of_rows_by_themselves(
    shards: Path, alone: Any
) -> None:
    """A shared item's gradient is the sum of its rows', rounded once where theirs are each."""
    shared = run_ranks(_steps, 1, shards, 0, "length", 0, whole, "bfloat16")[0]
    single = run_ranks(_steps, 1, shards, 0, "length", 0, apart, "bfloat16")[0]
    for (true_loss, exact, digest, _), one, rows in zip(alone, shared, single, strict=True):
        assert one[2] == rows[2] == digest and rows[3] > 3 * one[3]
        assert one[0] == pytest.approx(true_loss, rel=1e-2)
        assert one[1].keys() == exact.keys()
        assert {gradient.dtype for gradient in one[1].values()} == {torch.float32}
        found, by_rows = off(one[1], exact), off(rows[1], exact)
        assert 1e-4 < by_rows < 0.1, "bfloat16's own rounding"
        assert found <= 1.1 * by_rows, (found, by_rows)


def off(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Return the relative error of all gradients together."""
    error = sum((found[name].double() - each).square().sum() for name, each in exact.items())
    size = sum(each.square().sum() for each in exact.values())
    return float((error / size) ** 0.5)


def _disagreement(rank: int, world_size: int, shards: Path) -> str:
    parallel, config, stage = (
        join_layout(1),
        configuration(shards, 0, "length"),
        StageConfig(steps=6),
    )
    readers = open_datasets(config, names=["things"])
    plan = Plan(config, "first", stage, {"things": 1.0}, readers)
    ranks: dict[str, Any] = {
        "data_parallel_rank": parallel.data_parallel_rank,
        "data_parallel_size": parallel.data_parallel_size,
    }
    shares = StepLoader(plan, readers, config, stage, **ranks).collator.shares
    check_shares(parallel, shares, 0, "first")
    if rank:
        readers["things"].lengths = None
    try:
        check_shares(parallel, shares, 0, "first")
    except BadDataError as error:
        return str(error)
    return ""


def test_ranks_that_share_out_rows_in_different_ways_stop_before_a_step(shards: Path) -> None:
    assert all("step 1 in different ways" in told for told in run_ranks(_disagreement, 2, shards))
