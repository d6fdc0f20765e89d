"""A few queries with what the model finds first, in the report's form: words, pictures, scores,
and whether it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.config.fields import JsonObject
from sailplan.config.schema import EvaluationTask, ViewConfig
from sailplan.data.excerpt import show
from sailplan.data.reader import RecordReader
from sailplan.embed.scoring import Pairs, best_columns
from sailplan.embed.sides import InMemory, StoredSide
from sailplan.evaluate.retrieval_task import RetrievalTask

QUERIES, ANSWERS = 6, 5


def spread(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most QUERIES of the rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(QUERIES, len(rows))).astype(int)]


def answers(
    vectors: Tensor,
    excluded: Sequence[Sequence[int]],
    candidates: StoredSide,
    reader: RecordReader,
    view: ViewConfig,
    correct: Callable[[int, int], bool],
) -> list[list[JsonObject]]:
    """For each of the vectors [k, D]: its best candidates, without the excluded indices.

    correct(place, candidate) tells the right ones.
    """
    pairs = [(place, column) for place, columns in enumerate(excluded) for column in columns]
    index = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T.to(vectors.device)
    hidden = Pairs.of(index[0], index[1])
    scores, found = best_columns(InMemory(vectors), candidates, ANSWERS, None, hidden)
    return [
        [
            show(reader, int(candidates.positions[column]), view)
            | {"score": round(score, 4), "correct": correct(place, column)}
            for score, column in zip(scores[place].tolist(), found[place].tolist(), strict=True)
            if column >= 0
        ]
        for place in range(len(vectors))
    ]


def retrieval_examples(
    task: EvaluationTask, reader: RecordReader, sides: RetrievalTask
) -> list[JsonObject]:
    """[{"query": {...}, "results": [{..., "score", "correct"}]}] for a retrieval or
    classification task.
    """
    rows = spread(np.flatnonzero(sides.own >= 0))
    if not len(rows):
        return []
    right = set(zip(sides.positives.rows.tolist(), sides.positives.columns.tolist(), strict=True))
    excluded: list[list[int]] = [[] for _ in rows]
    if sides.excluded is not None:
        excluded = [
            sides.excluded.columns[sides.excluded.rows == row].tolist() for row in rows.tolist()
        ]
    found = answers(
        sides.queries.take(torch.from_numpy(rows)),
        excluded,
        sides.candidates,
        sides.candidate_reader,
        sides.candidate_view,
        lambda place, column: (int(rows[place]), column) in right,
    )
    view = reader.config.views[task.query]
    return [
        {
            "query": show(
                reader, int(sides.queries.positions[row]), view, _asked(reader, task, sides, row)
            ),
            "results": results,
        }
        for row, results in zip(rows.tolist(), found, strict=True)
    ]


def _asked(
    reader: RecordReader, task: EvaluationTask, sides: RetrievalTask, row: int
) -> str | None:
    """The entry of `query_text` that this row asked with: rows of a record come in the order of
    its entries.
    """
    if task.query_text is None:
        return None
    body = reader.body(int(sides.queries.positions[row]))
    entries = (body.get(task.query_text) or body.get("fields", {}).get(task.query_text) or {}).get(
        "en", []
    )
    place = int((sides.queries.positions[:row] == sides.queries.positions[row]).sum())
    return str(entries[place]) if place < len(entries) else None
