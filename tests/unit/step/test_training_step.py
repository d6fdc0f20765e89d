"""The step around the gradients: what is trained, what is skipped, what the optimizer's groups
hold.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sailplan.config.schema import OptimizerConfig
from sailplan.errors import ConfigurationError, SailplanError
from sailplan.model.parallelize import shard
from sailplan.model.testing import join_layout
from sailplan.parity.testing import build_modules, global_batches, share, step_config
from sailplan.step.gradient_cache import view_is_trainable
from sailplan.step.optimizer import build_optimizer, configure, set_learning_rate, set_trainable
from sailplan.step.training_step import TrainingStep
from sailplan_kernels.exchange import AllGather
from sailplan_kernels.testing import RankFailure, run_ranks

WEIGHTS = {"infonce": 1.0, "late_fusion": 0.5}


def _make(kept_graphs: int = 0, **options: Any) -> tuple[TrainingStep, list[Any]]:
    parallel = join_layout(1)
    config = step_config(kept_graphs=kept_graphs)
    encoder, objectives, temperatures = build_modules(config)
    encoder = shard(encoder, parallel, shard=True)
    optimizer = build_optimizer(
        encoder, objectives, temperatures, OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    )
    step = TrainingStep(
        encoder,
        objectives,
        temperatures,
        optimizer,
        config,
        parallel,
        AllGather(parallel.data_parallel_group),
        **options,
    )
    batches = [
        share(batch, parallel.data_parallel_rank, parallel.data_parallel_size, 2)
        for batch in global_batches(config, 1)
    ]
    return step, batches[:1]


def _whole(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in module.named_parameters()
    }


def _stages(rank: int, world_size: int) -> None:
    """Frozen parts stay bit-equal over steps, and learn again when a later stage says so, on a
    sharded encoder.
    """
    step, batches = _make()
    for number, parts in enumerate(
        (["all"], ["vision", "temperatures"], ["audio", "objectives"], ["objectives"], ["all"])
    ):
        with torch.no_grad():  # evaluation leaves gathered parameters behind
            step.encoder(batches[0].views["item"].micro_batches[0])
        set_trainable(step.encoder, step.objectives, step.temperatures, parts)
        modules = {
            "encoder": step.encoder,
            "objectives": step.objectives,
            "temperatures": step.temperatures,
        }
        before = {name: _whole(module) for name, module in modules.items()}
        result = step.run(batches, WEIGHTS, step=number, stage="s")
        assert not result.skipped
        after = {name: _whole(module) for name, module in modules.items()}
        changed = {
            name.partition(".")[0] if prefix == "encoder" else prefix
            for prefix, values in after.items()
            for name, value in values.items()
            if not torch.equal(value, before[prefix][name])
        }
        expected = (
            {"text", "vision", "perceiver", "audio", "tower", "objectives", "temperatures"}
            if parts == ["all"]
            else set(parts)
        )
        assert changed == expected, (parts, changed)
        views = {
            name: view_is_trainable(step.encoder, view.micro_batches[0].modalities)
            for name, view in batches[0].views.items()
        }
        assert result.replayed == sum(
            len(batches[0].views[name].micro_batches)
            for name, trainable in views.items()
            if trainable
        )
        assert views["name"] == (parts == ["all"])
        assert views["item"] == (parts == ["all"] or "vision" in parts)


def test_trainable_parts_change_between_stages_on_a_sharded_encoder() -> None:
    run_ranks(_stages, 2)


def _poisoned(rank: int, world_size: int) -> tuple[list[bool], list[str], bool]:
    step, batches = _make(max_skips=3)
    before = _whole(step.encoder)
    images = batches[0].views["image"].micro_batches[0].images
    clean = images.clone()
    skipped = []
    if rank == 1:
        row = int(batches[0].views["image"].order.argsort()[0])
        batches[0].views["image"].valid[row] = True
        batches[0].views["image"].micro_batches[0].image_mask[0] = True
        images[0] = math.inf
    result = step.run(batches, WEIGHTS, step=1, stage="s")
    skipped.append(result.skipped)
    same = all(torch.equal(value, before[name]) for name, value in _whole(step.encoder).items())
    if rank == 1:
        assert [one.id for one in result.suspects] == [batches[0].record_ids[row]]
    suspects = result.suspects
    images.copy_(clean)
    result = step.run(batches, WEIGHTS, step=2, stage="s")
    skipped.append(result.skipped)
    assert not result.suspects and math.isfinite(result.loss)
    return skipped, suspects, same


def test_a_poisoned_row_on_one_rank_is_skipped_by_all_and_named_by_its_own() -> None:
    first, second = run_ranks(_poisoned, 2)
    assert first[0] == second[0] == [True, False]
    assert first[2] and second[2]
    assert first[1] == [] and len(second[1]) == 1


def _always_poisoned(rank: int, world_size: int) -> None:
    step, batches = _make(max_skips=2)
    with torch.no_grad():
        step.temperatures.logarithms["items/name_to_item"].fill_(math.nan)
    result = step.run(batches, WEIGHTS, step=1, stage="s")
    named = [one.id for one in result.suspects]
    assert result.skipped and not result.guilty and named == batches[0].record_ids, (
        "no row stands out: all of them"
    )
    step.run(batches, WEIGHTS, step=2, stage="s")


def test_skips_in_a_row_end_the_run() -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(_always_poisoned, 1)
    assert isinstance(failure.value.__cause__, SailplanError)
    assert "2 steps in a row" in str(failure.value.__cause__)


def _unused_temperatures(rank: int, world_size: int) -> None:
    step, batches = _make()
    for number in range(2):
        step.run(batches, WEIGHTS, step=number, stage="s")
    moments = {
        name: step.optimizer.state.get(p) for name, p in step.temperatures.named_parameters()
    }
    assert not moments["logarithms.sequences/history_to_item"]
    assert moments["logarithms.items/image_to_name"]
    state = torch.random.get_rng_state()
    step.run(batches, WEIGHTS, step=3, stage="s")
    assert torch.equal(state, torch.random.get_rng_state())
    for bad, message in (([], "no batch"), (batches, "none of")):
        with pytest.raises(ConfigurationError, match=message):
            step.run(bad, {"seq2item": 1.0}, step=4, stage="s")
    with pytest.raises(ConfigurationError, match="found nope"):
        step.run(batches, {"nope": 1.0}, step=4, stage="s")


def test_temperatures_of_absent_sets_get_no_momentum_and_outer_random_state_is_kept() -> None:
    run_ranks(_unused_temperatures, 1)


def _groups(rank: int, world_size: int) -> None:
    step, _ = _make()
    groups = {group["name"]: group for group in step.optimizer.param_groups}
    assert (
        groups["encoder_decay"]["weight_decay"] == 0.1
        and groups["encoder_no_decay"]["weight_decay"] == 0.0
    )
    assert all(p.ndim < 2 for p in groups["encoder_no_decay"]["params"])
    everything = [
        p
        for module in (step.encoder, step.objectives, step.temperatures)
        for p in module.parameters()
    ]
    assert {id(p) for p in everything} == {
        id(p) for group in step.optimizer.param_groups for p in group["params"]
    }
    for group in step.optimizer.param_groups:
        assert len({type(p.data) for p in group["params"]}) == 1  # sharded and plain ones apart
    configure(step.optimizer, OptimizerConfig(learning_rate=1e-3, temperature_learning_rate=5e-2))
    set_learning_rate(step.optimizer, 0.5)
    assert groups["encoder_decay"]["lr"] == 5e-4 and groups["temperatures"]["lr"] == 2.5e-2
    # Scale and bias of the sigmoid loss learn as temperatures do, and are trained with them.
    learned = list(step.objectives["sigmoid"].parameters())
    assert len(learned) == 10 and {id(p) for p in learned} <= {
        id(p) for p in groups["temperatures"]["params"]
    }
    for parts, trained in ((["objectives"], False), (["temperatures"], True)):
        set_trainable(step.encoder, step.objectives, step.temperatures, parts)
        assert all(p.requires_grad == trained for p in learned)
    with torch.no_grad():
        next(iter(step.objectives["sigmoid"].temperatures.parameters())).fill_(5.0)
    set_trainable(step.encoder, step.objectives, step.temperatures, ["all"])
    step.run(_make()[1], {"sigmoid": 1.0}, step=1, stage="s")
    assert all(value.item() <= 0 for value in step.objectives["sigmoid"].temperatures.parameters())
    with pytest.raises(ConfigurationError, match="found wings"):
        set_trainable(step.encoder, step.objectives, step.temperatures, ["wings"])


def test_optimizer_groups() -> None:
    run_ranks(_groups, 2)
