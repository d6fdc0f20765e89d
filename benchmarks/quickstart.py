"""Three seeds of the quick start: runs them, gathers what was measured, and writes the README's
table from the file.

    python benchmarks/quickstart.py run --seeds 0 1 2 --out benchmarks/results/quickstart.json
    python benchmarks/quickstart.py words
    python benchmarks/quickstart.py table --results benchmarks/results/quickstart.json --readme
    README.md

`run` leaves finished run folders alone (runs/quickstart-seed-N), so that an interrupted series goes
on. Numbers in the table are means over the seeds with the lowest and highest seed; nothing is typed
by hand. `words` counts which held-out emoji names share words with training.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from documents import fill

# (task, metric, what the table calls it)
ROWS = [
    ("emoji_image_to_name", "recall@10", "emoji picture -> name, R@10"),
    ("emoji_keyword_to_image", "recall@10", "unseen keyword -> emoji, R@10 of 1,899"),
    ("emoji_subgroups", "nmi", "emoji subgroups, NMI"),
    ("emoji_pair_order", "kendall", "graded emoji pairs, Kendall tau"),
    ("icon_choice", "recall@10", "text -> chosen icon, R@10 of 7,188"),
    ("speech_to_transcript", "recall@10", "speech -> transcript, R@10"),
    ("set_completion", "recall@10", "set completion, R@10 of 7,188"),
    ("set_completion", "content_mean/recall@10", "  baseline: mean of the items' content vectors"),
    ("set_completion", "popularity/recall@10", "  baseline: popularity"),
]
# What a model knows before it has seen a history: in the collaborative stages' columns stands the
# stage before them.
CONTENT_ONLY, LAST_CONTENT_STAGE = "content_mean/recall@10", "hard"


def train(seed: int, runs: Path) -> Path:
    name = f"quickstart-seed-{seed}"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "sailplan.runtime.torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "sailplan",
        "train",
    ]
    subprocess.run(
        [
            *command,
            "experiment=quickstart",
            f"seed={seed}",
            f"name={name}",
            f"runs={runs}",
            "resume=auto",
        ],
        check=True,
    )
    return runs / name


def gather(folder: Path) -> dict[str, Any]:
    """What a finished run folder says: evaluations per stage, seconds per stage."""
    evaluations = [
        json.loads(path.read_text()) for path in sorted((folder / "evaluation").glob("step-*.json"))
    ]
    stages = json.loads((folder / "stages.json").read_text())
    config_hash = (folder / "config.yaml").read_text().splitlines()[0].split(":")[1].strip()
    return {
        "config_hash": config_hash,
        "stages": [
            {"name": stage["name"], "seconds": stage["seconds"], "last_step": stage["last_step"]}
            for stage in stages
        ],
        "tasks": {one["stage"]: one["tasks"] for one in evaluations},
    }


def run(options: argparse.Namespace) -> None:
    found = {str(seed): gather(train(seed, Path(options.runs))) for seed in options.seeds}
    record = {
        "what": "make quickstart, all five stages, two ranks",
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("torch", "megatron-core", "numpy", "scikit-learn")
        },
        "seeds": found,
    }
    Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


def table(record: dict[str, Any]) -> str:
    """The README's table in Markdown."""
    seeds = list(record["seeds"].values())
    stages = [stage["name"] for stage in seeds[0]["stages"]]
    lines = [
        "| held-out task | " + " | ".join(f"after {name}" for name in stages) + " |",
        "|---|" + "---|" * len(stages),
    ]
    for task, metric, label in ROWS:
        cells = []
        for stage in stages:
            if metric == CONTENT_ONLY and stages.index(stage) > stages.index(LAST_CONTENT_STAGE):
                stage = LAST_CONTENT_STAGE
            values = [
                seed["tasks"][stage][task][metric]
                for seed in seeds
                if task in seed["tasks"].get(stage, {})
            ]
            scale = 100.0 if "recall" in metric else 1.0
            digits = 1 if scale == 100.0 else 3
            mean = scale * sum(values) / len(values)
            cells.append(
                f"{mean:.{digits}f} "
                f"({scale * min(values):.{digits}f}-{scale * max(values):.{digits}f})"
                if values
                else "-"
            )
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    first = seeds[0]["tasks"][stages[0]]
    chance = 1000 / first["emoji_image_to_name"]["candidates"]
    speech = 1000 / first["speech_to_transcript"]["candidates"]
    minutes = sorted(sum(stage["seconds"] for stage in seed["stages"]) / 60 for seed in seeds)
    lines += [
        "",
        f"Means of {len(seeds)} seeds (lowest-highest), {record['date']}, {record['device']}, "
        f"torch {record['versions']['torch']}; R@10 in percent. "
        f"Chance at R@10: emoji names {chance:.1f}, speech {speech:.1f}. "
        f"Stages took {minutes[0]:.1f}-{minutes[-1]:.1f} minutes a run, start and report not "
        "counted. "
        "Made by `benchmarks/quickstart.py table` from [the "
        "results](benchmarks/results/quickstart.json).",
    ]
    return "\n".join(lines)


def write_table(options: argparse.Namespace) -> None:
    found = table(json.loads(Path(options.results).read_text()))
    fill(Path(options.readme), "results", found)


def count_words(_: argparse.Namespace) -> None:
    """How many held-out emoji names have no, some or only words that occur in an English name or
    keyword of training.
    """
    from sailplan.config.compose import compose
    from sailplan.data.datasets import open_datasets

    reader = open_datasets(compose(["experiment=quickstart"]), names=["emoji"])["emoji"]
    bodies = {
        split: [reader.body(int(place)) for place in reader.positions(split)]
        for split in ("train", "held_out")
    }
    known = {
        word
        for body in bodies["train"]
        for text in (body["fields"]["title"]["en"], *body["fields"]["tags"].get("en", []))
        for word in words(text)
    }
    found = {"none": 0, "some": 0, "all": 0}
    for body in bodies["held_out"]:
        own = words(body["fields"]["title"]["en"])
        number = sum(word in known for word in own)
        found["none" if number == 0 else "all" if number == len(own) else "some"] += 1
    print(
        json.dumps({"held_out_names": len(bodies["held_out"]), "words_known_from_training": found})
    )


def words(text: str) -> list[str]:
    return re.findall(r"[^\s:,]+", text.casefold())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    runner.add_argument("--runs", default="runs")
    runner.add_argument("--out", default="benchmarks/results/quickstart.json")
    writer = commands.add_parser("table")
    writer.add_argument("--results", default="benchmarks/results/quickstart.json")
    writer.add_argument("--readme", default="README.md")
    commands.add_parser("words")
    options = parser.parse_args()
    {"run": run, "table": write_table, "words": count_words}[options.command](options)


if __name__ == "__main__":
    main()
