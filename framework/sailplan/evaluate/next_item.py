"""Next item: a recorded history asks for its recorded target among the catalogue, with two
baselines beside the model.

`recall@k` is vanilla: every candidate is ranked, those of the history too. `filtered/recall@k`
leaves out all items of the recorded history, which a recommender would not show again; queries
whose target is one of them are counted in `repeated_targets` and are not part of it. Only the last
`history_length` items make the query's vector. The baselines `content_mean/` (the mean of those
items' vectors) and `popularity/` (what most training records have) get both, too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.config.fields import JsonObject
from sailplan.config.schema import EvaluationTask
from sailplan.data.excerpt import show
from sailplan.data.names import given
from sailplan.data.reader import BadSample, RecordReader
from sailplan.data.values import ids
from sailplan.embed.embedder import Embedder
from sailplan.embed.scoring import Pairs
from sailplan.embed.sides import StoredSide
from sailplan.errors import ConfigurationError
from sailplan.evaluate import metrics
from sailplan.evaluate.examples import answers, spread
from sailplan.evaluate.retrieval_task import index_of, item_view, query_positions
from sailplan.evaluate.sequences import popularity, represent

logger = logging.getLogger("sailplan.evaluate")


@dataclass(frozen=True)
class Recorded:
    """The queries of a task: catalogue positions."""

    histories: list[NDArray[np.int64]]  # whole, in their order; unknown items left out
    targets: NDArray[np.int64]  # [n]
    unknown_targets: int  # records whose target the catalogue does not have, left out

    def used(self) -> NDArray[np.int64]:
        """Sorted positions of all items."""
        return np.unique(np.concatenate([self.targets, *self.histories]))


def recorded(reader: RecordReader, positions: NDArray[np.int64]) -> Recorded | None:
    """Return histories and targets as the records give them; None where no record names a target
    (sets without time order).
    """
    histories, targets, unknown, named = [], [], 0, False
    for position in positions.tolist():
        body = reader.body(position)
        if given(body.get("target")) is None:
            continue
        named = True
        try:
            found = [
                reader.find_item(name) for name in ids(reader.ids([position])[0], body, "history")
            ]
        except BadSample as problem:
            logger.warning("%s: left out: %s", reader.name, problem)
            continue
        target, known = (
            reader.find_item(body["target"]),
            [place for place in found if place is not None],
        )
        unknown += target is None
        if target is not None and known:
            histories.append(np.array(known, dtype=np.int64))
            targets.append(target)
    return Recorded(histories, np.array(targets, dtype=np.int64), unknown) if named else None


def next_item_task(
    embedder: Embedder, name: str, task: EvaluationTask, reader: RecordReader
) -> tuple[dict[str, float], list[JsonObject]] | None:
    """Return metrics and examples of recorded sequences; None where the records name no target.

    Collective.
    """
    assert reader.catalogue is not None, (
        "check_task asks for a data set of sequences, which has one"
    )
    asked = recorded(reader, query_positions(reader, task, name))
    if asked is None:
        return None
    if not len(asked.targets):
        raise ConfigurationError(
            f"evaluation.tasks.{name}.split={task.split}: no record of '{task.dataset}' has a "
            f"target and a history item that '{reader.catalogue.name}' has; "
            "check the ids, or choose another split"
        )
    catalogue, config = reader.catalogue, reader.config
    pool = asked.used() if task.candidates == "split" else np.arange(len(catalogue), dtype=np.int64)
    view, target_view = item_view(config.views[task.query]), item_view(config.views[task.target])
    table = embedder.table(catalogue, target_view, pool)
    candidates = StoredSide.of(table, embedder.context.parallel.device)
    shown = [history[-config.history_length :].tolist() for history in asked.histories]
    known = pool if view == target_view else asked.used()
    items = embedder.table(catalogue, view, known)
    vectors, content = represent(embedder, items, known, shown, config.history_length)
    targets = index_of(candidates.positions, asked.targets)
    left_out = [
        place[place >= 0]
        for place in (index_of(candidates.positions, history) for history in asked.histories)
    ]
    repeated = np.array(
        [
            target in history
            for target, history in zip(asked.targets.tolist(), asked.histories, strict=True)
        ],
        dtype=bool,
    )
    result = _ranked(
        embedder, task, reader, candidates, (vectors, content), targets, left_out, repeated
    )
    result |= {
        "candidates": float(len(candidates)),
        "repeated_targets": float(repeated.sum()),
        "unknown_targets": float(asked.unknown_targets),
    }
    rows = np.flatnonzero(targets >= 0)
    if "nmi" in task.metrics and len(rows):
        pairs = Pairs(torch.from_numpy(rows), torch.from_numpy(targets[rows]))
        result |= metrics.pair_agreement(vectors, candidates, pairs, task.clusters)
    chosen = spread(rows)
    found = answers(
        vectors[torch.from_numpy(chosen).to(vectors.device)],
        [left_out[row].tolist() for row in chosen],
        candidates,
        catalogue,
        target_view,
        lambda place, column: column == int(targets[chosen[place]]),
    )
    examples = []
    for row, results in zip(chosen.tolist(), found, strict=True):
        history = [show(catalogue, item, view) for item in shown[row]]
        examples.append(
            {
                "query": {"text": ", ".join(item["text"] for item in history), "items": history},
                "results": results,
            }
        )
    return result, examples


def _ranked(
    embedder: Embedder,
    task: EvaluationTask,
    reader: RecordReader,
    candidates: StoredSide,
    queries: tuple[Tensor, Tensor],
    targets: NDArray[np.int64],
    left_out: list[NDArray[np.int64]],
    repeated: NDArray[np.bool_],
) -> dict[str, float]:
    """Vanilla and filtered recall of the model and of both baselines."""
    device = embedder.context.parallel.device
    excluded = Pairs.of(
        torch.from_numpy(np.repeat(np.arange(len(left_out)), [len(own) for own in left_out])),
        torch.from_numpy(np.concatenate(left_out)),
    ).to(device)
    uses = popularity(embedder, reader)
    result: dict[str, float] = {}
    for way, rows in (
        ("", np.flatnonzero(targets >= 0)),
        ("filtered/", np.flatnonzero((targets >= 0) & ~repeated)),
    ):
        positives = Pairs(torch.from_numpy(rows), torch.from_numpy(targets[rows])).to(device)
        for who, vectors in zip(("", "content_mean/"), queries, strict=True):
            ranks = metrics.best_positive_ranks(
                vectors, candidates, positives, excluded if way else None, embedder.exchange
            )
            found = metrics.recall(ranks, task.recall_at)
            result |= {
                f"{who}{way}{key}": value
                for key, value in found.items()
                if key != "queries" or not who
            }
        if uses is not None:
            hidden = [left_out[row] if way else left_out[row][:0] for row in rows]
            ranks = torch.from_numpy(
                metrics.popularity_ranks(
                    uses[candidates.positions].astype(float), targets[rows], hidden
                )
            )
            result |= {
                f"popularity/{way}{key}": value
                for key, value in metrics.recall(ranks, task.recall_at).items()
                if key != "queries"
            }
    return result
