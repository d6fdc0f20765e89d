"""Risks: a replay where a graph could have been kept, ranks that keep unlike numbers, more
graphs than memory, other gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from sailplan.model.testing import join_layout
from sailplan.parity.layouts import build_step, rank_batches
from sailplan.parity.testing import THRESHOLDS, WEIGHTS, named_gradients
from sailplan.step.kept_graphs import KeptGraphs, SavedBytes, host_memory
from sailplan.step.training_step import TrainingStep
from sailplan_kernels.testing import run_ranks

Gradients = dict[str, torch.Tensor]


def _flop(rank: int, world_size: int) -> tuple[dict[int, float], list[float]]:
    """Kept graphs -> FLOP of a step of eight micro-batches over those of their forward, and each
    micro-batch's part of that forward.
    """
    found = {}
    for kept in (0, 1, 4, 8, -1):
        step = build_step(join_layout(1), kept_graphs=kept)
        batches = rank_batches(step, 4, datasets=("pairs",))
        forward = []
        for _, view in sorted(batches[0].views.items(), key=lambda item: str(item[0])):
            for inputs in view.micro_batches:
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    step.encoder(inputs)
                forward.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as whole:
            step.gradients(batches, {"infonce": 1.0}, step=1, stage="one")
        found[kept] = whole.get_total_flops() / sum(forward)
    return found, [flop / sum(forward) for flop in forward]


def test_each_kept_graph_saves_a_forward() -> None:
    """4 F with none of eight, 3 F with all, and the forward of each that is kept less in
    between; what is above is the loss.
    """
    ((found, parts),) = run_ranks(_flop, 1)
    assert found[8] == found[-1] and len(parts) == 8
    for kept in (0, 1, 4, 8):
        times = 4.0 - sum(parts[8 - kept :])
        assert found[kept] - found[8] == pytest.approx(times - 3.0, abs=1e-6)
        assert times - 0.05 <= found[kept] <= times + 0.05


def _gradients(step: TrainingStep, number: int) -> Gradients:
    step.optimizer.zero_grad(set_to_none=True)
    step.gradients(
        rank_batches(step, 3, number=number),
        WEIGHTS,
        step=number,
        stage="one",
        thresholds=THRESHOLDS,
    )
    found = named_gradients(step.encoder, step.objectives, step.temperatures)
    return {
        name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        for name, gradient in found.items()
    }


def _auto(rank: int, world_size: int) -> list[int]:
    numbers, limits = [], {0: 10.0, 1: 2.4}  # graphs that each rank has room for
    parallel = join_layout(1)
    step, fixed = (build_step(parallel, kept_graphs=kept) for kept in (0, 1))
    kept = KeptGraphs("auto", step.encoder, parallel, lambda: int(limits[rank] * largest()))

    def largest() -> int:
        return max(measured.largest for measured in kept._measured.values())

    whole: Callable[..., int] = kept.begin

    def noted(kind: list[str]) -> int:
        numbers.append(whole(kind))
        return numbers[-1]

    kept.begin = noted  # type: ignore[method-assign]
    step.cache.kept_graphs = kept
    for number in (1, 2, 3):
        found, expected = _gradients(step, number), _gradients(fixed, number)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-14)
    numbers.append(whole(["another stage", "items"]))
    assert largest() > 0
    return numbers


def test_auto_keeps_one_graph_then_what_fits_on_every_rank() -> None:
    """The second rank has room for two more; and each new set of data sets, or stage, is
    measured first.
    """
    for numbers in run_ranks(_auto, 2, timeout=120):
        assert numbers == [1, 3, 3, 1]


def _saved(rank: int, world_size: int) -> tuple[int, int]:
    join_layout(1)
    layer = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    saved = SavedBytes(layer)
    x = torch.randn(5, 8)
    with torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor):
        layer(x).sum()
    return saved.total, x.nbytes + 5 * 16 * 4


def test_saved_memory_counts_each_tensor_once_and_no_parameter() -> None:
    ((found, expected),) = run_ranks(_saved, 1)
    assert found == expected


def test_the_hosts_memory_is_known_here() -> None:
    assert host_memory() > 2**20
