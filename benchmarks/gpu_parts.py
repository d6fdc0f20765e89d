"""What benchmarks/gpu.py runs in processes of their own: generators that yield once for each
turn (see isolated.py).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import kernels
import recipe_loss
import torch
from torch import Tensor

from sailplan_kernels import options as matrix
from sailplan_kernels.tiling.engines import triton_schedule

Tell = Callable[[str], None]
Case = dict[str, Any]
FLUSH_BYTES = 256 * 2**20  # more than any L2
TURN_SECONDS = 0.3  # of repetitions within a turn
BARS = {
    "float32": 1e-4,
    "bfloat16": 1e-2,
    "float16": 1e-2,
}  # relative, as in sailplan_kernels.options


# ------------------------------------------------------------------------------------------------
# (a) correctness
def topics(n: int, m: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Queries in topics of eight, keys that are their queries and noise: there is a loss at any
    temperature.
    """
    g = torch.Generator().manual_seed(2)
    queries = torch.randn(-(-n // 8), d, generator=g).repeat(8, 1)[:n] + 0.2 * torch.randn(
        n, d, generator=g
    )
    keys = torch.cat(
        [queries + 0.6 * torch.randn(n, d, generator=g), torch.randn(m - n, d, generator=g)]
    )
    return queries.to(device, dtype), keys.to(device, dtype)


def options_row(
    loss: str,
    engine: str,
    number: int,
    dtype: str,
    device: str,
    sizes: list[tuple[int, int, int]],
    temperatures: list[float],
    tell: Tell,
):
    """One row of the options matrix at all sizes and temperatures against the definition in
    float64 on the same rounded inputs.
    """
    backend, _, schedule = engine.partition(", ")
    worst: dict[str, float] = {}
    above, runs = [], 0
    for n, m, d in sizes:
        label, chosen = matrix.samples(n, m, d)[number]
        chosen = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in chosen.items()}
        computed = chosen.pop("dtype", getattr(torch, dtype))
        for temperature in [None] if "temperature" in chosen else temperatures:
            tell(f"{label}, {n} x {m} x {d}, {str(computed)[6:]}, t = {temperature}")
            call = matrix.arguments(loss, chosen, n, m, d)
            call["queries"], call["keys"] = topics(n, m, d, computed, device)
            if temperature is not None:
                call["temperature"] = torch.tensor(temperature)
            call = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in call.items()}
            exact = {
                key: _leaf(x.double() if key in matrix.LEAVES and isinstance(x, Tensor) else x, key)
                for key, x in call.items()
                if key != "score_dtype"
            }
            # Hard negatives are rounded as the queries are, and the definition reads what was
            # rounded.
            if "hard_negatives" in call:
                call["hard_negatives"] = call["hard_negatives"].to(computed)
                exact["hard_negatives"] = _leaf(call["hard_negatives"].double(), "hard_negatives")
            call = {key: _leaf(x, key) for key, x in call.items()}
            with triton_schedule(schedule or "auto"):
                found = matrix.outcome(loss, call, backend=backend)
            expected = matrix.outcome(loss, exact, backend="reference")
            names = ("loss", *(name for name in matrix.LEAVES if name in call))
            for name, a, b in zip(names, found, expected, strict=True):
                error = float((a - b).norm() / b.norm().clamp_min(1e-9))
                worst[name] = max(worst.get(name, 0.0), error)
                if not error <= BARS.get(str(computed)[6:], BARS["float32"]):
                    above.append(f"{name} {error:.1e} at {n} x {m} x {d}, t = {temperature}")
            runs += 1
    yield {
        "label": label,
        "worst": worst,
        "above_the_bar": above[:8],
        "above_the_bar_in_all": len(above),
        "comparisons": runs,
    }


def _leaf(x: Any, name: str) -> Any:
    return (
        x.detach().clone().requires_grad_()
        if name in matrix.LEAVES and isinstance(x, Tensor)
        else x
    )


def options_of(loss: str) -> Iterator[tuple[int, str]]:
    """Numbers and labels of the rows that the loss has arguments for."""
    for number, (label, chosen) in enumerate(matrix.samples()):
        if matrix.knows(loss, chosen):
            yield number, label


def training_row(modalities: list[str], device: str, tell: Tell) -> Iterator[dict[str, Any]]:
    """Steps in bfloat16 of a tiny model whose data has these modalities alone, kept graphs 0, 1
    and all, beside float32.
    """
    import gpu_steps

    yield gpu_steps.compare_dtypes(modalities, tell)


# ------------------------------------------------------------------------------------------------
# (b) kernels
def table_of(case: Case) -> dict[str, tuple[Any, ...]]:
    return recipe_loss.CONTENDERS if case["loss"] == "recipe" else kernels.contenders(case)


