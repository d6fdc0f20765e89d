"""One set of titles and pictures for the tests of streams, and configurations that read it."""

from __future__ import annotations

from pathlib import Path

from sailplan.config.schema import Config, StageConfig
from sailplan.data.config import DatasetConfig, PatternConfig, StreamConfig, ViewConfig
from sailplan.data.testing import (
    item_body,
    json_member,
    made_up_config,
    png,
    write_set,
    write_shards,
)

BATCH, SEGMENT, STEPS = 16, 8, 200


def write_many(root: Path, folder: str, records: int, per_shard: int) -> None:
    """Write so many records into root/folder, and the pack's tokenizer beside it."""
    write_shards(root)
    pictures, found = [png(number) for number in range(16)], []
    for number in range(records):
        body, key = item_body(number) | {"split": "train"}, f"{number:06d}"
        found.append([json_member(key, body), (f"{key}.png", pictures[number % 16])])
    write_set(root / folder, found, per_shard)


def config_of(
    root: Path, shards: str, cache: Path, workers: int = 0, steps: int = STEPS, **stream: object
) -> Config:
    """Return a configuration of one stage over `shards`. stream: settings of `data.stream`."""
    views = {"title": ViewConfig(fields=["title"]), "image": ViewConfig(modalities=["vision"])}
    many = DatasetConfig(
        shards=shards, views=views, patterns={"both": PatternConfig("image", "title")}
    )
    config = made_up_config(
        root,
        global_batch=BATCH,
        micro_batch=BATCH,
        cache=str(cache),
        stream=StreamConfig(**{"deadline_seconds": 60.0, **stream}),  # type: ignore[arg-type]
        sets={"many": many},
        segment=SEGMENT,
        window=32,
        workers=workers,
    )
    config.stages, config.order = {"only": StageConfig(steps=steps, data={"many": 1.0})}, ["only"]
    return config
