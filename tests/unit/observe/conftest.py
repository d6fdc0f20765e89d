"""A made-up run folder with every part that a report can show."""

from __future__ import annotations

import base64
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

HOSTILE = "<script>alert('x')</script> & \"quotes\""
STAGES = [
    ("diverse", 120, ["emoji", "icons", "prompts"]),
    ("nearest", 80, ["emoji", "icons"]),
    ("hard", 60, ["emoji"]),
    ("seq2item", 40, ["icon_sequences"]),
]


def picture(number: int) -> str:
    """A small drawing as an inline image."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.ellipse(
        (6, 6, 58, 58), fill=((number * 67) % 256, (number * 131) % 256, (number * 29) % 256, 255)
    )
    draw.text((24, 24), str(number), fill="white")
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP")
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def item(number: int, **more: Any) -> dict[str, Any]:
    return {"text": f"drawing {number}", "image": picture(number), **more}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "# hash: 0123456789abcdef\nname: made-up\nseed: 7\nglobal_batch: 256\n"
    )
    chance, first, stages, lines = random.Random(0), 1, [], []
    for name, steps, sets in STAGES:
        share = {dataset: 1.0 / (1 + position) for position, dataset in enumerate(sets)}
        total = sum(share.values())
        objectives = {"seq2item": 1.0} if name == "seq2item" else {"infonce": 1.0, "micl": 0.1}
        entry = {
            "name": name,
            "first_step": first,
            "last_step": first + steps - 1,
            "seconds": steps * 0.9,
            "data": sets,
            "objectives": objectives,
        }
        stages.append(
            {
                **entry,
                "weights": {key: value / total for key, value in share.items()},
                "learning_rate": [1e-3, 1e-4],
                "world_size": 2,
            }
        )
        for step in range(first, first + steps):
            loss = (
                1.2
                + 4.5 * math.exp(-(step - first) / 40) * (0.6 if first > 1 else 1.0)
                + chance.gauss(0, 0.15)
            )
            line = {
                "step": step,
                "stage": name,
                "time": 1.7e9 + step,
                "data/set": chance.choice(sets),
                "data/digest": "00ff",
            }
            line |= {
                "loss/total": loss,
                "grad_norm": 1 + chance.random(),
                "accuracy": 1 / loss,
                "learning_rate": 1e-3 * math.cos((step - first) / steps),
            }
            line |= {
                "rows_per_second": 900 + 50 * chance.random(),
                "seconds/encode": 0.1,
                "seconds/backward": 0.2,
                "temperature/emoji/image_to_name": 0.05 - step * 1e-5,
            }
            line |= {f"loss/{objective}": loss * weight for objective, weight in objectives.items()}
            line |= (
                {
                    f"infonce/emoji/image_to_name/loss@{size}": loss + 20 / size
                    for size in (48, 96, 192)
                }
                if name != "seq2item"
                else {}
            )
            lines.append(line)
        first += steps
        level = 0.1 * len(stages)
        results = {
            "emoji_image_to_name": {
                "recall@1": level / 2,
                "recall@10": level + 0.2,
                "auc": 0.8 + level / 4,
                "gap": 0.3,
            },
            HOSTILE: {"nmi": 0.4 + level / 3},
        }
        if name == "seq2item":
            results["set_completion"] = {
                "recall@10": 0.18,
                "popularity/recall@10": 0.08,
                "content_mean/recall@10": 0.12,
                "candidates": 7188.0,
                "queries": 300.0,
            }
        neighbours = [
            {
                "query": item(n),
                "results": [item(n + k, score=0.9 - k / 10, correct=k == n % 3) for k in range(5)],
            }
            for n in range(3)
        ]
        worded = [
            {
                "query": {"text": HOSTILE},
                "results": [
                    {
                        "text": HOSTILE,
                        "image": "https://example.org/x.png",
                        "score": 0.5,
                        "correct": True,
                    }
                ],
            }
        ]
        if name == "seq2item":
            worded.append(
                {
                    "query": {"text": "three items", "items": [item(n) for n in (7, 8, 9)]},
                    "results": [item(10, score=0.8, correct=True)],
                }
            )
        value = {
            "step": first - 1,
            "stage": name,
            "tasks": results,
            "examples": {"emoji_image_to_name": neighbours, HOSTILE: worded},
        }
        write(folder / "evaluation" / f"step-{first - 1:08d}.json", value)
    before = {"recall@1": 0.01, "recall@10": 0.03}
    untrained = {"step": 0, "stage": STAGES[0][0], "tasks": {"emoji_image_to_name": before}}
    write(folder / "evaluation" / "step-00000000.json", untrained)
    lines[5]["loss/total"] = None
    lines[6] |= {"memory/peak_bytes": 5_000_000_000, "tokens_per_second": 1e6, "mfu": 0.4}
    write(folder / "versions.json", {"torch": "2.13.0", "python": "3.11"})
    write(folder / "stages.json", stages)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    threshold = {
        "value": 0.61,
        "f1": 0.7,
        "precision": 0.75,
        "recall": 0.66,
        "tp": 660,
        "fp": 220,
        "fn": 340,
        "tn": 998780,
    }
    mined = [
        {
            "query": item(n),
            "positive": {"text": HOSTILE},
            "negatives": [item(n + k, score=0.6 - k / 50) for k in (1, 2)],
        }
        for n in range(3)
    ]
    write(
        folder / "curriculum" / "hard" / "state.json",
        {
            "thresholds": {"emoji/image_to_name": threshold},
            "examples": {"emoji/image_to_name": mined},
        },
    )
    similar = {
        "emoji": {"benchmark_one": 0.5, "benchmark_two": 0.54, "mean": 0.52, "error": 0.01},
        "icons": {"benchmark_one": 0.48, "mean": 0.48, "error": 0.005},
    }
    weights = {"emoji": 0.6, "icons": 0.3, "prompts": 0.1}
    balance = {
        "weights": weights,
        "balance": similar,
        "balance_model": "the run's own",
        "subsets": {"icons": 5000},
        "subsets_of": {"icons": 6470},
        "seconds": 30.0,
    }
    write(folder / "curriculum" / "diverse" / "state.json", balance)
    (folder / "quarantine.jsonl").write_text(
        json.dumps({"step": 3, "id": HOSTILE, "reason": "truncated image"}) + "\n"
    )
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "made-up")
