"""Dynamic hard negatives: for every query the targets that the current model finds most alike
and that are not matches.

First lambda* is fitted on a sample of fixed size (threshold.py). Then every training query is
scored against all targets of its data set; of those below lambda* the best are its hard negatives.
What scores at or above lambda* without being a labelled positive is most likely a positive that
nobody labelled, and is dropped (recipe 2.1).
Never a negative: the target's own document or text, and every target of a query with the same text.

Each rank searches for its share of the queries and holds, on its device, its share of the targets,
which the exchange shows to the others; scores are multiplied in float64 as the threshold's were, so
the same negatives come out at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.config.fields import JsonObject
from sailplan.config.schema import DatasetConfig, HardNegativeConfig, PatternKey
from sailplan.curriculum.threshold import Threshold, f1_threshold
from sailplan.data.excerpt import show
from sailplan.data.negatives import HardNegativeStore
from sailplan.data.reader import RecordReader
from sailplan.embed.embedder import Embedder
from sailplan.embed.embedding import EmbeddedRows
from sailplan.embed.scoring import Pairs, labelled_pairs, share
from sailplan.errors import ConfigurationError
from sailplan.runtime.seeds import generator
from sailplan_kernels.exchange.base import Exchange
from sailplan_kernels.topk import topk

EXAMPLES = 6


@dataclass
class Mined:
    """Hold the store that training reads, the confusion counts and a few examples for the
    report.
    """

    store: HardNegativeStore = field(default_factory=HardNegativeStore)
    thresholds: dict[PatternKey, Threshold] = field(default_factory=dict)
    examples: dict[PatternKey, list[JsonObject]] = field(default_factory=dict)


def chosen_patterns(
    config: HardNegativeConfig,
    stage_data: Mapping[str, float],
    datasets: Mapping[str, DatasetConfig],
) -> dict[str, list[str]]:
    """Data set -> patterns to mine for: what the configuration names, else the first pattern of
    every set of the stage.

    Histories have no mined negatives: sequence sets are left out unless they are named.
    """
    if config.patterns:
        return {name: list(patterns) for name, patterns in config.patterns.items()}
    fitting = [
        name
        for name in stage_data
        if datasets[name].kind != "sequences" and datasets[name].patterns
    ]
    return {name: list(datasets[name].patterns)[:1] for name in fitting}


def check_minable(name: str, dataset: DatasetConfig, patterns: Sequence[str]) -> None:
    """Raises ConfigurationError for a pattern of the data set that starts from a history."""
    for pattern in patterns:
        sides = dataset.patterns[pattern]
        if "history" in (dataset.views[sides.query].of, dataset.views[sides.target].of):
            raise ConfigurationError(
                f"hard_negatives.patterns.{name}: pattern '{pattern}' starts from a history; name "
                "patterns of single items"
            )


def matched(reader: RecordReader, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [n]: whether a record's two sides are a match.

    All are, except graded pairs whose score is not above the data
    set's `positive_score`: those say how alike two items are, not that they belong together."""
    if not reader.scored:
        return np.ones(len(positions), dtype=bool)
    scores = [reader.score(int(position)) for position in positions]
    return np.array(
        [score is not None and score > reader.config.positive_score for score in scores], dtype=bool
    )


def mine(
    embedder: Embedder,
    patterns: Mapping[str, list[str]],
    hard: HardNegativeConfig,
    subsets: Mapping[str, NDArray[np.int64]] | None = None,
) -> Mined:
    """Mine for every named pattern over the train split, or over `subsets` (data set ->
    positions). Collective; the same
    result on all ranks. Raises ConfigurationError for a pattern from a history."""
    run, found = embedder.context, Mined()
    for name, names in patterns.items():
        reader = run.readers[name]
        positions = (subsets or {}).get(name, reader.positions("train"))
        positions = positions[matched(reader, positions)]
        check_minable(name, reader.config, names)
        for pattern in names:
            key, sides = PatternKey(name, pattern), reader.config.patterns[pattern]
            queries, targets = (
                embedder.rows(reader, view, positions) for view in (sides.query, sides.target)
            )
            both = np.intersect1d(
                queries.positions[queries.valid], targets.positions[targets.valid]
            )
            queries, targets = (
                queries.where(np.isin(queries.positions, both)),
                targets.where(np.isin(targets.positions, both)),
            )
            threshold, table, scores = mine_rows(
                queries,
                targets,
                hard,
                embedder.exchange,
                run.parallel.device,
                str(key),
                run.config.seed,
            )
            found.thresholds[key] = threshold
            store = np.full((len(reader), hard.per_query), -1, dtype=np.int64)
            store[queries.positions] = table
            found.store.positions[key], found.store.thresholds[key] = store, threshold.value
            found.examples[key] = _examples(reader, pattern, queries.positions, table, scores)
    return found


