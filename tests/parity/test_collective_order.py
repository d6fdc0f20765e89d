"""Ranks meet in the same collectives, whatever their rows really contain: nothing hangs, and the
gradients are exact.

Which towers run is decided by a view's declaration. Here rows have text only, pictures only, sound
only, all, or nothing, in any distribution over the ranks; all collectives of a step are recorded on
every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from sailplan.data.record import StepBatch
from sailplan.model.testing import join_layout
from sailplan.parity.layouts import cached_step, gathered_gradients, reference, relative_errors
from sailplan.parity.testing import ROWS, WEIGHTS, Call, Recorder
from sailplan_kernels.testing import run_ranks

KINDS = {
    "text": {"text"},
    "image": {"vision"},
    "audio": {"audio"},
    "mixed": {"text", "vision", "audio"},
    "empty": set(),
}
RANKS = 4  # blocks of rows that get a kind each; two ranks get two blocks each


def restricted(blocks: Mapping[str, Sequence[str]]) -> Any:
    """The change of a whole batch that leaves each block of rows only what its kind has."""

    def change(batch: StepBatch) -> StepBatch:
        kinds = blocks[batch.dataset]
        for view in batch.views.values():
            (inputs,) = view.micro_batches
            each = len(view.ids) // len(kinds)
            for number, kind in enumerate(kinds):
                rows = slice(number * each, (number + 1) * each)
                for modality, masks in (
                    ("text", (inputs.text_mask, inputs.token_mask)),
                    ("vision", (inputs.image_mask,)),
                    ("audio", (inputs.audio_mask,)),
                ):
                    for mask in masks:
                        if mask is not None and modality not in KINDS[kind]:
                            mask[rows] = False
            present = (
                inputs.text_mask.any(1)
                if "text" in inputs.modalities
                else view.valid.new_zeros(len(view.ids))
            )
            for mask in (inputs.image_mask, inputs.audio_mask):
                if mask is not None:
                    present = present | mask.any(1)
            view.valid.logical_and_(present)
        return batch

    return change


def _step(
    rank: int,
    world_size: int,
    tensor_parallel: int,
    change: Any,
    micro_batches: int,
    expected: Any,
    vision: str = "own",
) -> tuple[list[Call], dict[str, float]]:
    parallel = join_layout(tensor_parallel)
    with Recorder() as recorder:
        step, (loss, *_) = cached_step(
            parallel, micro_batches, 1, WEIGHTS, change=change, vision=vision
        )
    errors = relative_errors(gathered_gradients(step, parallel), expected[1])
    errors["loss"] = abs(float(loss) - expected[0]) / max(abs(expected[0]), 1e-6)
    return recorder.calls, errors


def check_order(calls: list[list[Call]]) -> None:
    """In every group, all members make the same calls in the same order."""
    groups = {group for own in calls for _, group, _ in own}
    assert groups
    for group in groups:
        sequences = [[call for call in calls[member] if call[1] == group] for member in group]
        for member, sequence in zip(group, sequences, strict=True):
            assert sequence == sequences[0], (
                f"group {group}: rank {member} differs from rank {group[0]}"
            )
    # And in the same order between groups, which are told apart by the distance of their ranks.
    orders = [
        [(operation, tuple(member - group[0] for member in group)) for operation, group, _ in own]
        for own in calls
    ]
    assert all(order == orders[0] for order in orders)


assignments = st.fixed_dictionaries(
    {
        name: st.lists(st.sampled_from(sorted(KINDS)), min_size=RANKS, max_size=RANKS)
        for name in ROWS
    }
)


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel", "examples", "vision"),
    [(2, 1, 4, "own"), (4, 2, 2, "own"), (4, 2, 2, "siglip2")],
)
def test_any_assignment_of_modalities_to_ranks(
    world_size: int, tensor_parallel: int, examples: int, vision: str
) -> None:
    """siglip2: pictures of any sides, in any distribution over the ranks."""

    @seed(7)
    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate])
    @given(assignments)
    def holds(blocks: dict[str, list[str]]) -> None:
        change = restricted(blocks)
        found = run_ranks(
            _step,
            world_size,
            tensor_parallel,
            change,
            2,
            reference(change=change, vision=vision),
            vision,
            timeout=120,
        )
        check_order([calls for calls, _ in found])
        for _, errors in found:
            worst = max(errors, key=lambda name: errors[name])
            assert errors[worst] <= 1e-10, (worst, errors[worst], blocks)

    holds()


@pytest.mark.parametrize("kind", ["text", "empty"])
def test_one_rank_has_one_kind_and_the_other_all(kind: str) -> None:
    """The corners by hand: they must not depend on what is drawn."""
    change = restricted({name: [kind, kind, "mixed", "mixed"] for name in ROWS})
    found = run_ranks(_step, 2, 1, change, 2, reference(change=change), timeout=120)
    check_order([calls for calls, _ in found])
    assert max(max(errors.values()) for _, errors in found) <= 1e-10


def _backward(
    rank: int,
    world_size: int,
    tensor_parallel: int,
    micro_batches: int,
    kept_graphs: int,
    share_encoders: bool,
) -> tuple[Counter[str], Counter[str]]:
    """Collectives of a step in the data-parallel and in the tensor-parallel group, by operation."""
    parallel = join_layout(tensor_parallel)
    members = {
        tuple(dist.get_process_group_ranks(group)): group
        for group in (parallel.data_parallel_group, parallel.tensor_parallel_group)
    }
    assert len(members) == 2
    with Recorder() as recorder:
        cached_step(parallel, micro_batches, kept_graphs, WEIGHTS, share_encoders=share_encoders)
    own = {
        group: Counter(operation for operation, ranks, _ in recorder.calls if ranks == group)
        for group in members
    }
    data, tensor = own.values()
    return data, tensor


def test_reductions_at_tensor_parallel_size_two() -> None:
    """More micro-batches: as many collectives between data-parallel ranks as before, more
    between tensor-parallel ones.
    """
    counts = {cuts: run_ranks(_backward, 4, 2, cuts, 0, False, timeout=120) for cuts in (1, 3)}
    for few, many in zip(counts[1], counts[3], strict=True):
        assert few[0] == many[0]
        # One of each unit's parameters, and one of the exchanges for each gradient that the losses
        # reduce themselves.
        assert few[0]["_allgather_base_"] >= 6 and few[0]["_reduce_scatter_base_"] >= 6
        assert many[1]["allreduce_"] > few[1]["allreduce_"] > 0
        # The rows of the losses are split over tensor-parallel peers and gathered once a step,
        # however many micro-batches.
        assert few[1]["_allgather_base_"] == many[1]["_allgather_base_"] > 0
        assert set(few[1]) == set(many[1]) == {"allreduce_", "_allgather_base_"}


def test_shared_encoders_gather_once_a_call_and_reduce_once_a_step() -> None:
    """Instead of two all-reduces a layer, forward and backward; the encoders' gradients are
    summed in one message.
    """
    ranks = [run_ranks(_backward, 4, 2, 3, 0, share, timeout=120) for share in (False, True)]
    for (cut_data, cut), (data, shared) in zip(*ranks, strict=True):
        assert data == cut_data  # nothing more between data-parallel ranks
        assert (
            shared["_allgather_base_"] > cut["_allgather_base_"]
            and shared["allreduce_"] < cut["allreduce_"]
        )
        assert sum(shared.values()) < 0.8 * sum(cut.values())


def test_the_recorder_sees_a_rank_that_differs() -> None:
    first: Call = ("allreduce_", (0, 1), (((3,), "torch.float64"),))
    with pytest.raises(AssertionError, match="rank 1 differs"):
        check_order([[first], [(first[0], first[1], (((4,), "torch.float64"),))]])
