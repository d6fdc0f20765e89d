"""One command on one GPU: is everything right there, how fast is it beside its peers, where does
the time go. Under nine minutes.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --quick --out /tmp/gpu.json     # the whole flow, in
    small, without a GPU python benchmarks/gpu.py table --out benchmarks/results/gpu.json      # the
    rows, a line each

In this order: (a) every option of the losses at odd sizes and temperatures of 0.005 to 1 against
float64, and bfloat16 training steps of a tiny model with each subset of modalities; (b) the losses
beside the peers of kernels.py, the recipe's loss (ids, three
prefixes, hard negatives, both directions: recipe_loss.py) among them, in interleaved rounds; (c)
one step of ours by kind of kernel; (d) whole training steps. Every contender has a process of its
own with a time limit (isolated.py): one that hangs or dies costs its own row. The file is written
anew, as one rename, after every row; a second call skips the rows that are there, so what did not
fit into the time, or a machine that was taken away, is made up for by the same command (exit code
75: rows are left). A row that failed counts as there; --again FAILED takes those out. Each part has
a share of the time, so that (a) cannot starve (d).

A machine without a network: (a) to (c) need torch, triton and numpy. The training steps need
megatron-core and pyyaml, the peers what requirements/benchmarks*.txt names; what is missing is a
row that says so. Make a folder of wheels where there is a network,

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform
    manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \\
        -d wheels megatron-core==0.16.1 -r requirements/benchmarks.txt -r
        requirements/benchmarks-cuda.txt

carry it along, and there: pip install --no-index --no-deps --target /tmp/site wheels/*.whl, then
PYTHONPATH=/tmp/site:framework:kernels python benchmarks/gpu.py --out results.json. Where git is
missing, --commit names the commit;
--from FILE begins with the rows of an earlier call's file.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing.connection
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_parts as parts
from isolated import Isolated, Lost
from records import Record, header, lines, query

STOPPED = 75
GRACE = 20  # seconds that the last rows may run on after --seconds
SHARES = {
    "correctness": 0.32,
    "training": 0.12,
    "kernels": 0.36,
    "split": 0.06,
    "steps": 0.14,
}  # of --seconds
CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"


@dataclass
class Row:
    """A contender of its own, asked once; `missing` says why it cannot run here."""

    key: str
    contender: Callable[..., Any]
    arguments: tuple[Any, ...]
    limit: float
    missing: str | None = None


@dataclass
class Workload:
    """Contenders that take turns: (row's name, why it cannot run here)."""

    case: dict[str, Any]
    contenders: list[tuple[str, str | None]] = field(default_factory=list)

    def key(self, name: str) -> str:
        case = self.case
        kind = f"{case['loss']}{', symmetric' if case['symmetric'] else ''}"
        return f"kernels/{kind}, {case['rows']} x {case['rows']}, D = {case['dimension']}, {case['dtype']}, t = {case['temperature']}/{name}"


# ------------------------------------------------------------------------------------------------
# running rows
@dataclass
class Clock:
    """A part begins nothing after its deadline, and nothing runs on past the end."""

    deadline: float
    end: float

    def over(self) -> bool:
        return time.monotonic() >= self.deadline

    def cut(self, limit: float) -> float:
        return max(1.0, min(limit, self.end - time.monotonic()))


def run_rows(rows: list[Row], record: Record, clock: Clock, jobs: int, log: Path) -> int:
    """All rows, `jobs` at a time; returns how many are left."""
    waiting = [row for row in rows if row.key not in record]
    for row in [row for row in waiting if row.missing]:
        record.add(row.key, {"error": row.missing})
        waiting.remove(row)
    running: dict[Any, tuple[Row, Isolated, float]] = {}  # by the process's connection
    left = 0
    while (waiting and not clock.over()) or running:
        while waiting and len(running) < jobs and not clock.over():
            row = waiting.pop(0)
            process = Isolated(row.contender, *row.arguments, log=log)
            limit = clock.cut(row.limit)
            process.begin(limit)
            running[process.connection] = row, process, limit
        first = min(process.deadline for _, process, _ in running.values())
        multiprocessing.connection.wait(list(running), max(0.0, first - time.monotonic()))
        for connection, (row, process, limit) in list(running.items()):
            try:
                answer = process.receive()
            except Lost as lost:
                answer = {"error": str(lost)}
                if lost.hung and limit < row.limit:  # it had not the time that it is entitled to
                    left += 1
                    del running[connection]
                    continue
            if answer is not None:
                del running[connection]
                process.close()
                record.add(row.key, answer)
    return left + len(waiting)


def run_workload(
    workload: Workload, record: Record, options: argparse.Namespace, clock: Clock, log: Path
) -> int:
    """The workload's contenders in turn, `rounds` times; returns how many rows are left."""
    found: dict[str, dict[str, Any]] = {}
    processes: dict[str, Isolated] = {}

    def answer(name: str, limit: float) -> dict[str, Any] | None:
        """None where the contender is lost."""
        try:
            return processes[name].wait()
        except Lost as lost:
            del processes[name]
            row = {**found.pop(name), "error": str(lost)}
            if not (lost.hung and limit < options.limit):
                record.add(workload.key(name), row)
            return None

    for name, missing in workload.contenders:
        if workload.key(name) in record:
            continue
        if missing:
            record.add(workload.key(name), {"error": missing})
            continue
        # All start at once: imports and compilation go on side by side.
        processes[name] = Isolated(parts.kernel_row, name, workload.case, options.device, log=log)
        found[name] = {"seconds": [], "clocks": []}
    limit = clock.cut(options.limit)
    try:
        for process in processes.values():
            process.begin(limit)
        for name in list(processes):
            found.get(name, {}).update(answer(name, limit) or {})
        for number in range(options.rounds):
            order = list(processes)
            for name in order[number % max(len(order), 1) :] + order[: number % max(len(order), 1)]:
                if number and clock.over():
                    continue
                limit = clock.cut(options.limit)
                processes[name].begin(limit)
                turn = answer(name, limit)
                if turn is not None:
                    found[name]["seconds"].append(turn["seconds"])
                    found[name]["peak_bytes"] = turn["peak_bytes"]
                    if options.device == "cuda":
                        found[name]["clocks"].append(query(CLOCKS))
    finally:
        for process in processes.values():
            process.close()
    for name, row in found.items():
        row["median_seconds"] = statistics.median(
            second for turn in row["seconds"] for second in turn
        )
        record.add(workload.key(name), row)
    return sum(workload.key(name) not in record for name, _ in workload.contenders)


# ------------------------------------------------------------------------------------------------
# what is run
def lacking(module: str | None, needs_cuda: bool, device: str) -> str | None:
    if needs_cuda and device != "cuda":
        return "needs CUDA"
    if module is not None and importlib.util.find_spec(module) is None:
        return f"not installed: {module}"
    return None


def correctness(options: argparse.Namespace) -> list[Row]:
    sizes = (
        [(6, 8, 16), (37, 50, 24)]
        if options.quick
        else [(1000, 1531, 768), (128, 200, 48), (333, 517, 72), (6, 8, 16)]
    )
    temperatures = [0.005, 1.0] if options.quick else [0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0]
    engines = ("triton", "triton, tiles", "chunked")
    rows = []
    for engine in engines:
        missing = lacking("triton", True, options.device) if engine.startswith("triton") else None
        for dtype in ("bfloat16", "float32"):
            for loss in parts.matrix.LOSSES:
                for number, label in parts.options_of(loss):
                    arguments = (loss, engine, number, dtype, options.device, sizes, temperatures)
                    rows.append(
                        Row(
                            f"correctness/{loss}/{engine}/{dtype}/{label}",
                            parts.options_row,
                            arguments,
                            options.limit,
                            missing,
                        )
                    )
    return [row for row in rows if row.missing is None] if options.device == "cpu" else rows


def training(options: argparse.Namespace) -> list[Row]:
    missing = lacking("megatron", False, options.device)
    one = ("text", "vision", "audio")
    subsets = [[m for place, m in enumerate(one) if bits >> place & 1] for bits in range(1, 8)]
    chosen = [["text"], ["vision", "audio"]] if options.quick else subsets
    return [
        Row(
            f"training/bfloat16/{'+'.join(s)}",
            parts.training_row,
            (s, options.device),
            2 * options.limit,
            missing,
        )
        for s in chosen
    ]


def workloads(options: argparse.Namespace) -> list[Workload]:
    one = {
        "loss": "infonce",
        "symmetric": True,
        "rows": 65536,
        "dimension": 768,
        "dtype": "bfloat16",
        "temperature": 0.05,
        "data": "random",
    }
    recipe = {**one, "loss": "recipe", "rows": 16384, "data": "trained-like"}
    if options.quick:
        small = {"rows": 64, "dimension": 32, "dtype": "float32"}
        cases = [
            {**recipe, **small},
            {**one, **small},
            {**one, **small, "loss": "sigmoid", "symmetric": False},
        ]
    else:
        cases = [
            recipe,
            one,
            {**one, "symmetric": False},
            {**one, "loss": "sigmoid", "symmetric": False},
            {**one, "dimension": 1536},
            {**recipe, "rows": 65536},
            {**one, "dimension": 3584},
            {**one, "symmetric": False, "dimension": 1536},
            {**one, "dimension": 512},
            {**one, "rows": 8192},
            {**one, "temperature": 0.01, "data": "trained-like", "rows": 16384},
            {**one, "symmetric": False, "dimension": 3584},
        ]
    return [
        Workload(
            case,
            [
                (name, lacking(entry[1], entry[2], options.device))
                for name, entry in parts.table_of(case).items()
            ],
        )
        for case in cases
    ]


def splits(options: argparse.Namespace) -> list[Row]:
    rows = []
    for workload in workloads(options)[:3]:
        for name, missing in workload.contenders:
            if name in ("ours, triton", "ours, chunked"):
                key = workload.key(name).replace("kernels/", "split/", 1)
                rows.append(
                    Row(
                        key,
                        parts.split_row,
                        (name, workload.case, options.device),
                        options.limit,
                        missing,
                    )
                )
    case = workloads(options)[0].case
    return [
        Row(
            f"split/matrix product, {case['dtype']}",
            parts.matrix_rate_row,
            (case, options.device),
            options.limit,
        ),
        *rows,
    ]


def training_steps(options: argparse.Namespace) -> list[Row]:
    missing = lacking("megatron", False, options.device)
    big = {"rows": 2048, "micro_batch": 256, "length": 48}
    shapes = (
        {"quickstart": {"rows": 16, "micro_batch": 8, "length": 6}}
        if options.quick
        else {"quickstart": {**big, "rows": 8192}, "sail": big}
    )
    rows = []
    for shape, settings in shapes.items():
        for name in (
            "sailplan",
            "sailplan, all graphs kept",
            "sentence-transformers",
            "open_clip-style",
        ):
            lacks = missing or (
                lacking("sentence_transformers", False, options.device)
                if name == "sentence-transformers"
                else None
            )
            arguments = (
                name,
                shape,
                {**settings, "dtype": "bfloat16", "rounds": 2 if options.quick else 5},
            )
            rows.append(
                Row(f"steps/{shape}/{name}", parts.step_row, arguments, 2 * options.limit, lacks)
            )
    return rows


def run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    out = Path(options.out)
    log = out.with_suffix(".log")
    out.parent.mkdir(parents=True, exist_ok=True)
    record = Record(
        out,
        header(options, log),
        options.begin_with and Path(options.begin_with),
        options.again == "FAILED",
    )
    jobs = options.jobs or max(
        1, min(12, len(os.sched_getaffinity(0)) - 2 if options.device == "cuda" else 2)
    )
    left, shares, end = 0, 0.0, began + options.seconds + GRACE
    wanted = lambda key: not options.only or any(text in key for text in options.only)  # noqa: E731
    for part in options.parts:
        shares += SHARES[part]
        clock = Clock(
            began + options.seconds * shares / sum(SHARES[name] for name in options.parts), end
        )
        if part == "kernels":
            for workload in workloads(options):
                workload.contenders = [
                    pair for pair in workload.contenders if wanted(workload.key(pair[0]))
                ]
                if clock.over():
                    left += sum(workload.key(name) not in record for name, _ in workload.contenders)
                else:
                    left += run_workload(workload, record, options, clock, log)
            continue
        rows = {
            "correctness": correctness,
            "training": training,
            "split": splits,
            "steps": training_steps,
        }[part](options)
        rows = [row for row in rows if wanted(row.key)]
        left += run_rows(
            rows, record, clock, jobs if part in ("correctness", "training") else 1, log
        )
    rows = record.whole["rows"]
    failed = sum("error" in row for row in rows.values())
    print(
        f"{len(rows)} rows, {failed} of them say why there is no figure, {left} left"
        + (": the same command goes on" if left else "")
    )
    return STOPPED if left else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("run", "table"), default="run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sizes and few rounds: shows that the flow works, measures nothing",
    )
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--from", dest="begin_with", help="an earlier call's file, where --out is not there yet"
    )
    parser.add_argument(
        "--again", choices=("FAILED",), help="forget the rows that say why there is no figure"
    )
    parser.add_argument("--parts", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these texts")
    parser.add_argument("--seconds", type=float, default=510)
    parser.add_argument(
        "--limit", type=float, default=60, help="seconds for an answer of one contender"
    )
    parser.add_argument("--rounds", type=int, help="interleaved rounds (5, quick: 2)")
    parser.add_argument("--jobs", type=int, help="processes at a time where nothing is timed")
    parser.add_argument("--commit")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.quick else 5)
    if options.command == "table":
        print("\n".join(lines(Path(options.out))))
        return 0
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
