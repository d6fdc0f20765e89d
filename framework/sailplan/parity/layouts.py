"""Does a layout give the full batch's gradients? The comparison; `python -m
sailplan.parity.matrix` prints the whole matrix.

One mixed step with every loss runs through the gradient cache on a sharded encoder; its gradients,
gathered, are compared with those of the full batch by plain autograd in one process, in float64.
Error: the worst of all parameters' gradients, each relative to the largest element of the true one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sailplan.config.fields import Options
from sailplan.config.schema import OptimizerConfig
from sailplan.data.record import StepBatch
from sailplan.model.parallelize import shard
from sailplan.model.testing import join_layout, whole_tensor
from sailplan.parity.testing import (
    OMNI,
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
from sailplan.runtime.config import Dtype
from sailplan.runtime.process import Parallel
from sailplan.step.optimizer import build_optimizer
from sailplan.step.training_step import TrainingStep
from sailplan_kernels.exchange import EXCHANGES, AllGather, RowSplit
from sailplan_kernels.testing import run_ranks

Change = Callable[[StepBatch], StepBatch]
CASES = ((1, 0), (3, 2), (8, 0), (3, -1))  # (micro-batches a view, kept graphs)


@dataclass(frozen=True)
class Row:
    """One comparison."""

    world: int
    tensor_parallel: int
    micro_batches: int  # per view
    kept_graphs: int
    encoder_calls: int  # micro-batches that a rank ran backward
    error: float
    worst: str  # the parameter with that error, or loss


DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Parameter -> largest difference over the largest true element; a gradient that only one
    side has is an error of inf.
    """
    errors = {name: float("inf") for name in found.keys() ^ expected.keys()}
    # A gradient that is zero but for rounding has no scale of its own.
    floor = max(1e-6 * max(float(true.abs().max()) for true in expected.values()), 1e-30)
    for name in found.keys() & expected.keys():
        errors[name] = float((found[name] - expected[name]).abs().max()) / max(
            float(expected[name].abs().max()), floor
        )
    return errors


def build_step(
    parallel: Parallel,
    *,
    kept_graphs: int = 0,
    dropout: float = 0.0,
    sharding: str = "shard",
    reshard_after_forward: bool = False,
    exchange: str = "all_gather",
    dtype: torch.dtype = torch.float64,
    checkpointing: bool = False,
    share_encoders: bool = True,
    sequence_parallel: bool = False,
    compute_dtype: torch.dtype | None = None,
    vision: str = "own",
    encoder: str = OMNI,
) -> TrainingStep:
    """The step of parity.testing at a layout; sharding: shard, hybrid (two copies) or replicate;
    checkpointing: of activations.
    """
    config = step_config(kept_graphs=kept_graphs, dropout=dropout, vision=vision, encoder=encoder)
    config.parallel.dtype = DTYPES[compute_dtype or dtype]
    module, objectives, temperatures = build_modules(
        config, dtype, share_encoders=share_encoders, sequence_parallel=sequence_parallel
    )
    if checkpointing:
        module.checkpoint_activations()
    replicas = 2 if sharding == "hybrid" else 1
    shard(
        module,
        parallel,
        shard=sharding != "replicate",
        replicas=replicas,
        compute_dtype=compute_dtype,
        reshard_after_forward=reshard_after_forward,
    )
    optimizer = build_optimizer(module, objectives, temperatures, OptimizerConfig())
    row_split = RowSplit(
        EXCHANGES[exchange](parallel.data_parallel_group), AllGather(parallel.tensor_parallel_group)
    )
    return TrainingStep(module, objectives, temperatures, optimizer, config, parallel, row_split)


def rank_batches(
    step: TrainingStep,
    micro_batches: int,
    *,
    number: int = 1,
    datasets: Sequence[str] = tuple(ROWS),
    rows: Mapping[str, Sequence[int]] | None = None,
    change: Change | None = None,
) -> list[StepBatch]:
    """This rank's rows of a step's whole batch.

    rows: data set -> rows of each data-parallel rank (default: equal parts). change: done to each
    data set's whole batch first.
    """
    place = step.parallel
    dtype = next(step.temperatures.parameters()).dtype
    return [
        share(
            change(batch) if change else batch,
            place.data_parallel_rank,
            place.data_parallel_size,
            micro_batches,
            (rows or {}).get(batch.dataset),
            dtype,
        )
        for batch in global_batches(step.config, number)
        if batch.dataset in datasets
    ]


