"""Time and memory of semantic IDs: code books over made-up vectors, and the codes of all of them.

The vectors lie in groups with noise, and their groups are their labels. Each rank is one thread. The
peak is the kernel's (VmHWM), above what the process had when it began.

    python benchmarks/semantic_ids.py [--rows 1000000] [--dimension 64] [--ranks 1 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rank_memory import memory, peak_of, write

from sailplan.export.semantic_ids import semantic_ids
from sailplan.export.vector_folder import MANIFEST, embeddings_file, ids_file, labels_file
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import run_ranks

SHARD, GROUPS, NOISE = 65_536, 1000, 0.8


def write_vectors(folder: Path, rows: int, dimension: int) -> None:
    """Write a folder of vectors as `sailplan embed` does."""
    random, shards = np.random.default_rng(0), []
    centres = random.standard_normal((GROUPS, dimension)).astype(np.float32)
    folder.mkdir()
    for number, start in enumerate(range(0, rows, SHARD)):
        count = min(SHARD, rows - start)
        labels = random.integers(0, GROUPS, count)
        noise = random.standard_normal((count, dimension)).astype(np.float32)
        vectors = centres[labels] + np.float32(NOISE) * noise
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        np.save(folder / embeddings_file(number), vectors)
        names = "".join(f"{start + row}\n" for row in range(count))
        (folder / ids_file(number)).write_text(names)
        (folder / labels_file(number)).write_text("".join(f"{label}\n" for label in labels))
        shards.append({"rows": count})
    about = {"dimensions": dimension, "rows": rows, "label": "group", "shards": shards}
    (folder / MANIFEST).write_text(json.dumps(about))


def measure(
    rank: int, world_size: int, vectors: Path, out: Path, sizes: list[list[int]]
) -> dict[str, Any]:
    torch.set_num_threads(1)
    parallel = join_layout(1)
    used = time.process_time()
    found, costs = peak_of(lambda: semantic_ids(parallel, vectors, out, sizes=sizes))
    return costs | {
        "process_bytes": memory("VmHWM"),
        "cpu_seconds": round(time.process_time() - used, 1),
        "statistics": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 256, 256])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    ranks: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        vectors = Path(folder) / "vectors"
        write_vectors(vectors, options.rows, options.dimension)
        for world_size in options.ranks:
            out = Path(folder) / f"at-{world_size}"
            arguments = (vectors, out, [options.sizes])
            ranks[str(world_size)] = run_ranks(measure, world_size, *arguments, timeout=3000)
    found = [rank.pop("statistics") for each in ranks.values() for rank in each]
    facts = {
        "rows": options.rows,
        "dimension": options.dimension,
        "same_at_all_ranks": all(each == found[0] for each in found),
        "ranks": ranks,
        "statistics": found[0],
    }
    write("python benchmarks/semantic_ids.py --ranks " + " ".join(ranks), facts, options.out)


if __name__ == "__main__":
    main()