def mine_rows(
    queries: EmbeddedRows,
    targets: EmbeddedRows,
    hard: HardNegativeConfig,
    exchange: Exchange,
    device: torch.device,
    key: str,
    seed: int,
) -> tuple[Threshold, NDArray[np.int64], NDArray[np.float32]]:
    """lambda*, negatives int64 [n, per_query] as record positions (-1 absent), and their cosines
    float32, for n pairs.

    queries and targets hold the same n records in the same order. A target that many records share
    is one candidate.
    """
    random = generator("hard negatives", seed, key)
    sample = torch.from_numpy(np.sort(random.permutation(len(queries))[: hard.sample]))
    facts = torch.unique(
        torch.stack([queries.ids, targets.ids]), dim=1
    )  # (query id, right target id)
    positives = labelled_pairs(queries.ids[sample], targets.ids[sample], facts)
    threshold = f1_threshold(
        queries.fused[sample].to(device),
        targets.fused[sample].to(device),
        positives.to(device),
        exchange,
    )

    first = torch.from_numpy(np.sort(np.unique(targets.ids.numpy(), return_index=True)[1]))
    itself = torch.unique(queries.ids).expand(
        2, -1
    )  # an item is no negative of itself, where queries are items too
    hidden = _padded(
        labelled_pairs(queries.ids, targets.ids[first], torch.cat([facts, itself], 1)), len(queries)
    )
    mine, own = (
        slice(*share(n, exchange.rank, exchange.world_size)) for n in (len(queries), len(first))
    )
    scores, columns = topk(
        queries.fused[mine].to(device, torch.float64),
        targets.fused[first[own]].to(device, torch.float64),
        hard.per_query,
        max_score=threshold.value,
        exclude_ids=hidden[mine].to(device),
        exchange=exchange,
    )
    scores, columns = exchange.gather(scores).cpu(), exchange.gather(columns).cpu()
    candidates = targets.positions[first.numpy()]
    table = np.where(columns.numpy() >= 0, candidates[columns.numpy().clip(min=0)], -1)
    return threshold, table, scores.numpy()


def _padded(pairs: Pairs, n: int) -> Tensor:
    """Columns of each row as int64 [n, most], padded with -1."""
    counts = torch.bincount(pairs.rows, minlength=n)
    table = torch.full((n, max(1, int(counts.max()) if n else 1)), -1, dtype=torch.int64)
    place = torch.arange(len(pairs.rows)) - (counts.cumsum(0) - counts)[pairs.rows]
    table[pairs.rows, place] = pairs.columns
    return table


def _examples(
    reader: RecordReader,
    pattern: str,
    positions: NDArray[np.int64],
    table: NDArray[np.int64],
    scores: NDArray[np.float32],
) -> list[JsonObject]:
    """[{"query", "positive", "negatives": [{..., "score"}]}] of a few records that have
    negatives.
    """
    sides = reader.config.patterns[pattern]
    query, target = reader.config.views[sides.query], reader.config.views[sides.target]
    rows = np.flatnonzero((table >= 0).any(1))
    rows = (
        rows[np.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows))).astype(int)]
        if len(rows)
        else rows
    )
    return [
        {
            "query": show(reader, int(positions[row]), query),
            "positive": show(reader, int(positions[row]), target),
            "negatives": [
                show(reader, place, target) | {"score": round(score, 4)}
                for place, score in zip(table[row].tolist(), scores[row].tolist(), strict=True)
                if place >= 0
            ],
        }
        for row in rows.tolist()
    ]
