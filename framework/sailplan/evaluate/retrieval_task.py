"""Who is asked and what can be found: a task's queries, candidates and the relation of right
answers, before any metric. Vectors stay in the store.

Right answers are told by ids, not by rows: queries with the same text share all their items, and
candidates with the same text (or the same document) are all right. So a name that two emoji share
is never counted as an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from sailplan.config.schema import EvaluationTask, ViewConfig
from sailplan.curriculum.hard_negatives import matched
from sailplan.data.reader import RecordReader
from sailplan.embed.embedder import Embedder
from sailplan.embed.scoring import Pairs, labelled_pairs
from sailplan.embed.sides import StoredSide
from sailplan.errors import ConfigurationError
from sailplan.runtime.seeds import generator


@dataclass(frozen=True)
class RetrievalTask:
    """A retrieval task, embedded; `own` and the pairs say who belongs to whom, by row.

    Row i's own candidate is what its record says, or -1 where that is not among the candidates.
    """

    queries: StoredSide
    candidates: StoredSide
    own: NDArray[np.int64]  # [n] index of the candidate that the query's record names
    positives: Pairs
    excluded: Pairs | None  # the query item itself, where queries are catalogue items too
    candidate_reader: RecordReader
    candidate_view: ViewConfig


def item_view(view: ViewConfig) -> ViewConfig:
    """The same view, for a record of an items data set."""
    return replace(view, of="item")


def check_queries(readers: Mapping[str, RecordReader], tasks: Mapping[str, EvaluationTask]) -> None:
    """Raises ConfigurationError for the first task without query records: said before a run, not
    after its first stage.
    """
    for name, task in tasks.items():
        reader = readers[task.dataset]
        if not (len(reader) if task.split == "all" else reader.count(task.split)):
            has = (
                f"has the splits {', '.join(reader.index.split_names)}; choose one of them"
                if len(reader)
                else "has no record; check its shards"
            )
            raise ConfigurationError(
                f"evaluation.tasks.{name}.split={task.split}: data set '{task.dataset}' {has}"
            )


def query_positions(reader: RecordReader, task: EvaluationTask, name: str) -> NDArray[np.int64]:
    """Sorted positions of the task's query records; `limit` takes a fixed random part.

    Raises ConfigurationError if there is none.
    """
    check_queries({task.dataset: reader}, {name: task})
    positions = reader.positions(None if task.split == "all" else task.split)
    if task.limit is not None and len(positions) > task.limit:
        positions = np.sort(generator("evaluation", name).permutation(positions)[: task.limit])
    return positions


def prepare(
    reader: RecordReader, task: EvaluationTask, name: str, embedder: Embedder
) -> RetrievalTask:
    """Embeds both sides of a retrieval or classification task. Collective.

    candidates=split: the targets of the query records; all: every record of the data set, for pairs
    every item of the catalogue. Classification keeps each different label text once.
    """
    positions = query_positions(reader, task, name)
    target_view = reader.config.views[task.target]
    device = embedder.context.parallel.device
    table = embedder.table(reader, task.query, positions, text_from=task.query_text)
    queries = StoredSide.of(table, device)
    own_query: NDArray[np.int64] | None = None
    if (
        reader.config.kind == "items" or reader.catalogue is None
    ):  # pairs without a catalogue hold their targets themselves
        target_reader, wanted = reader, queries.positions
        pool = np.arange(len(reader)) if task.candidates == "all" else positions
    else:
        assert reader.config.kind == "pairs", "check_task lets no sequences come here"
        target_reader, target_view = reader.catalogue, item_view(target_view)
        wanted = embedder.catalogue_positions(reader, queries.positions, "item")
        own_query = embedder.catalogue_positions(reader, queries.positions, "query")
        pool = (
            np.arange(len(target_reader))
            if task.candidates == "all"
            else np.unique(wanted[wanted >= 0])
        )
    table = embedder.table(target_reader, target_view, pool.astype(np.int64))
    candidates = StoredSide.of(table, device)
    own = index_of(candidates.positions, wanted)
    labels = candidates.ids[torch.from_numpy(own.clip(min=0))]
    if task.kind == "classification":
        first = np.sort(np.unique(candidates.ids.numpy(), return_index=True)[1])
        candidates = candidates.where(np.isin(np.arange(len(candidates)), first))
        own = np.where(own >= 0, index_of(candidates.ids.numpy(), labels.numpy()), -1)
    known = torch.from_numpy((own >= 0) & matched(reader, queries.positions))
    positives = labelled_pairs(
        queries.ids,
        candidates.ids,
        torch.unique(torch.stack([queries.ids[known], labels[known]]), dim=1),
    )
    excluded = None
    if own_query is not None and (own_query >= 0).any():
        place = index_of(candidates.positions, own_query)
        rows = np.flatnonzero((place >= 0) & (place != own))
        excluded = Pairs.of(torch.from_numpy(rows), torch.from_numpy(place[rows]))
    return RetrievalTask(queries, candidates, own, positives, excluded, target_reader, target_view)


def index_of(values: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of each wanted value in `values` (the first, if it is there twice), -1 where it is
    not there.
    """
    if not len(values):
        return np.full(len(wanted), -1, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    place = np.searchsorted(values[order], wanted).clip(max=len(values) - 1)
    return np.where(values[order[place]] == wanted, order[place], -1).astype(np.int64)
