"""How long the artifact `interests` takes from a log of timed events, and what each rank holds.

    python benchmarks/histories.py --users 1000000 --per-user 50 --items 100000 --ranks 1 2

Writes a made-up log of parquet files (popular items, four labels, 10 % of events without a positive
one), then makes the sequences of all four views on forked gloo ranks, as a stage's start does, with
made-up content vectors. Prints JSON: of each number of ranks the seconds and CPU seconds, the
highest memory of each rank above what it had at its start, sequences and their bytes; --out keeps
it, --table writes its table into a document.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from documents import fill
from rank_memory import write

from sailplan.config.schema import DatasetConfig, ViewConfig
from sailplan.curriculum.timed import make_timed_interests
from sailplan.data.config import InterestsConfig
from sailplan.data.index import ShardIndex
from sailplan.data.reader import RecordReader
from sailplan.data.writer import Record, write_shards
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import run_ranks

LABELS = ["like", "share", "finish", "save"]
RESULTS = Path(__file__).parent / "results" / "histories.json"
SIZES = ("users", "per_user", "items", "dimension", "files")


def write_log(folder: Path, users: int, events: int, items: int, files: int) -> int:
    """Write users * events rows in order of time, users mixed; return the log's bytes."""
    folder.mkdir(parents=True)
    random, total = np.random.default_rng(0), users * events
    names = pa.array([f"items/{number:08d}" for number in range(items)])
    for part in range(files):
        rows = total * (part + 1) // files - total * part // files
        popular = (items * random.random(rows) ** 2).astype(np.int64)
        flags = random.random((rows, len(LABELS))) < np.array([0.5, 0.25, 0.6, 0.2])
        flags[random.random(rows) < 0.1] = False
        offsets = np.concatenate([[0], np.cumsum(flags.sum(1))]).astype(np.int32)
        labels = pa.DictionaryArray.from_arrays(np.nonzero(flags)[1].astype(np.int32), LABELS).cast(
            pa.string()
        )
        table = {
            "user": pa.array(random.integers(0, users, rows)).cast(pa.string()),
            "item": names.take(pa.array(popular)),
            "time": pa.array(np.sort(random.integers(0, 10**9, rows)) + part * 10**9),
            "labels": pa.ListArray.from_arrays(pa.array(offsets), labels),
        }
        pq.write_table(
            pa.table(table), folder / f"events-{part:05d}.parquet", row_group_size=1 << 20
        )
    return sum(path.stat().st_size for path in folder.iterdir())


def peak() -> int:
    """Return the process's highest resident memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--per-user", type=int, default=50, help="events of a user, on average")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument(
        "--folder", default=None, help="where to write (default: a temporary folder)"
    )
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None, help="document to write it into")
    options = parser.parse_args()
    if options.table is not None:
        fill(options.table, "histories", table(json.loads(RESULTS.read_text())))
        return
    sizes = {name: getattr(options, name) for name in SIZES}
    facts: dict[str, Any] = {**sizes, "rows": {}}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory(dir=options.folder) as place:
            facts["rows"][str(ranks)] = measure(Path(place), options, ranks)
    flags = "".join(f" --{name.replace('_', '-')} {size}" for name, size in sizes.items())
    command = f"python benchmarks/histories.py{flags} --ranks {' '.join(map(str, options.ranks))}"
    write(command, facts, options.out)


def measure(root: Path, options: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Write a log into a folder and make its sequences; return what they took and what they are."""
    write_shards(
        [
            Record({"id": f"items/{number:08d}", "fields": {"title": {"en": "a"}}})
            for number in range(options.items)
        ],
        root / "items",
        "items",
        10_000,
    )
    log_bytes = write_log(
        root / "log", options.users, options.per_user, options.items, options.files
    )
    items = RecordReader(
        "items",
        DatasetConfig(views={"title": ViewConfig(fields=["title"])}),
        ShardIndex(sorted((root / "items").glob("*.tar"))),
    )
    np.save(root / "vectors.npy", _vectors(options.items, options.dimension))
    dataset = DatasetConfig(
        shards="artifact:interests",
        kind="sequences",
        catalogue="items",
        interests=InterestsConfig(str(root / "log"), positive=LABELS),
    )

    def work(rank: int, world_size: int) -> tuple[dict[str, Any], float, float, int]:
        vectors, parallel = np.load(root / "vectors.npy", mmap_mode="r"), join_layout(1)
        before, began, busy = peak(), time.monotonic(), time.process_time()
        stats = make_timed_interests(
            parallel,
            "sequences",
            dataset,
            items,
            root / "made",
            lambda used: lambda places: np.asarray(vectors[places]),
        )
        return stats, time.monotonic() - began, time.process_time() - busy, peak() - before

    found = run_ranks(work, ranks, timeout=3600)
    made = sorted((root / "made").glob("*.tar"))
    digest = hashlib.sha256()
    for path in made:
        digest.update(path.read_bytes())
    return {
        "log_bytes": log_bytes,
        "seconds": round(max(one[1] for one in found), 1),
        "cpu_seconds_of_ranks": [round(one[2], 1) for one in found],
        "peak_bytes_of_ranks": [one[3] for one in found],
        "shards": len(made),
        "bytes": sum(path.stat().st_size for path in made),
        "sha256": digest.hexdigest(),
        **found[0][0],
    }


def table(result: dict[str, Any]) -> str:
    """Return Markdown: seconds and memory at each number of ranks."""
    lines = ["| ranks | s | CPU s of a rank | peak of a rank, MB | sequences | bytes |"]
    lines.append("|" + "---|" * 6)
    for ranks, row in result["rows"].items():
        cells = [ranks, f"{row['seconds']:.0f}", f"{max(row['cpu_seconds_of_ranks']):.0f}"]
        cells += [f"{max(row['peak_bytes_of_ranks']) / 1e6:.0f}", f"{row['sequences']:,}"]
        lines.append("| " + " | ".join([*cells, f"{row['bytes']:,}"]) + " |")
    digests = {row.get("sha256") for row in result["rows"].values()}
    words = "the same bytes" if len(digests) == 1 else "OTHER BYTES"
    same = "" if None in digests else f"; {words} at each number of ranks"
    load = result["load_average"]
    note = (
        f"{result['users']:,} users x {result['per_user']} events; peak above what a rank had "
        f"before{same}. {result['cores']} cores, "
        f"{'beside other work' if load is None else f'load average {load}'}. `{result['command']}`"
    )
    return "\n".join([*lines, "", note])


def _vectors(items: int, dimension: int) -> np.ndarray:
    vectors = np.random.default_rng(1).standard_normal((items, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
