"""The losses of sailplan-kernels beside other people's, in one run: time, memory and gradient
error of everybody in one table.

    python benchmarks/kernels.py run --device cpu --out benchmarks/results/kernels_cpu.json
    python benchmarks/kernels.py run --device cuda --out benchmarks/results/kernels_cuda.json
    python benchmarks/kernels.py table --results benchmarks/results/kernels_cpu.json --readme
    kernels/README.md --plot kernels/benchmark_cpu.png

A step is forward and backward from raw embeddings to their gradients: everybody normalises, and
nobody's encoder takes part. A run first compares gradients with the definition in float64 on the
same rounded inputs, then takes steps in interleaved rounds (every contender once a round, in turn)
so that a busy machine disturbs all alike, and stops after --seconds, which keeps it within ten
minutes. On a CPU the time that the process itself computed stands beside the clock's. Peak memory
is what a step takes beyond its inputs: of the allocator on CUDA, of the resident set in a process
of its own on a CPU.

The peers are in requirements/benchmarks.txt; a contender that is missing, cannot run here or fails
keeps a row that says so.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from documents import fill
from torch import Tensor

from sailplan_kernels import LossOptions, infonce, sigmoid
from sailplan_kernels.tiling.engines import triton_schedule

BIAS = -10.0
# Rows of the gradient check: float64 of the full size would take longer than everything else
ERROR_SIZE = 1024
Case = dict[str, Any]  # a workload
PACKAGES = ("torch", "triton", "memeff", "inf-cl", "siglip-kernel", "sentence-transformers")


# -------------------------------------------------------------------- contenders: leave gradients
# in q.grad and k.grad
def unit(x: Tensor) -> Tensor:
    """Normalised in float32, rounded once, as every half-precision trainer should."""
    return F.normalize(x if x.dtype is torch.float64 else x.float(), dim=1).to(x.dtype)


def plain_infonce(q: Tensor, k: Tensor, symmetric: bool, temperature: float) -> Tensor:
    scores = unit(q) @ unit(k).T
    logits = (scores if scores.dtype is torch.float64 else scores.float()) / temperature
    target = torch.arange(len(q), device=q.device)
    loss = F.cross_entropy(logits, target)
    return (loss + F.cross_entropy(logits.T, target)) / 2 if symmetric else loss


def plain_sigmoid(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    scores = unit(q) @ unit(k).T
    logits = (scores if scores.dtype is torch.float64 else scores.float()) / temperature + BIAS
    signs = 2 * torch.eye(len(q), device=q.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(q)


def naive(q: Tensor, k: Tensor, case: Case) -> None:
    plain_infonce(q, k, case["symmetric"], case["temperature"]).backward()


def naive_compiled(q: Tensor, k: Tensor, case: Case) -> None:
    _compiled(plain_infonce)(q, k, case["symmetric"], case["temperature"]).backward()


def naive_sigmoid(q: Tensor, k: Tensor, case: Case) -> None:
    plain_sigmoid(q, k, case["temperature"]).backward()


_COMPILED: dict[Callable, Callable] = {}


def _compiled(function: Callable) -> Callable:
    if function not in _COMPILED:
        _COMPILED[function] = torch.compile(function)
    return _COMPILED[function]


def ours(backend: str, schedule: str = "auto", score_dtype: torch.dtype | None = None) -> Callable:
    """``schedule`` of the Triton engine: "tiles" goes without persistent kernels."""

    def step(q: Tensor, k: Tensor, case: Case) -> None:
        with triton_schedule(schedule):
            loss = infonce(
                q,
                k,
                case["temperature"],
                symmetric=case["symmetric"],
                options=LossOptions(backend=backend, score_dtype=score_dtype),
            ).loss
        loss.backward()

    return step


def our_sigmoid(backend: str, schedule: str = "auto") -> Callable:
    def step(q: Tensor, k: Tensor, case: Case) -> None:
        with triton_schedule(schedule):
            loss = sigmoid(
                q, k, case["temperature"], BIAS, options=LossOptions(backend=backend)
            ).loss
        loss.backward()

    return step


def sentence_transformers(rows: int) -> Callable:
    """The loss stage alone: what runs between the two encoder passes, on embeddings in
    mini-batches of ``rows``.
    """

    def step(q: Tensor, k: Tensor, case: Case) -> None:
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
        )

        directions = ("query_to_doc", "doc_to_query") if case["symmetric"] else ("query_to_doc",)
        encoder = torch.nn.Sequential(torch.nn.Identity())  # the loss stage never calls it
        mode = {"partition_mode": "per_direction"} if case["symmetric"] else {}
        loss = CachedMultipleNegativesRankingLoss(
            encoder,
            scale=1 / case["temperature"],
            mini_batch_size=rows,
            directions=directions,
            **mode,
        )
        reps = [[part.detach().requires_grad_() for part in x.split(rows)] for x in (q, k)]
        loss.calculate_loss(reps, with_backward=True)
        q.grad, k.grad = (torch.cat([part.grad for part in parts]) for parts in reps)

    return step


def memeff(q: Tensor, k: Tensor, case: Case) -> None:
    from memeff import MemoryEfficientCLIPLoss, MemoryEfficientQwen3Loss

    # Its row-only loss with both gradients is Qwen3's, with the other blocks and the margin off.
    rows_only = MemoryEfficientQwen3Loss(case["temperature"], stable=False, margin=2.0)
    loss = (
        MemoryEfficientCLIPLoss(case["temperature"], stable=False)
        if case["symmetric"]
        else rows_only
    )
    loss(q, k).backward()


def inf_cl(q: Tensor, k: Tensor, case: Case) -> None:
    from inf_cl import cal_flash_loss

    a, b, head = unit(q), unit(k), min(256, q.shape[1] & -q.shape[1])
    scale = 1 / case["temperature"]
    loss = cal_flash_loss(a, b, scale=scale, head_dim=head).mean()
    if case["symmetric"]:
        loss = (loss + cal_flash_loss(b, a, scale=scale, head_dim=head).mean()) / 2
    loss.backward()


def open_clip(q: Tensor, k: Tensor, case: Case) -> None:
    """Both of its losses take normalised features and a factor of the cosine."""
    from open_clip.loss import ClipLoss, SigLipLoss

    scale = torch.tensor(1 / case["temperature"], device=q.device)
    if case["loss"] == "sigmoid":
        SigLipLoss()(unit(q), unit(k), scale, torch.tensor(BIAS, device=q.device)).backward()
    else:
        ClipLoss()(unit(q), unit(k), scale).backward()


def siglip_kernel(q: Tensor, k: Tensor, case: Case) -> None:
    from siglip_kernel import fused_siglip_loss

    scale = torch.tensor(
        1 / case["temperature"], device=q.device
    ).log()  # its "temperature" multiplies
    fused_siglip_loss(unit(q), unit(k), scale, torch.tensor(BIAS, device=q.device)).backward()


# name: (step, module that it needs, whether it needs CUDA)
CONTENDERS: dict[str, dict[str, tuple[Callable, str | None, bool]]] = {
    "infonce": {
        "ours, chunked": (ours("chunked"), None, False),
        "ours, chunked, float32 scores": (ours("chunked", score_dtype=torch.float32), None, False),
        "ours, triton": (ours("triton"), "triton", True),
        "ours, triton, without persistent kernels": (ours("triton", "tiles"), "triton", True),
        "naive torch": (naive, None, False),
        "naive torch, compiled": (naive_compiled, None, True),
        "sentence-transformers, cached, mini-batch 32": (
            sentence_transformers(32),
            "sentence_transformers",
            False,
        ),
        "sentence-transformers, cached, mini-batch 512": (
            sentence_transformers(512),
            "sentence_transformers",
            False,
        ),
        "open_clip": (open_clip, "open_clip", True),
        "memeff": (memeff, "memeff", True),
        "inf-cl": (inf_cl, "inf_cl", True),
    },
    "sigmoid": {
        "ours, chunked": (our_sigmoid("chunked"), None, False),
        "ours, triton": (our_sigmoid("triton"), "triton", True),
        "ours, triton, without persistent kernels": (
            our_sigmoid("triton", "tiles"),
            "triton",
            True,
        ),
        "naive torch": (naive_sigmoid, None, False),
        "open_clip": (open_clip, "open_clip", True),
        "siglip-kernel": (siglip_kernel, "siglip_kernel", True),
    },
}


def workloads(device: str) -> list[Case]:
    """Smallest first, so that a run that ends early has whole tables."""
    one = {
        "loss": "infonce",
        "symmetric": False,
        "rows": 8192,
        "dimension": 768,
        "dtype": "float32",
        "temperature": 0.05,
        "data": "random",
    }
    cold = {
        **one,
        "rows": 4096,
        "temperature": 0.01,
        "data": "trained-like",
    }  # where ours computes scores in float64
    if device == "cpu":
        return [one, cold]
    half = [
        {**one, "symmetric": s, "rows": 16384, "dimension": d, "dtype": "bfloat16"}
        for d in (768, 1536, 3584)
        for s in (False, True)
    ]
    large = [{**case, "rows": 65536} for case in half]
    pairs = [{**one, "loss": "sigmoid", "rows": n, "dtype": "bfloat16"} for n in (16384, 65536)]
    return [one, cold, *half[:2], pairs[0], *large[:2], pairs[1], *half[2:], *large[2:]]


# -------------------------------------------------------------------- measures
def inputs(case: Case, device: str, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Random, or topics of eight neighbours and keys that are their queries and noise: cosines
    of about 0.83 with
    the neighbours' keys and 0.86 with one's own, so that there is a loss at t = 0.01."""
    g = torch.Generator().manual_seed(0)
    n, d, dtype = rows or case["rows"], case["dimension"], getattr(torch, case["dtype"])
    one, other = (torch.randn(n, d, generator=g) for _ in range(2))
    if case["data"] == "trained-like":
        one = torch.randn(-(-n // 8), d, generator=g).repeat(8, 1)[:n] + 0.2 * one
        other = one + 0.6 * other
    return one.to(device, dtype).requires_grad_(), other.to(device, dtype).requires_grad_()


def contenders(case: Case) -> dict[str, tuple[Callable, str | None, bool]]:
    """Those of the case's loss; float32 scores are an entry of their own where they are not what
    ours does anyway.
    """
    left_out = (
        {"ours, chunked, float32 scores"}
        if case["temperature"] >= 0.02 or case["dtype"] != "float32"
        else set()
    )
    if case["loss"] == "infonce" and not case["symmetric"]:
        left_out.add("open_clip")  # has both directions only
    return {name: entry for name, entry in CONTENDERS[case["loss"]].items() if name not in left_out}


def gradient_error(step: Callable, case: Case, device: str) -> float:
    """Relative, of both gradients together, against autograd of the definition in float64."""
    q, k = inputs(case, device, min(ERROR_SIZE, case["rows"]))
    a, b = (x.detach().double().requires_grad_() for x in (q, k))
    (
        plain_sigmoid(a, b, case["temperature"])
        if case["loss"] == "sigmoid"
        else plain_infonce(a, b, case["symmetric"], case["temperature"])
    ).backward()
    step(q, k, case)
    found, expected = torch.cat([q.grad, k.grad]).double(), torch.cat([a.grad, b.grad])
    return float((found - expected).norm() / expected.norm())


def timed(step: Callable, q: Tensor, k: Tensor, case: Case) -> tuple[float, float]:
    """Seconds by the clock and of this process's processors."""
    q.grad = k.grad = None
    if q.is_cuda:
        torch.cuda.synchronize()
    clock, processor = time.perf_counter(), time.process_time()
    step(q, k, case)
    if q.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - processor


def matrix_rate(case: Case, device: str) -> tuple[float, float]:
    """FLOP a second of the vendor's matrix product at this dtype, by the clock and by the
    processors' time.
    """
    size = 8192 if device == "cuda" else 2048
    a, b = (
        torch.randn(size, size, device=device, dtype=getattr(torch, case["dtype"]))
        for _ in range(2)
    )
    multiply = lambda q, k, _: torch.mm(q, k)  # noqa: E731
    timed(multiply, a, b, case)
    clock, processor = timed(multiply, a, b, case)
    return 2 * size**3 / clock, 2 * size**3 / max(processor, 1e-9)


def cuda_peak(step: Callable, q: Tensor, k: Tensor, case: Case) -> int:
    q.grad = k.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(q, k, case)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident(what: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)
    )
    return int(line.split()[1]) * 1024


def print_peak(options: argparse.Namespace) -> None:
    """In a process of its own: bytes that one step adds to the resident set at its highest."""
    case = json.loads(options.workload)
    step = CONTENDERS[case["loss"]][options.contender][0]
    step(*inputs(case, "cpu", 64), case)  # libraries and threads are there
    q, k = inputs(case, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from now
    before = resident("VmRSS")
    step(q, k, case)
    print(resident("VmHWM") - before)


def cpu_peaks(names: list[str], case: Case) -> dict[str, int]:
    """Of all contenders at once: memory, unlike time, does not mind company."""
    command = [sys.executable, __file__, "peak", "--workload", json.dumps(case), "--contender"]
    processes = {
        name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True)
        for name in names
    }
    found = {name: process.communicate()[0] for name, process in processes.items()}
    failed = [name for name, process in processes.items() if process.returncode]
    if failed:
        raise RuntimeError(f"peak memory: the processes of {', '.join(failed)} failed")
    return {name: int(text.split()[-1]) for name, text in found.items()}


# -------------------------------------------------------------------- a run
def measure(case: Case, device: str, rounds: int, deadline: float) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    ready = {}
    for name, (step, module, needs_cuda) in contenders(case).items():
        row = rows[name] = {"name": name, "seconds": [], "processor_seconds": []}
        if needs_cuda and device != "cuda":
            row["error"] = "needs CUDA"
        elif module is not None and importlib.util.find_spec(module) is None:
            row["error"] = "not installed"
        else:
            try:
                row["gradient_error"] = gradient_error(step, case, device)
                ready[name] = step
            except Exception as error:
                row["error"] = (
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[
                        :200
                    ]
                )
        print(
            f"  {name}: gradient error {row.get('gradient_error')} {row.get('error', '')}",
            flush=True,
        )
    q, k = inputs(case, device)
    rates = []
    for number in range(rounds + (device == "cuda")):  # the first round on CUDA compiles and tunes
        if number and time.monotonic() > deadline:
            break
        rates.append(matrix_rate(case, device))
        for name, step in list(ready.items()):
            try:
                clock, processor = timed(step, q, k, case)
                if device == "cuda" and number == 0:
                    rows[name]["peak_bytes"] = cuda_peak(step, q, k, case)
                    continue
            except Exception as error:  # out of memory, say
                rows[name]["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
                del ready[name]
                if device == "cuda":
                    torch.cuda.empty_cache()
                continue
            rows[name]["seconds"].append(clock)
            rows[name]["processor_seconds"].append(processor)
            print(
                f"  round {number} {name}: {clock:.4f} s, processors {processor:.4f} s", flush=True
            )
    if device == "cpu":
        for name, found in cpu_peaks(list(ready), case).items():
            rows[name]["peak_bytes"] = found
    clock, processor = (statistics.median(x) for x in zip(*rates, strict=True))
    return {
        **case,
        "matrix_flops": clock,
        "matrix_flops_processor": processor,
        "contenders": list(rows.values()),
    }


def run(options: argparse.Namespace) -> None:
    deadline = time.monotonic() + options.seconds
    cases = workloads(options.device)
    if options.rows:
        cases = [{**case, "rows": options.rows} for case in cases[:1]]
    record = {
        "what": "forward and backward of contrastive losses from raw embeddings, interleaved rounds",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"CPU, {len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "workloads": [],
    }
    for case in cases:
        if time.monotonic() > deadline:
            record["left_out"] = [*record.get("left_out", []), case]
            continue
        print(case, flush=True)
        record["workloads"].append(measure(case, options.device, options.rounds, deadline))
    record["load_average_after"] = os.getloadavg()[0]
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# -------------------------------------------------------------------- the table
def table(record: dict[str, Any]) -> str:
    cpu = record["device"].startswith("CPU")
    rounds = max(len(row["seconds"]) for case in record["workloads"] for row in case["contenders"])
    lines = [
        f"{record['date']}, {record['device']}, {record['threads']} "
        f"thread{'s' * (record['threads'] > 1)}, load average "
        f"{record['load_average_before']:.0f} before and {record['load_average_after']:.0f} after, "
        + ", ".join(f"{name} {found}" for name, found in record["versions"].items())
        + f". Medians of {rounds} interleaved round{'s' * (rounds > 1)} (lowest-highest)."
    ]
    for case in record["workloads"]:
        clock = "processor_seconds" if cpu else "seconds"
        mine = statistics.median(
            next(row for row in case["contenders"] if row["name"] == "ours, chunked")[clock]
        )
        # The least that this loss can cost without keeping an N x M matrix (kernels.md, section 2).
        flop = (8 if case["symmetric"] else 6) * case["rows"] ** 2 * case["dimension"]
        rate = case["matrix_flops_processor" if cpu else "matrix_flops"]
        kind = f"{case['loss']}{', symmetric' if case['symmetric'] else ''}"
        lines += [
            "",
            f"**{kind}, {case['rows']:,} x {case['rows']:,}, D = {case['dimension']}, "
            f"{case['dtype']}, {case['data']}, t = {case['temperature']}**",
            "",
            "| contender | seconds by the clock |"
            + (" seconds of the processor |" if cpu else "")
            + " times ours | "
            "peak extra MiB | gradient error | part of the matrix rate |",
            "|---|---|" + ("---|" if cpu else "") + "---|---|---|---|",
        ]
        for row in case["contenders"]:
            if not row["seconds"]:
                lines.append(
                    f"| {row['name']} | {row.get('error', 'no time left')} |"
                    + (" |" if cpu else "")
                    + " | | | |"
                )
                continue
            time_of = statistics.median(row[clock])
            cells = [
                spread(row["seconds"]),
                *([spread(row["processor_seconds"])] if cpu else []),
                f"{time_of / mine:.2f}",
            ]
            cells += [
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{row['gradient_error']:.1e}",
                f"{flop / time_of / rate:.0%}",
            ]
            lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    if cpu:
        lines += [
            "",
            "Ratios and the matrix rate are of processor time: the clock of a shared machine also "
            "counts who else computes.",
        ]
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cpu = record["device"].startswith("CPU")
    figure, axes = plt.subplots(
        len(record["workloads"]), 2, figsize=(11, 2.6 * len(record["workloads"])), squeeze=False
    )
    for (left, right), case in zip(axes, record["workloads"], strict=True):
        rows = [row for row in case["contenders"] if row["seconds"]][::-1]
        times = [row["processor_seconds" if cpu else "seconds"] for row in rows]
        middle = [statistics.median(x) for x in times]
        error = [
            [m - min(x) for m, x in zip(middle, times, strict=True)],
            [max(x) - m for m, x in zip(middle, times, strict=True)],
        ]
        names, colors = (
            [row["name"] for row in rows],
            ["tab:blue" if row["name"].startswith("ours") else "tab:gray" for row in rows],
        )
        left.barh(names, middle, xerr=error, color=colors)
        left.set_xlabel("seconds" + " of the processor" * cpu)
        right.barh(names, [row["peak_bytes"] / 2**20 for row in rows], color=colors)
        right.set_yticks([])
        right.set_xlabel("peak extra MiB")
        left.set_title(
            f"{case['loss']} {case['rows']:,}, D = {case['dimension']}, {case['dtype']}, t = "
            f"{case['temperature']}",
            fontsize=9,
        )
    figure.suptitle(f"{record['device']}, {record['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def write_table(options: argparse.Namespace) -> None:
    record = json.loads(Path(options.results).read_text())
    fill(Path(options.readme), "benchmark", table(record))
    if options.plot:
        plot(record, Path(options.plot))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    runner.add_argument("--rounds", type=int, default=5)
    runner.add_argument("--seconds", type=float, default=480)
    runner.add_argument("--rows", type=int, help="the first workload alone, with so many rows")
    runner.add_argument("--out", required=True)
    peak = commands.add_parser("peak")
    peak.add_argument("--contender", required=True)
    peak.add_argument("--workload", required=True)
    writer = commands.add_parser("table")
    writer.add_argument("--results", default="benchmarks/results/kernels_cpu.json")
    writer.add_argument("--readme", default="kernels/README.md")
    writer.add_argument("--plot")
    options = parser.parse_args()
    {"run": run, "peak": print_peak, "table": write_table}[options.command](options)


if __name__ == "__main__":
    main()
