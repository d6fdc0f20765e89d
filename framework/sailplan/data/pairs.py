"""Pairs of texts as a data set: the shortest way from a list in Python to training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sailplan.config.schema import DatasetConfig, PatternConfig, ViewConfig
from sailplan.data.writer import Record, write_shards
from sailplan.errors import ConfigurationError

PER_SHARD = 10_000


def write_pairs(
    folder: str | Path, pairs: Iterable[tuple[str, str]], *, prompts: tuple[str, str] = ("", "")
) -> DatasetConfig:
    """Write (query, target) texts as shards below `folder`; return the data set, for
    `config.data.sets[NAME]`.

    Its views are `query` and `target`, with `prompts` before their texts, and its one pattern
    matches them. Older shards there are replaced. Raises ConfigurationError where there is no pair,
    or an empty text.
    """
    records = []
    for number, (query, target) in enumerate(pairs):
        if not query.strip() or not target.strip():
            raise ConfigurationError(
                f"pair {number}: found an empty text, expected two; leave it out"
            )
        body = {
            "id": f"pairs/{number}",
            "split": "train",
            "fields": {"query": {"en": query}, "target": {"en": target}},
        }
        records.append(Record(body))
    if not records:
        raise ConfigurationError(f"write_pairs({folder}): found no pair, expected at least one")
    write_shards(records, Path(folder), "pairs", PER_SHARD)
    views = {
        name: ViewConfig(fields=[name], prompt=prompt)
        for name, prompt in zip(("query", "target"), prompts, strict=True)
    }
    return DatasetConfig(
        shards=str(folder),
        views=views,
        patterns={"query_to_target": PatternConfig("query", "target")},
    )
