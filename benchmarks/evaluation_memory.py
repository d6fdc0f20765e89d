"""Memory of evaluating a retrieval: what each rank needs above the model, at 1, 2 and 4 ranks.

The pairs and the encoder of `store_memory`: all records are queries, and all of their targets are
candidates. Embeds both sides, finds who belongs to whom, and ranks the first blocks of queries of
each rank against all candidates (a block needs the same memory whichever it is). The peak is the
kernel's (VmHWM, reset after a warm-up), pages of mapped files included.

    python benchmarks/evaluation_memory.py [--records 50000 200000] [--ranks 1 2 4] [--blocks 1] [--out FILE]
    python benchmarks/evaluation_memory.py --table docs/evaluation.md      # its table, from the results
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from documents import fill
from store_memory import BagEncoder, configuration, memory, write_pairs

from sailplan.config.schema import EvaluationTask
from sailplan.data.datasets import open_datasets
from sailplan.embed.context import RunContext
from sailplan.evaluate import metrics
from sailplan.evaluate.retrieval_task import prepare
from sailplan.evaluate.runner import Runner
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import run_ranks

RESULTS = Path(__file__).parent / "results" / "evaluation_memory.json"
PHASES = ("embed and relate", "rank")
Value = TypeVar("Value")


def first_blocks(blocks: int) -> None:
    """Let rankings end after so many blocks of queries of each rank."""
    whole = metrics.tiles

    def few(*arguments: Any) -> Iterator[Any]:
        seen: dict[int, None] = {}
        for tile in whole(*arguments):
            seen[tile[0].start] = None
            if len(seen) > blocks:
                return
            yield tile

    metrics.tiles = few  # type: ignore[assignment]


def measure(rank: int, world_size: int, root: Path, dimension: int, blocks: int) -> dict[str, Any]:
    """Return peaks and seconds of this rank's phases."""
    torch.set_num_threads(1)
    first_blocks(blocks)
    config, parallel = configuration(root, dimension), join_layout(1)
    reader, encoder = open_datasets(config)["pairs"], BagEncoder(config.model)
    work = root / f"work-{world_size}"
    task = EvaluationTask("pairs", query="query", target="target", split="train")

    def runner(folder: str) -> Runner:
        context = RunContext(config, parallel, encoder, {}, {"pairs": reader}, work / folder)
        return Runner(context)

    runner("warm").embedder.table(reader, "query", np.arange(2000))
    rows = torch.ones(1024, dimension, dtype=torch.float64)
    rows @ rows.T  # a product's own buffers
    found: dict[str, Any] = {}

    def phase(name: str, work: Callable[[], Value]) -> Value:
        Path("/proc/self/clear_refs").write_text("5")
        before, began = memory("VmRSS"), time.monotonic()
        result = work()
        found[name] = {
            "peak_bytes": memory("VmHWM") - before,
            "seconds": round(time.monotonic() - began, 1),
        }
        return result

    one = runner("store")
    sides = phase("embed and relate", lambda: prepare(reader, task, "retrieval", one.embedder))
    result = phase("rank", lambda: one._retrieval(task, reader, sides))
    assert result["candidates"] == len(reader)
    return found


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown: of each phase the largest peak of any rank."""
    names = " | ".join(f"{name}, MB" for name in PHASES)
    lines = [f"| records | ranks | both sides' vectors, MB | {names} | s |"]
    lines.append("|" + "---|" * (len(PHASES) + 4))
    for records, at in result["sizes"].items():
        for ranks, found in at.items():
            peaks = [max(rank[name]["peak_bytes"] for rank in found) / 1e6 for name in PHASES]
            seconds = sum(found[0][name]["seconds"] for name in PHASES)
            vectors = 2 * int(records) * result["dimension"] * 4 / 1e6
            cells = [f"{int(records):,}", ranks, f"{vectors:.0f}"]
            cells += [f"{peak:.1f}" for peak in peaks] + [f"{seconds:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    note = (
        f"Peak above what a rank had before the phase, of {result['dimension']} float32 numbers a "
        f"vector; seconds with {result['blocks']} block of 1,024 queries a rank, on "
        f"{result['cores']} cores that other work shared (load average {result['load_average']}). "
        f"`{result['command']}`"
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--blocks", type=int, default=1, help="of queries that a rank ranks")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None, help="document to write it into")
    options = parser.parse_args()
    if options.table is not None:
        fill(options.table, "evaluation-memory", table(json.loads(RESULTS.read_text())))
        return
    sizes: dict[str, Any] = {}
    for records in options.records:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_pairs(root / "pairs", records)
            open_datasets(configuration(root, options.dimension))
            arguments = (root, options.dimension, options.blocks)
            sizes[str(records)] = {
                str(ranks): run_ranks(measure, ranks, *arguments, timeout=3000)
                for ranks in options.ranks
            }
    given = {"records": options.records, "ranks": options.ranks, "blocks": [options.blocks]}
    flags = "".join(f" --{name} {' '.join(map(str, each))}" for name, each in given.items())
    result = {
        "command": f"python benchmarks/evaluation_memory.py{flags}",
        "dimension": options.dimension,
        "blocks": options.blocks,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "sizes": sizes,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
