"""Count what a step's rows cost on every rank: tokens with padding, and the slowest rank beside
the mean.

    python benchmarks/rows.py                # 64 ranks x 32 rows of the quick-start sets, table and
    benchmarks/results/rows.json

Nothing is timed and no process group formed: the collator of each rank runs in turn. A *position*
is one of the tower's sequence (prompt, text, visual tokens, sound). padded: every row as long as
its micro-batch's longest; packed: what the tower computes, as the micro-batch's packing says. Of
evaluation: a view's first 2,000 records, in order and as `EvaluationRows` sorts them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sailplan.config.compose import compose
from sailplan.config.schema import Config, StageConfig
from sailplan.data.collate import Collator
from sailplan.data.datasets import open_datasets
from sailplan.data.evaluation import EvaluationRows
from sailplan.data.plan import Plan
from sailplan.data.record import StepBatch

RESULTS = Path(__file__).parent / "results" / "rows.json"
SETS = ("icon_choices", "icons", "emoji", "prompts", "emoji_pairs")
CASES: dict[str, dict[str, Any]] = {
    "lanes, one micro-batch": {"dealing": "lanes", "token_budget": 0},
    "length, one micro-batch": {"dealing": "length", "token_budget": 0},
    "length, budget 128": {"dealing": "length", "token_budget": 128},
}


def positions(batch: StepBatch, latents: int) -> list[np.ndarray]:
    """Positions of each row of each micro-batch."""
    found = []
    for view in batch.views.values():
        for inputs in view.micro_batches:
            rows = inputs.token_mask.sum(1).numpy().astype(np.int64)
            if inputs.image_mask is not None:
                rows = rows + latents * inputs.image_mask.any(1).numpy()
            if inputs.audio_mask is not None:
                rows = rows + inputs.audio_mask.any(1).numpy()
            found.append(rows)
    return found


def text_tokens(batch: StepBatch) -> list[np.ndarray]:
    """Prompt and text tokens of each row of each micro-batch."""
    return [
        inputs.token_mask.sum(1).numpy().astype(np.int64)
        for view in batch.views.values()
        for inputs in view.micro_batches
    ]


def ratios(ranks: list[list[np.ndarray]]) -> dict[str, float]:
    """Padded / real over all ranks; the slowest rank / the mean, with and without padding."""
    real = np.array([sum(int(rows.sum()) for rows in found) for found in ranks])
    padded = np.array(
        [sum(len(rows) * int(rows.max(initial=0)) for rows in found) for found in ranks]
    )
    return {
        "padded / real": round(float(padded.sum() / real.sum()), 3),
        "slowest / mean, packed": round(float(real.max() / real.mean()), 3),
        "slowest / mean, padded": round(float(padded.max() / padded.mean()), 3),
    }


def packed(batches: list[StepBatch]) -> int:
    """Positions that the tower's linear layers see."""
    packings = [
        inputs.packing
        for batch in batches
        for view in batch.views.values()
        for inputs in view.micro_batches
    ]
    return sum(
        rows * length
        for packing in packings
        if packing is not None
        for rows, length in packing.runs["tower"]
    )


def count_evaluation(config: Config, name: str, records: int = 2000) -> dict[str, float]:
    """Padded / real text tokens of the view with most text: rows in the order of the shards, and
    as they are sorted.
    """
    reader = open_datasets(config, names=[name])[name]
    view = max(reader.config.views.values(), key=lambda view: len(view.fields))
    rows = EvaluationRows(
        reader, replace(view, modalities=["text"]), reader.positions()[:records], config
    )
    size = config.evaluation.batch
    in_order = [
        np.arange(start, min(start + size, len(rows))) for start in range(0, len(rows), size)
    ]
    result = {}
    for key, batches in (
        ("in order", in_order),
        ("sorted", [batch for own in rows.shares(4) for batch in own]),
    ):
        masks = [rows.inputs(batch)[0].token_mask for batch in batches]
        result[f"evaluation, {key}"] = round(
            sum(mask.numel() for mask in masks) / sum(int(mask.sum()) for mask in masks), 3
        )
    return result


def count(config: Config, name: str, steps: int, ranks: int) -> dict[str, Any]:
    """Ratios of a data set, the mean over its first steps."""
    readers, stage = open_datasets(config, names=[name]), StageConfig(steps=steps)
    plan = Plan(config, "count", stage, {name: 1.0}, readers)
    collators = [Collator(config, stage, plan, readers, rank, ranks) for rank in range(ranks)]
    latents = config.model.vision.latents
    found: dict[str, list[dict[str, float]]] = {"text tokens": [], "positions": []}
    micro_batches, computed, real = 0, 0, 0
    for step in range(steps):
        batches = [collator.batches(step)[0] for collator in collators]
        found["text tokens"].append(ratios([text_tokens(batch) for batch in batches]))
        found["positions"].append(ratios([positions(batch, latents) for batch in batches]))
        numbers = {
            tuple(len(view.micro_batches) for view in batch.views.values()) for batch in batches
        }
        assert len(numbers) == 1, "the same number of micro-batches on all ranks"
        micro_batches += sum(next(iter(numbers)))
        computed += packed(batches)
        real += sum(int(rows.sum()) for batch in batches for rows in positions(batch, latents))
    worst = {
        f"{unit}, {key}": round(max(row[key] for row in rows), 3)
        for unit, rows in found.items()
        for key in rows[0]
    }
    return {
        "micro-batches a step": micro_batches / steps,
        "packed / real": round(computed / real, 3),
        **worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    options = parser.parse_args()
    base = ["experiment=quickstart", f"global_batch={options.ranks * options.rows}"]
    record: dict[str, Any] = {
        "ranks": options.ranks,
        "rows": options.rows,
        "steps (the worst is told)": options.steps,
        "cases": {},
    }
    for case, settings in CASES.items():
        lines = [f"step.{key}={value}" for key, value in settings.items()]
        config = compose([*base, f"step.micro_batch={options.rows}", *lines])
        for name in options.sets:
            found = count(config, name, options.steps, options.ranks)
            record["cases"].setdefault(name, {})[case] = found
            print(
                f"{name:14} {case:24}",
                ", ".join(f"{key} {value:.2f}" for key, value in found.items()),
                flush=True,
            )
    for name in options.sets:
        found = count_evaluation(compose(["experiment=quickstart"]), name)
        record["cases"][name] |= found
        print(
            f"{name:14}",
            ", ".join(f"{key} {value:.2f}" for key, value in found.items()),
            flush=True,
        )
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