def cached_step(
    parallel: Parallel,
    micro_batches: int,
    kept_graphs: int,
    weights: dict[str, float],
    *,
    datasets: Sequence[str] = tuple(ROWS),
    rows: Mapping[str, Sequence[int]] | None = None,
    change: Change | None = None,
    **layout: Any,
) -> tuple[TrainingStep, tuple[Any, ...]]:
    """A training step on this rank's share, run up to its gradients: the step, and what
    `gradients` returned.

    datasets, rows, change: see `rank_batches`; layout: the other options of `build_step`.
    """
    step = build_step(parallel, kept_graphs=kept_graphs, **layout)
    batches = rank_batches(step, micro_batches, datasets=datasets, rows=rows, change=change)
    return step, step.gradients(batches, weights, step=1, stage="parity", thresholds=THRESHOLDS)


def named_parameters(step: TrainingStep) -> dict[str, nn.Parameter]:
    """All parameters of a step, by the names that `parity.testing.named_gradients` uses."""
    modules = (
        ("encoder", step.encoder),
        ("objectives", step.objectives),
        ("temperatures", step.temperatures),
    )
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in modules
        for name, parameter in module.named_parameters()
    }


def gathered_gradients(step: TrainingStep, parallel: Parallel) -> dict[str, Tensor]:
    """The whole gradients of a step's parameters, on every rank."""
    parameters = named_parameters(step)
    found = named_gradients(step.encoder, step.objectives, step.temperatures)
    return {
        name: whole_tensor(parameters[name], gradient, parallel) for name, gradient in found.items()
    }


def _reference(
    rank: int,
    world_size: int,
    weights: dict[str, float],
    datasets: Sequence[str],
    change: Change | None,
    options: Options,
) -> tuple[float, dict[str, Tensor]]:
    join_layout(1)
    loss, gradients = full_batch_gradients(weights, datasets=datasets, change=change, **options)
    return loss, {name: gradient.numpy() for name, gradient in gradients.items()}  # type: ignore[misc]


def reference(
    weights: dict[str, float] = WEIGHTS,
    datasets: Sequence[str] = tuple(ROWS),
    change: Change | None = None,
    **options: str,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the full batch, computed in a process of its own; options: vision,
    encoder.
    """
    loss, gradients = run_ranks(_reference, 1, weights, datasets, change, options)[0]
    return loss, {name: torch.from_numpy(gradient) for name, gradient in gradients.items()}


def _layout(
    rank: int,
    world_size: int,
    tensor_parallel: int,
    cases: Sequence[tuple[int, int]],
    expected: tuple[float, dict[str, Tensor]],
    weights: dict[str, float],
    options: Options,
) -> list[Row]:
    parallel = join_layout(tensor_parallel)
    rows = []
    for micro_batches, kept_graphs in cases:
        step, (loss, *_, calls) = cached_step(
            parallel, micro_batches, kept_graphs, weights, **options
        )
        errors = relative_errors(gathered_gradients(step, parallel), expected[1])
        errors["loss"] = abs(float(loss) - expected[0]) / abs(expected[0])
        worst = max(errors, key=lambda name: errors[name])
        rows.append(
            Row(
                world_size, tensor_parallel, micro_batches, kept_graphs, calls, errors[worst], worst
            )
        )
    return rows


def compare(
    world_size: int,
    tensor_parallel: int,
    cases: Sequence[tuple[int, int]] = CASES,
    *,
    weights: dict[str, float] = WEIGHTS,
    expected: tuple[float, dict[str, Tensor]] | None = None,
    **options: Any,
) -> list[Row]:
    """One line for each case at a layout, run on forked ranks; the errors are rank 0's, gathered
    from all.

    options: those of `cached_step` besides.
    """
    if expected is None:
        kinds = {name: options[name] for name in ("vision", "encoder") if name in options}
        expected = reference(
            weights, options.get("datasets", tuple(ROWS)), options.get("change"), **kinds
        )
    return run_ranks(
        _layout, world_size, tensor_parallel, cases, expected, weights, options, timeout=240
    )[0]


def _trajectory(
    rank: int,
    world_size: int,
    tensor_parallel: int,
    micro_batches: int,
    steps: int,
    layout: Options,
) -> tuple[list[float], Options]:
    parallel = join_layout(tensor_parallel)
    step = build_step(parallel, **layout)
    losses = []
    for number in range(1, steps + 1):
        batches = rank_batches(step, micro_batches, number=number)
        losses.append(
            float(
                step.run(batches, WEIGHTS, step=number, stage="parity", thresholds=THRESHOLDS).loss
            )
        )
    return losses, {
        name: whole_tensor(parameter, parameter, parallel).numpy()
        for name, parameter in named_parameters(step).items()
    }


def trajectory(
    world_size: int, tensor_parallel: int, micro_batches: int = 1, steps: int = 20, **layout: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final parameters, gathered, of a number of optimizer steps on different
    batches; layout: options of `build_step`.
    """
    losses, parameters = run_ranks(
        _trajectory, world_size, tensor_parallel, micro_batches, steps, layout, timeout=400
    )[0]
    return losses, {name: torch.from_numpy(parameter) for name, parameter in parameters.items()}
