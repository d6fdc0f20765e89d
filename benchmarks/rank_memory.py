"""What benchmarks of memory share: peaks of a rank's phases, and one results file of several sizes
and numbers of ranks, with the table made from it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from documents import fill

from sailplan_kernels.testing import run_ranks

Value = TypeVar("Value")


def memory(name: str) -> int:
    """Return a line of this process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024


def peak_of(work: Callable[[], Value]) -> tuple[Value, dict[str, Any]]:
    """Return what `work` returns, with its peak above what was there before (VmHWM, reset; bytes)
    and its seconds.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before, began = memory("VmRSS"), time.monotonic()
    result = work()
    peak = memory("VmHWM") - before
    return result, {"peak_bytes": peak, "seconds": round(time.monotonic() - began, 1)}


def write(command: str, facts: dict[str, Any], out: Path | None) -> None:
    """Print facts with the command and the machine's; write them where a file is named."""
    machine = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
    }
    text = json.dumps({"command": command} | machine | facts, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


def measure_sizes(
    script: str,
    measure: Callable[..., dict[str, Any]],
    prepare: Callable[[Path, int, int], None],
    table: Callable[[dict[str, Any]], str],
    *,
    mark: str,
    blocks: int,
) -> None:
    """Run `measure(rank, ranks, folder, dimension, blocks)` at each size and number of ranks that
    the command line asks for; or, with --table, fill the document's table from the results file.

    prepare: writes the data of so many records into a folder (records, dimension). blocks: how many
    of queries a rank works through, unless told otherwise.
    """
    parser = argparse.ArgumentParser(description=f"Memory, of benchmarks/{script}.py")
    parser.add_argument("--records", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--blocks", type=int, default=blocks, help="of queries of each rank")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None, help="document to write it into")
    options = parser.parse_args()
    if options.table is not None:
        results = Path(__file__).parent / "results" / f"{script}.json"
        fill(options.table, mark, table(json.loads(results.read_text())))
        return
    sizes: dict[str, Any] = {}
    for records in options.records:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            prepare(root, records, options.dimension)
            arguments = (root, options.dimension, options.blocks)
            sizes[str(records)] = {
                str(ranks): run_ranks(measure, ranks, *arguments, timeout=3000)
                for ranks in options.ranks
            }
    given = {"records": options.records, "ranks": options.ranks, "blocks": [options.blocks]}
    flags = "".join(f" --{name} {' '.join(map(str, each))}" for name, each in given.items())
    facts = {"dimension": options.dimension, "blocks": options.blocks, "sizes": sizes}
    write(f"python benchmarks/{script}.py{flags}", facts, options.out)


def peaks_table(
    result: dict[str, Any],
    phases: tuple[str, ...],
    column: str,
    cell: Callable[[int, list[dict[str, Any]]], str],
    of_seconds: str = "",
) -> str:
    """Return Markdown: of each phase the largest peak of any rank.

    column, cell: what stands beside the ranks, from the records and the ranks' findings.
    """
    names = " | ".join(f"{name}, MB" for name in phases)
    lines = [f"| records | ranks | {column} | {names} | s |", "|" + "---|" * (len(phases) + 4)]
    for records, at in result["sizes"].items():
        for ranks, found in at.items():
            peaks = [max(rank[name]["peak_bytes"] for rank in found) / 1e6 for name in phases]
            seconds = sum(found[0][name]["seconds"] for name in phases)
            cells = [f"{int(records):,}", ranks, cell(int(records), found)]
            cells += [f"{peak:.1f}" for peak in peaks] + [f"{seconds:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    note = (
        f"Peak above what a rank had before the phase, of {result['dimension']} float32 numbers a "
        f"vector; seconds {of_seconds}on {result['cores']} cores that other work shared (load "
        f"average {result['load_average']}). `{result['command']}`"
    )
    return "\n".join([*lines, "", note])
