"""Our loss beside plain torch at every size of a batch, on a CPU: the same masks, one process,
turn by turn.

    python benchmarks/loss_sizes.py --out benchmarks/results/loss_sizes_cpu.json --table docs/performance.md

A step is forward and backward from raw float32 embeddings to their gradients. Plain torch is what
one writes first: normalise, multiply, fill what is masked, cross entropy, autograd. "recipe" is
symmetric with ids, three prefixes and hard negatives of each row; ids and masks are given. Before a
pair is timed, its losses and gradients are compared. Seconds are of the processor (median of
turns), as a clock also counts who else computes; the ratio is plain torch's over ours, above 1
where ours is ahead.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from documents import fill
from torch import Tensor

from sailplan_kernels import infonce
from sailplan_kernels.arguments import grouped

SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DIMENSION, HARD, TEMPERATURE, PREFIXES = 768, 4, 0.05, (192, 384, 768)
KINDS = ("rows", "symmetric", "recipe")
LARGEST_RECIPE = 4096  # plain torch keeps some twenty matrices of scores
Case = dict[str, Any]


def case_of(kind: str, rows: int) -> Case:
    """Arguments of ``infonce``; vectors want their gradient."""
    g = torch.Generator().manual_seed(0)
    queries = torch.randn(rows, DIMENSION, generator=g)
    case: Case = {
        "queries": queries,
        "keys": queries + 6 * torch.randn(rows, DIMENSION, generator=g),
    }
    if kind != "rows":
        case["symmetric"] = True
    if kind == "recipe":
        ids = torch.randint(0, 4 * rows, (rows,), generator=g)
        case |= {
            "query_ids": ids,
            "key_query_ids": ids,
            "key_ids": torch.randint(0, 4 * rows, (rows,), generator=g),
            "prefixes": PREFIXES,
        }
        case["hard_negatives"] = torch.randn(rows, HARD, DIMENSION, generator=g)
    return {
        name: x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in case.items()
    }


def ours(case: Case) -> Tensor:
    return infonce(**grouped(case | {"temperature": TEMPERATURE, "backend": "chunked"})).loss


def plain(case: Case) -> Tensor:
    """The same loss with whole matrices and autograd."""
    queries, keys, hard, rows = (
        case["queries"],
        case["keys"],
        case.get("hard_negatives"),
        len(case["queries"]),
    )
    target, masked, total = torch.arange(rows), None, queries.new_zeros(())
    if "key_ids" in case:
        masked = (case["key_ids"][:, None] == case["key_ids"]) | (
            case["query_ids"][:, None] == case["key_query_ids"]
        )
        masked.fill_diagonal_(False)
    for prefix in case.get("prefixes") or (DIMENSION,):
        q, k = F.normalize(queries[:, :prefix], dim=1), F.normalize(keys[:, :prefix], dim=1)
        logits = q @ k.T / TEMPERATURE
        if masked is not None:
            logits = logits.masked_fill(masked, -torch.inf)
        wide = logits
        if hard is not None:
            own = (q[:, None] * F.normalize(hard[..., :prefix], dim=-1)).sum(-1) / TEMPERATURE
            wide = torch.cat([logits, own], 1)
        loss = F.cross_entropy(wide, target)
        total = total + (
            (loss + F.cross_entropy(logits.T, target)) / 2 if case.get("symmetric") else loss
        )
    return total


def leaves(case: Case) -> list[Tensor]:
    return [x for x in case.values() if isinstance(x, Tensor) and x.requires_grad]


def step(loss: Callable[[Case], Tensor], case: Case) -> float:
    """Seconds of the processor."""
    for x in leaves(case):
        x.grad = None
    began = time.process_time()
    loss(case).backward()
    return time.process_time() - began


def difference(case: Case) -> float:
    """Of the two gradients, relative; raises where they are no roundings of one another."""
    found = []
    for loss in (ours, plain):
        step(loss, case)
        found.append(torch.cat([x.grad.flatten() for x in leaves(case) if x.grad is not None]))
    error = float((found[0] - found[1]).norm() / found[1].norm())
    if not error < 1e-4:
        raise RuntimeError(
            f"gradients: found a relative difference of {error:.1e}, expected at most 1e-4"
        )
    return error


def measure(kind: str, rows: int, seconds: float) -> Case:
    """Turns of both, at least three, for about so many seconds."""
    case = case_of(kind, rows)
    error, times, began = difference(case), {"ours": [], "plain": []}, time.monotonic()  # type: ignore[var-annotated]
    while len(times["ours"]) < 3 or time.monotonic() - began < seconds:
        times["ours"].append(step(ours, case))
        times["plain"].append(step(plain, case))
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratio = statistics.median([b / a for a, b in zip(times["ours"], times["plain"], strict=True)])
    return {
        "kind": kind,
        "rows": rows,
        **middle,
        "ratio": ratio,
        "turns": len(times["ours"]),
        "difference": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--table", help="document whose table is written anew")
    parser.add_argument(
        "--measured", action="store_true", help="make the table from --out, measure nothing"
    )
    parser.add_argument("--seconds", type=float, default=4, help="of each size and kind")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    options = parser.parse_args()
    if not options.measured:
        measure_all(options)
    if options.table:
        record = json.loads(Path(options.out).read_text())
        fill(Path(options.table), "loss-sizes", table(record))


def table(record: Case) -> str:
    """The ratios, a line a size."""
    ratios = {(row["kind"], row["rows"]): row["ratio"] for row in record["rows"]}
    lines = [f"| batch | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|"]
    for rows in sorted({rows for _, rows in ratios}):
        found = [ratios.get((kind, rows)) for kind in KINDS]
        cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in found]
        lines.append(f"| {rows:,} | {' | '.join(cells)} |")
    said = f"{record['date']}, {record['device']}, torch {record['torch']}, load {record['load_average']:.1f}"
    return "\n".join([*lines, "", f"Measured {said}."])


def measure_all(options: argparse.Namespace) -> None:
    """Write the results file and print it."""
    torch.set_num_threads(1)
    found = [
        measure(kind, rows, options.seconds)
        for kind in KINDS
        for rows in options.sizes
        if kind != "recipe" or rows <= LARGEST_RECIPE
    ]
    record = {
        "what": "processor seconds of a step of the loss, and plain torch's over ours",
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {len(os.sched_getaffinity(0))} cores, {platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
        "rows": found,
    }
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    print("| loss | rows | ours, ms | plain torch, ms | plain / ours |\n|---|---|---|---|---|")
    for row in found:
        print(
            f"| {row['kind']} | {row['rows']:,} | {row['ours'] * 1e3:.3g} | "
            f"{row['plain'] * 1e3:.3g} | {row['ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
