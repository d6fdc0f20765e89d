"""The step's gradients are those of the full batch: at any world, tensor-parallel size,
micro-batch count, and for every loss.

All comparisons are in float64 against plain autograd in one process; the table is `python -m
sailplan.parity.matrix`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sailplan.data.record import StepBatch
from sailplan.model.testing import join_layout
from sailplan.parity.layouts import (
    cached_step,
    compare,
    gathered_gradients,
    reference,
    relative_errors,
)
from sailplan.parity.testing import THRESHOLDS, WEIGHTS
from sailplan_kernels.testing import run_ranks

EXACT = 1e-10


@pytest.fixture(scope="module")
def expected() -> Any:
    return reference()


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel", "cases"),
    [
        (1, 1, ((1, 0), (8, 3))),
        (2, 1, ((1, -1), (3, 0), (8, 2))),
        (2, 2, ((1, 0), (3, 2))),
        (4, 1, ((8, 1),)),
        (4, 2, ((1, 0), (3, 0))),
    ],
)
def test_every_layout_has_the_full_batch_gradient(
    world_size: int, tensor_parallel: int, cases: Any, expected: Any
) -> None:
    for row in compare(world_size, tensor_parallel, cases, expected=expected):
        assert row.error <= EXACT, row


def test_replicated_parameters_have_the_full_batch_gradient_too(expected: Any) -> None:
    (row,) = compare(2, 1, ((3, 1),), expected=expected, sharding="replicate")
    assert row.error <= EXACT, row


def test_hybrid_sharding_has_the_full_batch_gradient_too(expected: Any) -> None:
    """Two copies of the parameters, each cut over two ranks."""
    for row in compare(4, 1, ((1, 0), (3, 1)), expected=expected, sharding="hybrid"):
        assert row.error <= EXACT, row


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel", "sharding"),
    [(2, 1, "shard"), (2, 2, "shard"), (4, 1, "hybrid")],
)
def test_parameters_that_are_gathered_for_one_layer_at_a_time(
    world_size: int, tensor_parallel: int, sharding: str, expected: Any
) -> None:
    """ZeRO-3, with replays and with all graphs kept."""
    for row in compare(
        world_size,
        tensor_parallel,
        ((3, 1), (3, -1)),
        expected=expected,
        sharding=sharding,
        reshard_after_forward=True,
    ):
        assert row.error <= EXACT, row


FEWER = {
    "items": (14, 3, 0, 15),
    "pairs": (0, 9, 6, 1),
    "sequences": (2, 0, 5, 1),
    "scored": (3, 0, 4, 1),
}
NONE = {"items": (32, 0), "pairs": (5, 11), "sequences": (8, 0), "scored": (0, 8)}


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel", "rows"),
    [(4, 1, FEWER), (2, 1, NONE), (4, 2, NONE)],
    ids=["fewer on each of four", "none", "none, tensor parallel"],
)
def test_ranks_with_fewer_rows_or_none(
    world_size: int, tensor_parallel: int, rows: Any, expected: Any
) -> None:
    """Ranks hold different mixes of the data sets: the weight of a data set is its part of all
    ranks' rows.
    """
    for row in compare(world_size, tensor_parallel, ((3, 1),), expected=expected, rows=rows):
        assert row.error <= EXACT, row


def test_ranks_with_padded_rows_and_with_nothing_but_padding() -> None:
    """A last batch that was filled up: the last rank has no real pair, no real sequence and few
    real items.
    """
    real = {"items": 19, "pairs": 6, "sequences": 4, "scored": 3}

    def padded(batch: StepBatch) -> StepBatch:
        for view in batch.views.values():
            view.valid[real[batch.dataset] * view.group :] = False
        return batch

    for row in compare(2, 1, ((3, 0),), change=padded):
        assert row.error <= EXACT, row


@pytest.mark.parametrize(
    ("objective", "dataset"),
    [
        ("cosent", "pairs"),
        ("micl", "items"),
        ("late_fusion", "pairs"),
        ("seq2item", "sequences"),
        ("id2item", "items"),
        ("sigmoid", "items"),
        ("multi_positive", "items"),
        ("score_distillation", "scored"),
    ],
)
def test_each_loss_alone(objective: str, dataset: str) -> None:
    """In the mixed step one loss's error could hide behind another's larger gradient."""
    (row,) = compare(2, 1, ((2, 0),), weights={objective: 1.0}, datasets=(dataset,))
    assert row.error <= EXACT, row


def test_the_comparison_reaches_all_parameters_and_sees_small_errors(expected: Any) -> None:
    _, gradients = expected
    idle = {name for name, gradient in gradients.items() if not gradient.any()}
    assert not idle, idle
    changed = {name: gradient.clone() for name, gradient in gradients.items()}
    changed["encoder.text.weight"][7, 3] += 1e-8 * changed["encoder.text.weight"].abs().max()
    assert max(relative_errors(changed, gradients).values()) > EXACT
    del changed["temperatures.logarithms.items/name_to_item"]
    assert max(relative_errors(changed, gradients).values()) == float("inf")


def _dropout(rank: int, world_size: int, tensor_parallel: int) -> float:
    parallel = join_layout(tensor_parallel)
    gradients = []
    for kept_graphs in (-1, 0):
        torch.manual_seed(1000 * rank + kept_graphs)  # what ran before must not matter
        step, _ = cached_step(parallel, 2, kept_graphs, WEIGHTS, dropout=0.3)
        gradients.append(gathered_gradients(step, parallel))
    return max(relative_errors(*gradients).values())


@pytest.mark.parametrize(("world_size", "tensor_parallel"), [(2, 1), (2, 2)])
def test_replay_repeats_the_dropout(world_size: int, tensor_parallel: int) -> None:
    """All graphs kept is plain autograd on one forward; none kept encodes twice."""
    assert max(run_ranks(_dropout, world_size, tensor_parallel)) <= EXACT


class _Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d":
            self.counts[function.__name__.partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def _reductions(
    rank: int, world_size: int, micro_batches: int, kept_graphs: int, layout: dict[str, Any]
) -> tuple[dict[str, int], int]:
    from sailplan.step.gradient_cache import GradientCache

    parallel = join_layout(1)
    collectives = _Collectives()
    whole = GradientCache.backward

    def watched(cache: GradientCache) -> int:
        with collectives:
            return whole(cache)

    GradientCache.backward = watched  # type: ignore[method-assign]  # this rank is a process of its own
    step, _ = cached_step(parallel, micro_batches, kept_graphs, WEIGHTS, **layout)
    units = sum(hasattr(module, "set_requires_gradient_sync") for module in step.encoder.modules())
    return dict(collectives.counts), units


@pytest.mark.parametrize(("micro_batches", "kept_graphs"), [(1, 0), (4, 0), (4, 3)])
def test_one_reduction_a_step_whatever_the_number_of_micro_batches(
    micro_batches: int, kept_graphs: int
) -> None:
    for counts, units in run_ranks(_reductions, 2, micro_batches, kept_graphs, {}):
        assert units == 6
        assert counts == {
            "_reduce_scatter_base_": units
        }  # and no parameter is gathered a second time


def test_resharded_parameters_are_gathered_and_reduced_for_every_micro_batch() -> None:
    for counts, units in run_ranks(_reductions, 2, 2, 0, {"reshard_after_forward": True}):
        assert counts["_reduce_scatter_base_"] > units and counts["_allgather_base_"] > 2 * units


@pytest.mark.parametrize("micro_batches", [1, 8])
def test_one_reduction_a_step_in_hybrid_and_replicated_layouts(micro_batches: int) -> None:
    for counts, units in run_ranks(_reductions, 4, micro_batches, 0, {"sharding": "hybrid"}):
        assert counts == {
            "_reduce_scatter_base_": units,
            "allreduce_": units,
        }  # within a copy, then between the copies
    for counts, units in run_ranks(_reductions, 2, micro_batches, 0, {"sharding": "replicate"}):
        assert counts == {"allreduce_": units}


def test_thresholds_matter_in_the_case_under_test() -> None:
    """The masks by lambda* must be active in the compared step, or their exchange would go
    untested.
    """
    assert THRESHOLDS
    import sailplan.parity.testing as testing

    def loss(rank: int, world_size: int, thresholds: dict[str, float]) -> float:
        join_layout(1)
        testing.THRESHOLDS.clear()
        testing.THRESHOLDS.update(thresholds)
        return testing.full_batch_gradients({"infonce": 1.0}, datasets=("items",))[0]

    with_mask, without = (
        run_ranks(loss, 1, thresholds)[0] for thresholds in (dict(THRESHOLDS), {})
    )
    assert with_mask < without
