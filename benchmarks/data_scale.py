"""Count what a start and a step cost the data plane at 10^2 to 10^5 shards of 10^4 records, and
what finding an id costs.

    python benchmarks/data_scale.py              # table, and benchmarks/results/data_scale.json
    (some minutes, 1 GB of disk)

Shards are links to one, with the manifests that indexing all of them would write: the sizes are
real, the bytes are not. Each row is measured in a forked process of its own, with a warm page
cache. opens: calls of open, as Python's audit hook sees them; read: bytes by read calls, mapped
pages not counted; memory: growth of the resident set, mapped pages included. Figures of CPU are of
a machine that others use, too. An exponent is the slope of log(cost) over log(size), first to last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from sailplan.config.schema import Config, PatternConfig, StageConfig, ViewConfig
from sailplan.data.datasets import open_datasets
from sailplan.data.filling import Progress
from sailplan.data.first_records import check_views
from sailplan.data.id_table import IdTable, write_ids
from sailplan.data.plan import Plan
from sailplan.data.shard_table import id_check, id_hash
from sailplan.data.testing import (
    json_member,
    made_up_config,
    repeat_manifest,
    write_set,
    write_shards,
)
from sailplan.errors import ConfigurationError

RESULTS = Path(__file__).parent / "results" / "data_scale.json"
SHARDS, RECORDS, IDS = (100, 1_000, 10_000, 100_000), 10_000, (100_000, 1_000_000, 10_000_000)
BATCH, LANES, RANKS, STEPS = 8_192, 1_024, 64, 20
_opened: list[str] = []


class Meter:
    """What a piece of work costs: `meter(name, work)` returns its result and keeps the counts."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        sys.addaudithook(
            lambda event, arguments: _opened.append(str(arguments[0])) if event == "open" else None
        )

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        _opened.clear()
        read, memory, began = _read_bytes(), _resident(), time.process_time()
        result = work()
        self.found |= {
            f"{name}: CPU ms": round((time.process_time() - began) * 1e3, 2),
            f"{name}: opens": len([one for one in _opened if not one.startswith("/proc")]),
            f"{name}: read MB": round((_read_bytes() - read) / 1e6, 2),
            f"{name}: memory MB": round(max(0, _resident() - memory) / 1e6, 1),
        }
        return result


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def configuration(root: Path, folder: Path) -> Config:
    config = made_up_config(root, global_batch=BATCH, lanes=LANES, segment=64, window=512)
    config.step.dealing, config.step.token_budget = "lanes", 0
    config.data.sets = {"things": config.data.sets["things"]}
    config.data.sets["things"].shards = str(folder)
    config.order, config.stages = (
        ["first"],
        {
            "first": StageConfig(
                steps=10**6, data={"things": 1.0}, patterns={"things": ["image_title"]}
            )
        },
    )
    return config


def prepare(root: Path, shards: int) -> Path:
    """Make a set of links to the one shard, with both its manifests."""
    folder, names = root / f"set{shards}", [f"s{number:06d}.tar" for number in range(shards)]
    folder.mkdir()
    for number, name in enumerate(names):
        (folder / name).symlink_to(root / "one" / "part-000.tar")
        if not number:
            open_datasets(configuration(root, folder))
    for file in (folder / ".index").glob("*.manifest"):
        repeat_manifest(file, names)
    return folder


def measure_shards(root: Path, folder: Path) -> dict[str, float]:
    """Costs of a start, a resume, steps of one rank, and the checks before a run."""
    meter, config = Meter(), configuration(root, folder)
    reader = meter("open", lambda: open_datasets(config))["things"]
    assert reader.lengths is not None
    plan = meter(
        "plan",
        lambda: Plan(config, "first", config.stages["first"], {"things": 1.0}, {"things": reader}),
    )
    own = np.arange(3, BATCH, RANKS)
    meter("resume at step 900,000", lambda: plan.step(900_000).parts[0].at(own))
    meter.found["resume at step 900,000: loads"] = reader.index.loaded
    loaded = reader.index.loaded
    found = meter("steps", lambda: [plan.step(step).parts[0].at(own) for step in range(STEPS)])
    meter.found["a step of rank 3 of 64: CPU ms"] = round(
        meter.found.pop("steps: CPU ms") / STEPS, 2
    )
    meter.found["a step of rank 3 of 64: loads"] = round((reader.index.loaded - loaded) / STEPS, 1)
    random = np.random.default_rng(0).integers(0, len(reader), 1000)
    meter("1,000 ids at random", lambda: reader.ids(random))
    meter("read a record of its own", lambda: reader.read(int(found[0][0]), media=frozenset()))
    before = reader.lengths.opened
    meter("check of the views", lambda: check_views(config, {"things": reader}))
    config.data.sets["things"].views["title"] = ViewConfig(fields=["titel"])
    config.data.sets["things"].patterns["image_title"] = PatternConfig("image", "title")

    def refused() -> None:
        try:
            check_views(config, {"things": reader})
        except ConfigurationError:
            return
        raise AssertionError("a field that no record has was not noticed")

    meter("check of a field that is missing", refused)
    meter.found["checks of views: tables looked at"] = reader.lengths.opened - before
    return {"records": len(reader), **meter.found}


