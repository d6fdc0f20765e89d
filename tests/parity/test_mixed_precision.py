"""bfloat16 computes; float32 keeps, sums and reduces: weights, gradients over micro-batches and
ranks, optimizer state.

Read off a real step at two tensor-parallel by two data-parallel ranks: what the layers see, what
travels, what stays.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from sailplan.model.parallelize import set_gradient_sync, shard
from sailplan.model.testing import join_layout, random_inputs, small_config
from sailplan.model.tower import OmniEncoder
from sailplan.parity.layouts import (
    build_step,
    gathered_gradients,
    named_parameters,
    rank_batches,
    relative_errors,
    trajectory,
)
from sailplan.parity.testing import THRESHOLDS, WEIGHTS, Call, Recorder
from sailplan.step.optimizer import set_learning_rate
from sailplan_kernels.testing import run_ranks

BFLOAT16 = {"dtype": torch.float32, "compute_dtype": torch.bfloat16}


def _step(rank: int, world_size: int) -> dict[str, Any]:
    parallel = join_layout(2)
    step = build_step(parallel, kept_graphs=1, **BFLOAT16)
    set_learning_rate(step.optimizer, 1e-2)
    before = {
        name: parameter.detach().to_local().clone()
        for name, parameter in named_parameters(step).items()
        if name.startswith("encoder")
    }
    seen: set[tuple[torch.dtype, torch.dtype]] = set()
    hooks = [
        module.register_forward_pre_hook(
            lambda linear, inputs: seen.add((linear.weight.dtype, inputs[0].dtype))
        )
        for module in step.encoder.modules()
        if isinstance(module, ColumnParallelLinear)
    ]
    with Recorder() as recorder:
        step.gradients(
            rank_batches(step, 3), WEIGHTS, step=1, stage="parity", thresholds=THRESHOLDS
        )
    for hook in hooks:
        hook.remove()
    parameters = named_parameters(step)
    gradients = {
        parameter.grad.dtype for parameter in parameters.values() if parameter.grad is not None
    }
    partial = sum(
        p.grad.to_local().numel()
        for p in step.encoder.parameters()
        if getattr(p, "tensor_parallel_partial", False) and p.grad is not None
    )
    step.optimizer.step()
    state = {value.dtype for kinds in step.optimizer.state.values() for value in kinds.values()}
    moved = lost = 0
    for name, former in before.items():
        now = parameters[name].detach().to_local()
        changed = now != former
        moved += int(changed.sum())
        lost += int((changed & (now.bfloat16() == former.bfloat16())).sum())
    groups = [
        tuple(dist.get_process_group_ranks(group))
        for group in (parallel.data_parallel_group, parallel.tensor_parallel_group)
    ]
    calls: list[list[Call]] = [
        [call for call in recorder.calls if call[1] == group] for group in groups
    ]
    return {
        "layers": seen,
        "parameters": {parameter.dtype for parameter in parameters.values()},
        "gradients": gradients,
        "state": state,
        "calls": calls,
        "partial": partial,
        "lost in bfloat16": lost / moved,
    }


def _dtypes(calls: list[Call], operation: str) -> set[str]:
    return {dtype for name, _, tensors in calls if name == operation for _, dtype in tensors}


def test_what_computes_travels_and_stays_in_which_dtype() -> None:
    for found in run_ranks(_step, 4, timeout=120):
        assert found["layers"] == {(torch.bfloat16, torch.bfloat16)}
        assert found["parameters"] == found["gradients"] == found["state"] == {torch.float32}
        data, tensor = found["calls"]
        assert _dtypes(data, "_reduce_scatter_base_") == {"torch.float32"}
        assert "torch.bfloat16" in _dtypes(data, "_allgather_base_")  # the parameters
        assert "torch.bfloat16" not in _dtypes(data, "allreduce_")
        # Activations are summed as they are; the replicated parameters' gradients in float32, in
        # one message.
        assert "torch.bfloat16" in _dtypes(tensor, "allreduce_")
        assert found["partial"] > 0 and (
            "allreduce_",
            (((found["partial"],), "torch.float32"),),
        ) in [(name, tensors) for name, _, tensors in tensor]
        # What master weights are for: most of a small step is below bfloat16's resolution.
        assert found["lost in bfloat16"] > 0.5


def _summed(rank: int, world_size: int) -> float:
    """How far the sum of a gradient over many micro-batches is from as many times one."""
    parallel = join_layout(1)
    count, norms = 64, []
    for repeats in (1, count):
        encoder = shard(
            OmniEncoder(small_config(), seed=1), parallel, shard=True, compute_dtype=torch.bfloat16
        )
        inputs = random_inputs(("vision", "audio", "text"), 4, 3, dtype=torch.float32)
        for number in range(repeats):
            set_gradient_sync(encoder, number == repeats - 1)
            encoder(inputs).fused.sum().backward()
        norms.append(
            {name: parameter.grad.full_tensor() for name, parameter in encoder.named_parameters()}
        )
    one, many = norms
    return max(
        float((many[name] - count * one[name]).norm() / (count * one[name]).norm().clamp(min=1e-6))
        for name in one
    )


def test_micro_batches_are_summed_in_float32() -> None:
    """A running sum in bfloat16 would be off by some percent after 64."""
    assert max(run_ranks(_summed, 2)) < 1e-5


def test_some_steps_stay_near_float32s() -> None:
    exact, narrow = (
        trajectory(2, 2, 1, steps=3, dtype=torch.float32, compute_dtype=kind)[0]
        for kind in (None, torch.bfloat16)
    )
    assert all(
        0 < abs(one - other) < 0.02 * abs(one) for one, other in zip(exact, narrow, strict=True)
    ), (exact, narrow)


def _resharded(rank: int, world_size: int) -> float:
    """The largest difference of gathered gradients between parameters gathered once and for each
    layer, relative to the largest element.
    """
    parallel, found = join_layout(1), []
    for reshard in (False, True):
        step = build_step(parallel, kept_graphs=1, reshard_after_forward=reshard, **BFLOAT16)
        step.gradients(
            rank_batches(step, 3), WEIGHTS, step=1, stage="parity", thresholds=THRESHOLDS
        )
        found.append(gathered_gradients(step, parallel))
    return max(relative_errors(*found).values())


def test_parameters_gathered_for_one_layer_at_a_time_in_bfloat16() -> None:
    """The same forward and backward passes; sums over micro-batches and ranks change places, in
    float32.
    """
    assert max(run_ranks(_resharded, 2, timeout=120)) < 1e-4
