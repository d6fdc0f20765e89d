"""Memory of evaluating a retrieval: what each rank needs above the model, at 1, 2 and 4 ranks.

The pairs and the encoder of `store_memory`: all records are queries, and all of their targets are
candidates. Embeds both sides, finds who belongs to whom, and ranks the first blocks of queries of
each rank against all candidates (a block needs the same memory whichever it is). The peak is the
kernel's (VmHWM, reset after a warm-up), pages of mapped files included.

    python benchmarks/evaluation_memory.py [--records 50000 200000] [--ranks 1 2 4] [--blocks 1] [--out FILE]
    python benchmarks/evaluation_memory.py --table docs/evaluation.md      # its table, from the results
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rank_memory import Value, measure_sizes, peak_of, peaks_table
from store_memory import BagEncoder, configuration, write_set

from sailplan.config.schema import EvaluationTask
from sailplan.data.datasets import open_datasets
from sailplan.embed.context import RunContext
from sailplan.evaluate import metrics
from sailplan.evaluate.retrieval_task import prepare
from sailplan.evaluate.runner import Runner
from sailplan.model.testing import join_layout

PHASES = ("embed and relate", "rank")


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
        result, found[name] = peak_of(work)
        return result

    one = runner("store")
    sides = phase("embed and relate", lambda: prepare(reader, task, "retrieval", one.embedder))
    result = phase("rank", lambda: one._retrieval(task, reader, sides))
    assert result["candidates"] == len(reader)
    return found


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""

    def vectors(records: int, _: list[dict[str, Any]]) -> str:
        return f"{2 * records * result['dimension'] * 4 / 1e6:.0f}"

    blocks = f"with {result['blocks']} block of 1,024 queries a rank, "
    return peaks_table(result, PHASES, "both sides' vectors, MB", vectors, blocks)


if __name__ == "__main__":
    measure_sizes(
        "evaluation_memory", measure, write_set, table, mark="evaluation-memory", blocks=1
    )