def gradient_error(name: str, step: Callable[..., None], case: Case, device: str) -> float:
    if case["loss"] != "recipe":
        return kernels.gradient_error(step, case, device)
    q, k = kernels.inputs(case, device, min(kernels.ERROR_SIZE, case["rows"]))
    a, b = (x.detach().double().requires_grad_() for x in (q, k))
    recipe_loss.definition(a, b, case, recipe_loss.CONTENDERS[name][3])
    step(q, k, case)
    found, expected = torch.cat([q.grad, k.grad]).double(), torch.cat([a.grad, b.grad])
    return float((found - expected).norm() / expected.norm())


def kernel_row(name: str, case: Case, device: str, tell: Tell) -> Iterator[dict[str, Any]]:
    """First {gradient_error}, then for each turn {seconds, peak_bytes}: each step after a flush
    of the caches.
    """
    step = table_of(case)[name][0]
    tell("gradient error")
    yield {"gradient_error": gradient_error(name, step, case, device)}
    tell("warm-up")
    q, k = kernels.inputs(case, device)
    flush = torch.empty(FLUSH_BYTES // 4, device=device) if device == "cuda" else None
    while True:
        tell("a turn")
        clock, _ = kernels.timed(
            step, q, k, case
        )  # fills the allocator's pool, compiles in the first turn
        clock, _ = kernels.timed(step, q, k, case)
        peak = kernels.cuda_peak(step, q, k, case) if device == "cuda" else None
        times = []
        for _ in range(max(1, min(10, int(TURN_SECONDS / clock)))):
            if flush is not None:
                flush.zero_()
            times.append(_timed(step, q, k, case))
        q.grad = k.grad = None
        if device == "cuda":
            torch.cuda.empty_cache()  # for the others
        yield {"seconds": times, "peak_bytes": peak}


def _timed(step: Callable[..., None], q: Tensor, k: Tensor, case: Case) -> float:
    """Seconds; on CUDA those between two events on the device."""
    if not q.is_cuda:
        return kernels.timed(step, q, k, case)[0]
    q.grad = k.grad = None
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step(q, k, case)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def matrix_rate_row(case: Case, device: str, tell: Tell) -> Iterator[dict[str, Any]]:
    tell("matrix product")
    yield {"flops": statistics.median(kernels.matrix_rate(case, device)[0] for _ in range(5))}


# ------------------------------------------------------------------------------------------------
# (c) split by kernel
KINDS = (
    ("statistics", ("statistics",)),
    ("gradient", ("gradient_kernel", "rescale", "sigmoid_kernel")),
    (
        "products",
        (
            "gemm",
            "nvjet",
            "cutlass",
            "xmma",
            "wgmma",
            "aten::mm",
            "aten::addmm",
            "aten::bmm",
            "matmul",
        ),
    ),
    ("accumulation", ("add_", "aten::add", "CUDAFunctor_add", "AddFunctor")),
    ("copies", ("Memcpy", "Memset", "copy_", "cat")),
)


def kind_of(kernel: str) -> str:
    return next((kind for kind, words in KINDS if any(word in kernel for word in words)), "other")


def split_row(name: str, case: Case, device: str, tell: Tell) -> Iterator[dict[str, Any]]:
    """Milliseconds of one step by kind of kernel; launch: the step's time in which no kernel
    ran.
    """
    step = table_of(case)[name][0]
    q, k = kernels.inputs(case, device)
    for _ in range(3):
        tell("warm-up")
        wall, _ = kernels.timed(step, q, k, case)
    tell("profile")
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        *([torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []),
    ]
    with torch.profiler.profile(activities=activities) as profile:
        kernels.timed(step, q, k, case)
    kinds: dict[str, float] = {}
    names: list[tuple[float, str, int]] = []
    for event in profile.key_averages():
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if spent and (device == "cpu" or event.device_type == torch.autograd.DeviceType.CUDA):
            kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0.0) + spent / 1e3
            names.append((spent / 1e3, event.key[:100], event.count))
    kinds["launch"] = max(0.0, wall * 1e3 - sum(kinds.values()))
    yield {
        "milliseconds": wall * 1e3,
        "by_kind": kinds,
        "longest": sorted(names, reverse=True)[:16],
    }


# ------------------------------------------------------------------------------------------------
# (d) the training step
def step_row(
    contender: str, shape: str, settings: dict[str, Any], tell: Tell
) -> Iterator[dict[str, Any]]:
    import gpu_steps

    yield from gpu_steps.time_step(contender, shape, settings, tell)


# ------------------------------------------------------------------------------------------------
# the machine
def describe(device: str, tell: Tell) -> Iterator[dict[str, Any]]:
    """What the device is, read in a process of its own: the driver's process never touches it."""
    import os
    import platform

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    if device == "cpu":
        yield found | {"device": f"CPU, {len(os.sched_getaffinity(0))} cores, {platform.machine()}"}
        return
    tell("CUDA's start")
    properties = torch.cuda.get_device_properties(0)
    began = time.perf_counter()
    torch.zeros(1, device=device)
    yield found | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "start_seconds": round(time.perf_counter() - began, 2),
    }


def as_key(*parts: Any) -> str:
    return "/".join(
        part if isinstance(part, str) else json.dumps(part, sort_keys=True) for part in parts
    )
