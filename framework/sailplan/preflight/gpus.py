"""A rank's GPU before a run: is it whole, is it ours alone, and is it as fast as the others.

A matrix product in bf16 is computed several times: a sound GPU gives the same bits each time. Its
rate shows a GPU that is throttled or shared. ECC errors come from nvidia-smi, where it is there.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sailplan.errors import ConfigurationError
from sailplan.preflight.findings import Findings, names, size

WIDTH = 8192  # of the matrices: 1.1 TFLOP a product
REPEATS = 8
SLOW = 0.8  # of the median rate
BUSY = 0.1  # share of the memory that others hold


@dataclass(frozen=True)
class GpuFacts:
    """memory in bytes, rate in FLOP a second; errors: uncorrected ECC errors, -1: not known."""

    name: str
    count: int
    memory: int
    free: int
    rate: float
    same_bits: bool
    errors: int


def gpu_facts(device: torch.device) -> GpuFacts:
    """Return what this rank's GPU is and does; takes about a second and 400 MB of its memory."""
    free, memory = torch.cuda.mem_get_info(device)
    rate, same = _product(device)
    return GpuFacts(
        torch.cuda.get_device_name(device),
        torch.cuda.device_count(),
        memory,
        free,
        rate,
        same,
        _errors(device),
    )


def _product(device: torch.device) -> tuple[float, bool]:
    generator = torch.Generator(device).manual_seed(0)
    one, other = (
        torch.randn(WIDTH, WIDTH, generator=generator, device=device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    first = one @ other
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    results = [torch.equal(one @ other, first) for _ in range(REPEATS)]
    end.record()
    torch.cuda.synchronize(device)
    seconds = begin.elapsed_time(end) / 1000
    finite = bool(torch.isfinite(first).all())
    del one, other, first
    torch.cuda.empty_cache()
    return REPEATS * 2 * WIDTH**3 / seconds, finite and all(results)


def _errors(device: torch.device) -> int:
    if shutil.which("nvidia-smi") is None:
        return -1
    wanted = "--query-gpu=uuid,ecc.errors.uncorrected.volatile.total"
    try:
        answer = subprocess.run(
            ["nvidia-smi", wanted, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
        own = str(torch.cuda.get_device_properties(device).uuid)
        rows = (line.split(", ") for line in answer.splitlines())
        return int(next(row[1] for row in rows if own in row[0]))
    except (OSError, subprocess.SubprocessError, StopIteration, ValueError, IndexError):
        return -1


def judge_gpus(
    facts: Sequence[tuple[str, int, GpuFacts | None]], local_ranks: int, findings: Findings
) -> None:
    """Add the row of GPUs. facts: (host, rank, its GPU) of every rank."""
    gpus = [(f"rank {rank} ({host})", gpu) for host, rank, gpu in facts if gpu is not None]
    if not gpus:
        findings.add("GPUs", "note", "none on any host: the ranks compute on CPUs")
        return
    if len(gpus) < len(facts):
        bare = [f"rank {rank} ({host})" for host, rank, gpu in facts if gpu is None]
        findings.refuse(
            "GPUs",
            ConfigurationError(
                f"GPUs: found none for {names(bare)}, expected one for each rank; look at its "
                "driver and CUDA_VISIBLE_DEVICES"
            ),
        )
        return
    broken = [place for place, gpu in gpus if not gpu.same_bits or gpu.errors > 0]
    if broken:
        findings.refuse(
            "GPUs",
            ConfigurationError(
                f"GPUs: {names(broken)} computed different bits from the same product, or has "
                "uncorrected memory errors, expected a sound one; leave its host out"
            ),
        )
        return
    middle = statistics.median(gpu.rate for _, gpu in gpus)
    kinds = sorted({gpu.name for _, gpu in gpus})
    problems = [
        *(
            f"{place} is slow, {gpu.rate / 1e12:.0f}"
            for place, gpu in gpus
            if gpu.rate < SLOW * middle
        ),
        *(
            f"{place}: others hold {size(gpu.memory - gpu.free)} of its memory"
            for place, gpu in gpus
            if gpu.free < (1 - BUSY) * gpu.memory
        ),
        *([f"{len(kinds)} kinds"] if len(kinds) > 1 else []),
        *(
            [f"{gpus[0][1].count} on a host, {local_ranks} used"]
            if gpus[0][1].count > local_ranks
            else []
        ),
    ]
    unknown = "" if all(gpu.errors == 0 for _, gpu in gpus) else "; ECC errors are not known"
    findings.add(
        "GPUs",
        "warning" if problems else "ok",
        f"{len(gpus)} x {', '.join(kinds)}, {size(gpus[0][1].memory)}, {middle / 1e12:.0f} TFLOP/s in "
        f"bf16, same bits {REPEATS + 1} times{unknown}"
        + (f"; {names(problems)}" if problems else ""),
    )
