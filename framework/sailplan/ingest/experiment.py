"""Write the experiment that `sailplan new NAME --data SETS` asks for: one stage over data sets
that are declared, with their tasks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from sailplan.config.compose import choices, compose
from sailplan.config.fields import JsonObject
from sailplan.config.overrides import nearest
from sailplan.config.schema import DatasetConfig
from sailplan.data.shards import resolve
from sailplan.data.tar import HeldOut
from sailplan.errors import ConfigurationError
from sailplan.ingest.declare import MARK, check_name, dump, target_file
from sailplan.ingest.job import RESULT, TOKENIZER
from sailplan.ingest.tokenizer import train_tokenizer, training_texts
from sailplan.runtime.files import write_whole

LANES = 8  # of conf/data/reading.yaml
LARGEST_BATCH = 256
PASSES = 10  # over the training records
# For a published model: the upper end of what BERT's authors fine-tune with (arXiv 1810.04805, A.3);
# the optimizer's own is for weights that are drawn.
LEARNING_RATES = {"learning_rate": 5e-5, "final_learning_rate": 5e-6}
STEPS = (20, 20_000)  # fewest, most


@dataclass(frozen=True)
class Known:
    """What the import of a data set found out; of others nothing is known."""

    train: int | None = None
    held_out: int | None = None
    scored: bool = False
    tokenizer: str | None = None
    tokens: int = 32


def write_experiment(
    name: str,
    sets: Sequence[str],
    *,
    model: str | None = None,
    steps: int | None = None,
    tokenizer: str | None = None,
) -> tuple[Path, JsonObject]:
    """Write conf/experiment/NAME.yaml; return its path and what was chosen.

    sets: data sets of conf/data. Raises ConfigurationError for sets that are not there, or have no
    pattern to train.
    """
    check_name(name)
    path = target_file(name, "experiment")
    data = _with_catalogues(sets)
    config = compose([f"data=[reading,{','.join(data)}]", *([f"model={model}"] if model else [])])
    datasets = {one: config.data.sets[one] for one in data}
    known = {one: _known(one, datasets[one]) for one in data}
    trained = [
        one
        for one in data
        if datasets[one].patterns and (one in sets or datasets[one].kind == "items")
    ]
    if not set(trained) & set(sets):
        raise ConfigurationError(
            f"--data {','.join(sets)}: no pattern to train; give a data set whose views are two "
            "sides, such as pictures and texts"
        )
    batch = _batch([known[one].train for one in trained])
    counts = [count for one in trained if (count := known[one].train) is not None]
    length = steps or (
        max(STEPS[0], min(STEPS[1], PASSES * sum(counts) // batch)) if counts else 1000
    )
    objectives = (
        {"infonce": 1.0} if any(datasets[one].kind != "sequences" for one in trained) else {}
    )
    objectives |= (
        {"seq2item": 1.0} if any(datasets[one].kind == "sequences" for one in trained) else {}
    )
    objectives |= {"cosent": 0.1} if any(known[one].scored for one in trained) else {}
    chosen, tokens = _tokenizer(name, tokenizer, data, datasets, known)
    pretrained = config.model.pretrained()
    content: JsonObject = {
        "defaults": [
            *([{"override /model": model}] if model else []),
            {"override /data": ["reading", *data]},
            {"override /objective": list(objectives)},
            "_self_",
        ],
        "name": name,
        "global_batch": batch,
        "step": {"micro_batch": min(batch, 64)},
        "data": {
            "tokenizer": chosen,
            "max_tokens": tokens,
            **({"sets": {one: _as_published(datasets[one]) for one in data}} if pretrained else {}),
        },
        "order": ["main"],
        "stages": {
            "main": {
                "steps": length,
                "data": dict.fromkeys(trained, 1),
                "objectives": objectives,
                "optimizer": {
                    **(LEARNING_RATES if pretrained else {}),
                    "warmup_steps": max(1, length // 20),
                },
            }
        },
    }
    tasks = {
        f"{one}_{key}": task
        for one in trained
        if known[one].held_out != 0
        for key, task in _tasks(one, datasets[one]).items()
    }
    content |= {"evaluation": {"tasks": tasks}} if tasks else {}
    head = (
        f"# @package _global_\n# Trains on {', '.join(trained)}.\n# {MARK} new`; yours to change.\n"
    )
    write_whole(path, head + dump(content))
    without = [one for one in trained if known[one].held_out == 0]
    return path, {
        "steps": length,
        "global_batch": batch,
        "tasks": list(tasks),
        "without_held_out": without,
    }


def _as_published(dataset: DatasetConfig) -> JsonObject:
    """Return what shows items as a published model was trained to see them: without our prompts,
    pictures unchanged.
    """
    return {
        **({"image_augmentation": 0.0} if dataset.image_augmentation else {}),
        "views": {view: {"prompt": ""} for view in dataset.views},
    }


def _with_catalogues(sets: Sequence[str]) -> list[str]:
    """The data sets with the items that they refer to, each once, catalogues first."""
    found: list[str] = []
    known = choices("data")
    for name in sets:
        if name not in known or name == "reading":
            others = [one for one in known if one != "reading"]
            raise ConfigurationError(
                f"--data {name}: no file conf/data/{name}.yaml{nearest(name, others)}"
            )
        catalogue = (yaml.safe_load(known[name].read_text(encoding="utf-8")) or {}).get("catalogue")
        found += [one for one in (catalogue, name) if one]
    return list(dict.fromkeys(found))


def _known(name: str, dataset: DatasetConfig) -> Known:
    """What the import kept of a data set."""
    shards = Path(dataset.shards)
    for folder in (shards, shards.parent, Path("data") / name):
        try:
            result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            found = result["sets"][name]
            splits = found["splits"]
            return Known(
                splits.get("train", 0),
                splits.get("held_out", 0),
                bool(found.get("scored")),
                result["tokenizer"],
                result["tokens"],
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return Known()


def _batch(counts: Sequence[int | None]) -> int:
    """The largest power of two up to 256 that half of the smallest data set fills; a multiple of
    the lanes.
    """
    smallest = min((count for count in counts if count), default=2 * LARGEST_BATCH)
    batch = LANES
    while batch * 2 <= min(LARGEST_BATCH, smallest // 2):
        batch *= 2
    return batch


def _tasks(name: str, dataset: DatasetConfig) -> JsonObject:
    """An evaluation task for each pattern."""
    sequence = {"kind": "sequence", "candidates": "all"} if dataset.kind == "sequences" else {}
    by_id = {"candidates": "all"} if dataset.kind == "pairs" and dataset.catalogue else {}
    return {
        key: {
            "dataset": name,
            **sequence,
            **by_id,
            "query": pattern.query,
            "target": pattern.target,
            "metrics": ["recall"],
        }
        for key, pattern in dataset.patterns.items()
    }


def _tokenizer(
    name: str,
    told: str | None,
    data: Sequence[str],
    datasets: Mapping[str, DatasetConfig],
    known: Mapping[str, Known],
) -> tuple[str, int]:
    """Path of the tokenizer, and max_tokens: a multiple of 16 that 95 of 100 texts fit into."""
    tokens = max((one.tokens for one in known.values()), default=32)
    files = list(dict.fromkeys(one.tokenizer for one in known.values()))
    path = told or (files[0] if len(files) == 1 and files[0] else None)
    if path is None:  # sets that were imported apart: one tokenizer of all their texts
        path = str(Path("data") / name / TOKENIZER)
        held_out = {
            one: None
            if (rule := datasets[one].held_out) is None
            else HeldOut(rule.fraction, rule.by)
            for one in data
        }
        tokens = train_tokenizer(
            training_texts([(resolve(one, datasets[one].shards), held_out[one]) for one in data]),
            Path(path),
        )
    return path, min(512, max(32, -(-tokens // 16) * 16))
