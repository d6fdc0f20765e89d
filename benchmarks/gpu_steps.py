"""The training-step rows of benchmarks/gpu.py; apart, as they need megatron-core."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import kernels
import step as whole_step
import torch

from sailplan.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    ParallelConfig,
    PatternConfig,
    StepConfig,
    ViewConfig,
)
from sailplan.data.packing import SequenceLayout, pack
from sailplan.data.record import StepBatch, ViewBatch
from sailplan.model.parallelize import shard
from sailplan.model.testing import random_inputs, rows_of, small_config
from sailplan.model.tower import OmniEncoder
from sailplan.objective.registry import build_objectives
from sailplan.objective.temperature import Temperatures
from sailplan.runtime.process import Parallel
from sailplan.runtime.session import started
from sailplan.step.training_step import TrainingStep
from sailplan_kernels.exchange import AllGather

ROWS, MICRO_BATCH = 24, 8


def _config(modalities: list[str], kept_graphs: int) -> Config:
    view = ViewConfig(modalities=modalities)
    pairs = DatasetConfig(
        kind="pairs",
        views={"query": view, "target": view},
        patterns={"pair": PatternConfig("query", "target")},
        temperature=0.1,
    )
    return Config(
        data=DataConfig(sets={"pairs": pairs}),
        model=small_config(),
        step=StepConfig(micro_batch=MICRO_BATCH, kept_graphs=kept_graphs),
        objectives={"infonce": {"_target_": "sailplan.objective.infonce.InfoNCE"}},
    )


def _batch(modalities: list[str], layout: SequenceLayout) -> StepBatch:
    views = {}
    for number, name in enumerate(("query", "target")):
        inputs = random_inputs(tuple(modalities), ROWS, number, dtype=torch.float32, absent=False)
        cut = [rows_of(inputs, start, start + MICRO_BATCH) for start in range(0, ROWS, MICRO_BATCH)]
        cut = [
            dataclasses.replace(part, packing=pack(part, layout)) for part in cut
        ]  # as the loader does
        views[name] = ViewBatch(
            cut,
            torch.arange(ROWS),
            torch.ones(ROWS, dtype=torch.bool),
            torch.arange(ROWS) + number * ROWS,
        )
    return StepBatch(1, "pairs", [str(row) for row in range(ROWS)], views, patterns={"pair": 1.0})


def _three_steps(
    modalities: list[str], kept_graphs: int, dtype: torch.dtype | None, parallel: Parallel
) -> list[float]:
    """Loss and gradient norm of each."""
    config = _config(modalities, kept_graphs)
    encoder = shard(OmniEncoder(config.model, seed=1), parallel, shard=True, compute_dtype=dtype)
    layout: SequenceLayout = encoder.layout  # type: ignore[assignment]
    objectives = build_objectives(
        config.objectives, config.model.embedding, config.data.sets, seed=1
    ).to(parallel.device)
    temperatures = Temperatures(config.data.sets).to(parallel.device)
    parameters = [p for module in (encoder, objectives, temperatures) for p in module.parameters()]
    step = TrainingStep(
        encoder,
        objectives,
        temperatures,
        torch.optim.AdamW(parameters, lr=1e-3),
        config,
        parallel,
        AllGather(parallel.data_parallel_group),
    )
    found = []
    for number in (1, 2, 3):
        result = step.run([_batch(modalities, layout)], {"infonce": 1.0}, step=number, stage="gpu")
        found += [float(result.loss), float(result.grad_norm)]
    return found


def compare_dtypes(modalities: list[str], tell: Callable[[str], None]) -> dict[str, Any]:
    """Losses and gradient norms of three steps in bfloat16, as parts of float32's: near 1 where
    all is right.
    """
    with started(ParallelConfig(threads=1)) as parallel:
        tell("float32")
        expected = _three_steps(modalities, 0, None, parallel)
        found: dict[str, Any] = {"modalities": modalities}
        for kept in (0, 1, -1):
            tell(f"bfloat16, kept graphs {kept}")
            numbers = _three_steps(modalities, kept, torch.bfloat16, parallel)
            found[f"of float32's, kept graphs {kept}"] = [
                round(a / b, 4) for a, b in zip(numbers, expected, strict=True)
            ]
    return found


def time_step(
    contender: str, shape: str, settings: dict[str, Any], tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Median seconds and peak bytes of a whole step, its FLOP by torch's counter, and the part
    of the matrix rate of 3 F.
    """
    from torch.utils.flop_counter import FlopCounterMode

    name, _, kept = contender.partition(", ")
    with started(ParallelConfig(threads=1)) as parallel:
        tell("building")
        device = parallel.device
        config = whole_step.configuration(settings["micro_batch"], shape, -1 if kept else 0)
        made = whole_step.BUILDERS[name](config, parallel, getattr(torch, settings["dtype"]))
        pair = tuple(
            whole_step.tokens(settings["rows"], settings["length"], seed, device) for seed in (1, 2)
        )
        tell("first step")
        made.step(pair)
        tell("memory")
        peak = (
            whole_step.peak_of(lambda: made.step(pair), device) if device.type == "cuda" else None
        )
        tell("FLOP")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            made.encoder(whole_step.cut(pair[0], 0, settings["micro_batch"], made.layout))
        if hasattr(made.encoder, "reshard"):
            for module in made.encoder.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
        forward = counter.get_total_flops() * 2 * settings["rows"] / settings["micro_batch"]
        times = []
        for number in range(settings["rounds"]):
            tell(f"round {number}")
            times.append(_seconds(lambda: made.step(pair), device))
        rate, _ = kernels.matrix_rate({"dtype": settings["dtype"]}, device.type)
    seconds = statistics.median(times)
    yield {
        **settings,
        "shape": dataclasses.asdict(config.model.tower),
        "seconds": times,
        "median_step_seconds": seconds,
        "peak_bytes": peak,
        "forward_flop": forward,
        "matrix_flops": rate,
        "of_the_matrix_rate_at_3F": 3 * forward / seconds / rate,
    }


def _seconds(action: Callable[[], None], device: torch.device) -> float:
    import time

    whole_step.synchronise(device)
    began = time.perf_counter()
    action()
    whole_step.synchronise(device)
    return time.perf_counter() - began
