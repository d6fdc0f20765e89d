"""experiment=pretrained beside the quick start: runs its seeds, gathers what was measured, and
writes the README's table from the files.

    python benchmarks/pretrained.py run --seeds 0 1 2 [--runs runs] [--out
    benchmarks/results/pretrained.json] python benchmarks/pretrained.py table [--results
    benchmarks/results/pretrained.json] [--readme README.md]

`run` goes on with run folders that are there (RUNS/pretrained-seed-N). From scratch are the quick
start's seeds after its content stages, from benchmarks/results/quickstart.json. Nothing is typed by
hand: the table says how many seeds each column has.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from documents import fill

ROWS = [
    ("emoji_image_to_name", "emoji picture -> name, R@10 of 192"),
    ("emoji_keyword_to_image", "unseen keyword -> emoji picture, R@10 of 1,899"),
]
METRIC, SCRATCH_STAGE = "recall@10", "hard"  # the quick start's last stage of content
SCRATCH = Path(__file__).resolve().parent / "results" / "quickstart.json"


def train(seed: int, runs: Path) -> Path:
    name = f"pretrained-seed-{seed}"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "sailplan",
        "train",
        "experiment=pretrained",
        f"seed={seed}",
        f"name={name}",
        f"runs={runs}",
    ]
    subprocess.run([*command, "resume=auto"], check=True)
    return runs / name


def gather(folder: Path) -> dict[str, Any]:
    """Return what the run's last evaluation says, and its seconds."""
    last = json.loads(max((folder / "evaluation").glob("step-*.json")).read_text(encoding="utf-8"))
    stages = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    return {
        "step": last["step"],
        "tasks": last["tasks"],
        "seconds": round(sum(stage["seconds"] for stage in stages), 1),
    }


def run(options: argparse.Namespace) -> None:
    record = {
        "what": "experiment=pretrained: frozen MiniLM and EfficientNet-Lite0, trained projections, one rank",
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "seeds": {str(seed): gather(train(seed, Path(options.runs))) for seed in options.seeds},
    }
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(record: dict[str, Any], scratch: dict[str, Any]) -> str:
    """Return the README's table in Markdown."""
    columns = {
        f"from scratch, {len(scratch['seeds'])} seeds": [
            seed["tasks"][SCRATCH_STAGE] for seed in scratch["seeds"].values()
        ],
        f"published, projections trained, {len(record['seeds'])} seed{'s' * (len(record['seeds']) > 1)}": [
            seed["tasks"] for seed in record["seeds"].values()
        ],
    }
    lines = ["| held-out task | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for task, label in ROWS:
        values = [[100 * tasks[task][METRIC] for tasks in seeds] for seeds in columns.values()]
        cells = [
            f"{sum(found) / len(found):.1f} ({min(found):.1f}-{max(found):.1f})" for found in values
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    steps = sorted({seed["step"] for seed in record["seeds"].values()})
    said = f"Means of the seeds (lowest-highest), in percent; {', '.join(map(str, steps))} steps, {record['date']}, {record['device']}."
    return "\n".join(
        [
            *lines,
            "",
            f"{said} Made by `benchmarks/pretrained.py table` from [the "
            "results](benchmarks/results/pretrained.json).",
        ]
    )


def write_table(options: argparse.Namespace) -> None:
    made = table(
        json.loads(Path(options.results).read_text(encoding="utf-8")),
        json.loads(SCRATCH.read_text(encoding="utf-8")),
    )
    fill(Path(options.readme), "pretrained", made)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    runner.add_argument("--runs", default="runs")
    runner.add_argument("--out", default="benchmarks/results/pretrained.json")
    writer = commands.add_parser("table")
    writer.add_argument("--results", default="benchmarks/results/pretrained.json")
    writer.add_argument("--readme", default="README.md")
    options = parser.parse_args()
    {"run": run, "table": write_table}[options.command](options)


if __name__ == "__main__":
    main()
