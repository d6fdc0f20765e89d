"""A data set as vectors by kind: fused, vision, text, audio.

What balancing and the nearest subset compare.

A view of several modalities gives the fused kind, a view of one modality gives that kind. Where no
view shows pictures or text alone, the vectors that the encoder reads out of the fused view stand
in. Each kind comes from the first such view, so a set is encoded once per kind and not once per
pattern.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sailplan.config.schema import BalanceConfig
from sailplan.curriculum.balance import Summary, cluster
from sailplan.data.reader import RecordReader
from sailplan.embed.embedder import Embedder
from sailplan.embed.embedding import EmbeddedRows
from sailplan.runtime.seeds import generator
from sailplan.runtime.turns import from_all_ranks, in_turns


def kind_views(reader: RecordReader, views: Sequence[str]) -> dict[str, str]:
    """Kind -> the first of the views that gives it; history views are left out (their items are
    the targets of others).
    """
    found: dict[str, str] = {}
    for name in views:
        view = reader.config.views[name]
        if view.of != "history":
            found.setdefault("fused" if len(view.modalities) > 1 else view.modalities[0], name)
    return found


def pattern_views(reader: RecordReader, patterns: Sequence[str]) -> list[str]:
    """The views that patterns use, each once, in their order."""
    sides = [reader.config.patterns[name] for name in patterns]
    return list(
        dict.fromkeys(view for pattern in sides for view in (pattern.query, pattern.target))
    )


def embed_kinds(
    embedder: Embedder,
    reader: RecordReader,
    views: Sequence[str],
    positions: NDArray[np.int64],
    wanted: Collection[str] | None = None,
) -> dict[str, EmbeddedRows]:
    """Kind -> rows at the positions int64 [n], in their order (EmbeddedRows.fused holds the
    kind's vectors). Collective.

    wanted: the only kinds that matter to the caller; fused alone is enough where it is among them
    and the set has it.
    """
    chosen = kind_views(reader, views)
    if wanted is not None:
        chosen = {kind: view for kind, view in chosen.items() if kind in wanted or kind == "fused"}
        if "fused" in wanted and "fused" in chosen:
            chosen = {"fused": chosen["fused"]}
    result: dict[str, EmbeddedRows] = {}
    for kind, view in chosen.items():
        rows = embedder.rows(reader, view, positions, per_modality=kind == "fused")
        result[kind] = rows
        for part, vectors in rows.by_modality.items():
            if part not in chosen:
                result[part] = replace(rows, fused=vectors, by_modality={})
    return result


def sample(reader: RecordReader, split: str, size: int, *seed: int | str) -> NDArray[np.int64]:
    """Return at most `size` positions of a split, sorted: one at random from each of `size`
    equal parts of its records.

    So each shard gives its share, and no more than `size` positions are ever listed.
    """
    count = reader.count(split)
    if count <= size:
        return reader.positions(split)
    edges = np.arange(size + 1) * count // size
    numbers = generator("sample", *seed).integers(edges[:-1], edges[1:])
    return reader.select(split, numbers)


def summarise(
    embedder: Embedder,
    reader: RecordReader,
    views: Sequence[str],
    split: str | None,
    settings: BalanceConfig,
    name: str,
) -> Summary:
    """Return the clusters of every kind over a sample of a split (None: of all).

    Collective; the same on all ranks.
    """
    return {
        kind: cluster(rows, settings.clusters, embedder.context.config.seed, name, kind)
        for kind, rows in _vectors(embedder, reader, views, split, settings, name).items()
    }


def replicates(
    embedder: Embedder,
    reader: RecordReader,
    views: Sequence[str],
    settings: BalanceConfig,
    name: str,
) -> list[Summary]:
    """Return `bootstrap` summaries of a sample of the train split, each of as many rows drawn
    from it again. Collective.

    The ranks share the clusterings; the same result on all of them.
    """
    run = embedder.context
    vectors = _vectors(embedder, reader, views, "train", settings, name)
    own: dict[int, Summary] = {}

    def make(number: int) -> None:
        own[number] = {
            kind: cluster(
                rows[
                    generator("bootstrap", run.config.seed, name, kind, number).integers(
                        len(rows), size=len(rows)
                    )
                ],
                settings.clusters,
                run.config.seed,
                name,
                kind,
                number,
            )
            for kind, rows in vectors.items()
        }

    in_turns(run.parallel, f"balancing {name}", range(settings.bootstrap), make)
    every = {
        number: summary
        for found in from_all_ranks(run.parallel, own)
        for number, summary in found.items()
    }
    return [every[number] for number in range(settings.bootstrap)]


def _vectors(
    embedder: Embedder,
    reader: RecordReader,
    views: Sequence[str],
    split: str | None,
    settings: BalanceConfig,
    name: str,
) -> dict[str, NDArray[np.float32]]:
    """Return the valid vectors of every kind over a sample."""
    seed = embedder.context.config.seed
    if split is None:
        positions = np.arange(len(reader))[:: max(1, len(reader) // settings.sample)][
            : settings.sample
        ]
    else:
        positions = sample(reader, split, settings.sample, seed, name)
    found = embed_kinds(embedder, reader, views, positions)
    return {
        kind: rows.fused.numpy()[rows.valid] for kind, rows in found.items() if rows.valid.any()
    }


def summarise_benchmark(embedder: Embedder, settings: BalanceConfig) -> dict[str, Summary]:
    """Return the clusters of the tasks in `evaluation.benchmark`. Collective.

    A task is represented by *training* records of its data set where there are any, seen through
    the task's views, so that held-out records never steer what is trained; a data set without a
    train split is sampled from the task's own.
    """
    config, result = embedder.context.config, {}
    for name in config.evaluation.benchmark:
        task = config.evaluation.tasks[name]
        reader = embedder.context.readers[task.dataset]
        split = "train" if reader.count("train") else None if task.split == "all" else task.split
        views = [view for view in (task.query, task.target) if view]
        result[name] = summarise(embedder, reader, views, split, settings, f"benchmark/{name}")
    return result
