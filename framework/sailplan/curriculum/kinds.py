"""A data set as vectors by kind: fused, vision, text, audio.

What balancing and the nearest subset compare.

A view of several modalities gives the fused kind, a view of one modality gives that kind. Where no
view shows pictures or text alone, the vectors that the encoder reads out of the fused view stand
in. Each kind comes from the first such view, so a set is encoded once per kind and not once per
pattern.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sailplan.config.schema import BalanceConfig
from sailplan.curriculum.balance import Summary, cluster
from sailplan.data.reader import RecordReader
from sailplan.embed.embedder import Embedder
from sailplan.embed.rows import EmbeddedRows
from sailplan.embed.selection import Positions
from sailplan.embed.table import Table
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


@dataclass(frozen=True)
class KindTables:
    """A set's tables by kind: the table, and the modality of it whose vectors are meant (None: the
    fused ones).
    """

    tables: dict[str, tuple[Table, str | None]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tables)

    def blocks(self, start: int, stop: int) -> dict[str, tuple[NDArray[np.float32], EmbeddedRows]]:
        """Return kind -> vectors [k, D] of rows start .. stop - 1, and the rows."""
        read: dict[int, EmbeddedRows] = {}
        found = {}
        for kind, (table, part) in self.tables.items():
            if id(table) not in read:
                read[id(table)] = table.read(start, stop)
            rows = read[id(table)]
            vectors = rows.fused if part is None else rows.by_modality[part]
            found[kind] = vectors.numpy(), rows
        return found

    def vectors(self, start: int, stop: int) -> dict[str, NDArray[np.float32]]:
        """Return kind -> vectors [k, D], zeros where a row is not valid."""
        return {
            kind: np.where(rows.valid[:, None], vectors, np.float32(0.0))
            for kind, (vectors, rows) in self.blocks(start, stop).items()
        }


def kind_tables(
    embedder: Embedder,
    reader: RecordReader,
    views: Sequence[str],
    positions: Positions,
    wanted: Collection[str] | None = None,
) -> KindTables:
    """Return tables by kind of the records at the positions. Collective.

    wanted: the only kinds that matter to the caller; fused alone is enough where it is among them
    and the set has it.
    """
    chosen = kind_views(reader, views)
    if wanted is not None:
        chosen = {kind: view for kind, view in chosen.items() if kind in wanted or kind == "fused"}
        if "fused" in wanted and "fused" in chosen:
            chosen = {"fused": chosen["fused"]}
    result: dict[str, tuple[Table, str | None]] = {}
    for kind, view in chosen.items():
        parts = reader.config.views[view].modalities if kind == "fused" else []
        parts = [
            part for part in parts if part not in chosen and (wanted is None or part in wanted)
        ]
        table = embedder.table(reader, view, positions, per_modality=bool(parts))
        result[kind] = table, None
        result |= {part: (table, part) for part in parts}
    return KindTables(result)


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
    tables = kind_tables(embedder, reader, views, positions)
    return {
        kind: vectors[rows.valid]
        for kind, (vectors, rows) in tables.blocks(0, len(positions)).items()
        if rows.valid.any()
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
