"""The proof of exactness as a table: `python -m sailplan.step.parity`.

For worlds of 1, 2 and 4 ranks, tensor-parallel sizes 1 and 2, and several micro-batch counts, one mixed step with
every loss runs through the gradient cache on a sharded encoder; its gradients, gathered, are compared in float64 with
those of the full batch by plain autograd in one process. Worst error of a parameter's gradient, relative to the
largest element of the true one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sailplan.config.schema import OptimizerConfig
from sailplan.model.parallelize import shard
from sailplan.model.testing import join_layout
from sailplan.runtime.process import Parallel
from sailplan.step.optimizer import build_optimizer
from sailplan.step.testing import (
    ROWS,
    THRESHOLDS,
    WEIGHTS,
    build_modules,
    full_batch_gradients,
    global_batches,
    named_gradients,
    share,
    step_config,
)
from sailplan.step.training_step import TrainingStep
from sailplan_kernels.exchange import AllGather
from sailplan_kernels.testing import run_ranks

LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2))  # (world, tensor parallel)
CASES = ((1, 0), (3, 2), (8, 0), (3, -1))  # (micro-batches a view, kept graphs)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    world: int
    tensor_parallel: int
    micro_batches: int  # per view
    kept_graphs: int
    encoder_calls: int  # micro-batches of the step on a rank
    error: float
    worst: str  # the parameter with that error


def whole_gradient(parameter: Tensor, gradient: Tensor, parallel: Parallel) -> Tensor:
    """A gradient gathered over the data-parallel shards and the tensor-parallel pieces. A collective."""
    whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    if parallel.tensor_parallel_size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return whole
    pieces = [torch.empty_like(whole) for _ in range(parallel.tensor_parallel_size)]
    dist.all_gather(pieces, whole.contiguous(), group=parallel.tensor_parallel_group)
    dimension, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    halves = [piece.chunk(stride, dimension) for piece in pieces]
    return torch.cat([half[number] for number in range(stride) for half in halves], dimension)


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Parameter -> largest difference over the largest true element; a gradient that only one side has is an error of inf."""
    errors = {name: float("inf") for name in found.keys() ^ expected.keys()}
    # A gradient that is zero but for rounding has no scale of its own.
    floor = 1e-6 * max(float(true.abs().max()) for true in expected.values())
    for name in found.keys() & expected.keys():
        errors[name] = float((found[name] - expected[name]).abs().max()) / max(float(expected[name].abs().max()), floor)
    return errors


def cached_step(
    parallel: Parallel,
    micro_batches: int,
    kept_graphs: int,
    weights: dict[str, float],
    *,
    dropout: float = 0.0,
    sharded: bool = True,
    replicas: int = 1,
    datasets: Sequence[str] = tuple(ROWS),
    rows: Mapping[str, Sequence[int]] | None = None,
    absent: Mapping[str, range] | None = None,
) -> tuple[TrainingStep, tuple[Any, ...]]:
    """A training step on this rank's share, run up to its gradients: the step, and what `gradients` returned.

    rows: data set -> rows of each data-parallel rank (default: equal parts). absent: data set -> rows that are padding.
    """
    config = step_config(kept_graphs=kept_graphs, dropout=dropout)
    encoder, objectives, temperatures = build_modules(config)
    shard(encoder, parallel, shard=sharded, replicas=replicas)
    optimizer = build_optimizer(encoder, objectives, temperatures, OptimizerConfig())
    step = TrainingStep(encoder, objectives, temperatures, optimizer, config, parallel, AllGather(parallel.data_parallel_group))
    batches = [
        share(batch, parallel.data_parallel_rank, parallel.data_parallel_size, micro_batches, (rows or {}).get(batch.dataset))
        for batch in global_batches(config, 1, absent)
        if batch.dataset in datasets
    ]
    return step, step.gradients(batches, weights, step=1, stage="parity", thresholds=THRESHOLDS)


def gathered_gradients(step: TrainingStep, parallel: Parallel) -> dict[str, Tensor]:
    """The whole gradients of a step's parameters, on every rank."""
    parameters: dict[str, nn.Parameter] = {}
    for prefix, module in (("encoder", step.encoder), ("objectives", step.objectives), ("temperatures", step.temperatures)):
        parameters |= {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}
    found = named_gradients(step.encoder, step.objectives, step.temperatures)
    return {name: whole_gradient(parameters[name], gradient, parallel) for name, gradient in found.items()}


def _reference(
    rank: int, world_size: int, weights: dict[str, float], datasets: Sequence[str], absent: Mapping[str, range] | None
) -> tuple[float, dict[str, Tensor]]:
    join_layout(1)
    loss, gradients = full_batch_gradients(weights, datasets=datasets, absent=absent)
    return loss, {name: gradient.numpy() for name, gradient in gradients.items()}  # type: ignore[misc]


def reference(
    weights: dict[str, float] = WEIGHTS, datasets: Sequence[str] = tuple(ROWS), absent: Mapping[str, range] | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the full batch, computed in a process of its own."""
    loss, gradients = run_ranks(_reference, 1, weights, datasets, absent)[0]
    return loss, {name: torch.from_numpy(gradient) for name, gradient in gradients.items()}


def _layout(
    rank: int,
    world_size: int,
    tensor_parallel: int,
    cases: Sequence[tuple[int, int]],
    expected: tuple[float, dict[str, Tensor]],
    weights: dict[str, float],
    datasets: Sequence[str],
    options: dict[str, Any],
) -> list[Row]:
    parallel = join_layout(tensor_parallel)
    rows = []
    for micro_batches, kept_graphs in cases:
        step, (loss, *_, calls) = cached_step(parallel, micro_batches, kept_graphs, weights, datasets=datasets, **options)
        errors = relative_errors(gathered_gradients(step, parallel), expected[1])
        errors["loss"] = abs(float(loss) - expected[0]) / abs(expected[0])
        worst = max(errors, key=lambda name: errors[name])
        rows.append(Row(world_size, tensor_parallel, micro_batches, kept_graphs, calls, errors[worst], worst))
    return rows


def compare(
    world_size: int,
    tensor_parallel: int,
    cases: Sequence[tuple[int, int]] = CASES,
    *,
    weights: dict[str, float] = WEIGHTS,
    datasets: Sequence[str] = tuple(ROWS),
    expected: tuple[float, dict[str, Tensor]] | None = None,
    **options: Any,
) -> list[Row]:
    """One line for each case at a layout, run on forked ranks; the errors are rank 0's, gathered from all.

    options: those of `cached_step` besides.
    """
    expected = reference(weights, datasets, options.get("absent")) if expected is None else expected
    return run_ranks(_layout, world_size, tensor_parallel, cases, expected, weights, datasets, options, timeout=240)[0]


def main() -> None:
    """Prints the table."""
    expected = reference()
    print(f"{'world':>5} {'TP':>3} {'DP':>3} {'micro-batches':>13} {'kept':>5} {'encoder calls':>13} {'max relative error':>18}")
    for world_size, tensor_parallel in LAYOUTS:
        for row in compare(world_size, tensor_parallel, expected=expected):
            kept = "all" if row.kept_graphs < 0 else row.kept_graphs
            layout = f"{row.world:>5} {row.tensor_parallel:>3} {row.world // row.tensor_parallel:>3}"
            print(f"{layout} {row.micro_batches:>13} {kept:>5} {row.encoder_calls:>13} {row.error:>18.1e}  {row.worst}")


if __name__ == "__main__":
    main()
