"""A data set as vectors by kind: fused, vision, text, audio. What balancing and the nearest subset compare.

A view of several modalities gives the fused kind, a view of one modality gives that kind. Where no view shows
pictures or text alone, the vectors that the encoder reads out of the fused view stand in. Each kind comes from the
first such view, so a set is encoded once per kind and not once per pattern.
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


def kind_views(reader: RecordReader, views: Sequence[str]) -> dict[str, str]:
    """Kind -> the first of the views that gives it; history views are left out (their items are the targets of others)."""
    found: dict[str, str] = {}
    for name in views:
        view = reader.config.views[name]
        if view.of != "history":
            found.setdefault("fused" if len(view.modalities) > 1 else view.modalities[0], name)
    return found


def pattern_views(reader: RecordReader, patterns: Sequence[str]) -> list[str]:
    """The views that patterns use, each once, in their order."""
    sides = [reader.config.patterns[name] for name in patterns]
    return list(dict.fromkeys(view for pattern in sides for view in (pattern.query, pattern.target)))


def embed_kinds(
    embedder: Embedder, reader: RecordReader, views: Sequence[str], positions: NDArray[np.int64], wanted: Collection[str] | None = None
) -> dict[str, EmbeddedRows]:
    """Kind -> rows at the positions int64 [n], in their order (EmbeddedRows.fused holds the kind's vectors). Collective.

    wanted: the only kinds that matter to the caller; fused alone is enough where it is among them and the set has it.
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


def sample(positions: NDArray[np.int64], size: int, *seed: int | str) -> NDArray[np.int64]:
    """At most `size` of the positions, drawn by the seed, sorted."""
    return positions if len(positions) <= size else np.sort(generator("sample", *seed).permutation(positions)[:size])


def summarise(
    embedder: Embedder, reader: RecordReader, views: Sequence[str], positions: NDArray[np.int64], settings: BalanceConfig, name: str
) -> Summary:
    """Clusters of every kind over a sample of the positions. Collective; the same on all ranks."""
    seed = embedder.context.config.seed
    found = embed_kinds(embedder, reader, views, sample(positions, settings.sample, seed, name))
    return {kind: cluster(rows.fused.numpy()[rows.valid], settings.clusters, seed, name, kind) for kind, rows in found.items() if rows.valid.any()}


def summarise_benchmark(embedder: Embedder, settings: BalanceConfig) -> dict[str, Summary]:
    """Return the clusters of the tasks in `evaluation.benchmark`. Collective.

    A task is represented by *training* records of its data set where there are any, seen through the task's views, so
    that held-out records never steer what is trained; a data set without a train split is sampled from the task's own.
    """
    config, result = embedder.context.config, {}
    for name in config.evaluation.benchmark:
        task = config.evaluation.tasks[name]
        reader = embedder.context.readers[task.dataset]
        positions = reader.positions("train")
        if not len(positions):
            positions = reader.positions(None if task.split == "all" else task.split)
        views = [view for view in (task.query, task.target) if view]
        result[name] = summarise(embedder, reader, views, positions, settings, f"benchmark/{name}")
    return result