def measure_ids(root: Path, count: int) -> dict[str, float]:
    """Costs of a sorted table of ids: made, and found in by a process that has not opened it
    before.
    """
    file, meter = root / f"ids{count}", Meter()

    def hashed() -> Iterator[tuple[Any, Any]]:
        for first in range(0, count, RECORDS):
            names = [f"item/{number}" for number in range(first, first + RECORDS)]
            yield (
                np.fromiter(map(id_hash, names), np.uint64, RECORDS),
                np.fromiter(map(id_check, names), np.uint64, RECORDS),
            )

    hashes = time.process_time()
    for _ in hashed():
        pass
    hashes = time.process_time() - hashes
    meter("made", lambda: write_ids(file, count, hashed(), Progress()))
    meter.found["made: CPU ms"] = round(meter.found["made: CPU ms"] - hashes * 1e3, 1)
    table = meter("open", lambda: IdTable(file, count))
    names = [
        f"item/{number}" for number in np.random.default_rng(0).integers(0, count, 200_000).tolist()
    ]
    meter("first 200,000 found", lambda: [table.find(name) for name in names])
    began = time.process_time()
    assert all(table.find(name) == int(name[5:]) for name in names)
    again = (time.process_time() - began) / len(names) * 1e6
    return {**meter.found, "find, pages checked before: us": round(again, 2)}


def measure_worker(file: Path, count: int) -> dict[str, float]:
    """Memory that a further process that finds ids has for itself; the mapped pages of the file
    are one copy for all of a node.
    """

    def private() -> int:
        return (
            sum(
                int(line.split()[1])
                for line in Path("/proc/self/smaps_rollup").read_text().splitlines()
                if line.startswith("Private_Dirty")
            )
            << 10
        )

    before, table = private(), IdTable(file, count)
    for number in np.random.default_rng(1).integers(0, count, 200_000).tolist():
        assert table.find(f"item/{number}") == number
    return {"a further process: MB of its own": round((private() - before) / 1e6, 1)}


def exponents(rows: dict[str, dict[str, float]], sizes: tuple[int, ...]) -> dict[str, float]:
    first, last = rows[str(sizes[0])], rows[str(sizes[-1])]
    span = math.log(sizes[-1] / sizes[0])
    return {
        name: round(math.log(max(last[name], 0.01) / max(first[name], 0.01)) / span, 2)
        for name in first
    }


def _table(title: str, rows: dict[str, dict[str, float]], slopes: dict[str, float]) -> None:
    print(f"\n{title:42s}" + "".join(f"{int(size):>13,}" for size in rows) + f"{'exponent':>10s}")
    for name in slopes:
        print(
            f"{name:42s}"
            + "".join(f"{row[name]:>13,}" for row in rows.values())
            + f"{slopes[name]:>10.2f}"
        )


def isolated(work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Return what work finds in a forked process of its own."""
    with get_context("fork").Pool(1) as pool:
        found = pool.apply(work, arguments)
    print(arguments[-1], json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    measure_all(parser.parse_args().out)


def measure_all(out: Path) -> None:
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_shards(root)
        bodies = [
            {
                "id": f"t/{n}",
                "split": "held_out" if n % 100 == 7 else "train",
                "fields": {"title": f"red {n % 9}"},
            }
            for n in range(RECORDS)
        ]
        pixel = b"\x89PNG"
        write_set(
            root / "one",
            [[json_member(f"{n}", body), (f"{n}.png", pixel)] for n, body in enumerate(bodies)],
            RECORDS,
        )
        os.utime(root / "one" / "part-000.tar", (1e9, 1e9))
        rows = {
            str(shards): isolated(measure_shards, root, prepare(root, shards)) for shards in SHARDS
        }
        ids = {str(count): isolated(measure_ids, root, count) for count in IDS}
        for count in IDS:
            ids[str(count)] |= isolated(measure_worker, root / f"ids{count}", count)
    for name, found, sizes in (("shards", rows, SHARDS), ("ids", ids, IDS)):
        result[name] = {"rows": found, "exponents": exponents(found, sizes)}
        _table(
            f"{name} ({RECORDS:,} records each)" if name == "shards" else name,
            found,
            result[name]["exponents"],
        )
    out.write_text(
        json.dumps(
            {
                "cpus": os.cpu_count(),
                "global_batch": BATCH,
                "lanes": LANES,
                "ranks": RANKS,
                **result,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
