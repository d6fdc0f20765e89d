"""Set completion: which item belongs to a user's others? The collaborative task, with two
baselines beside the model.

Members of a held-out user's history are left out one at a time and looked for among the catalogue,
without the items that the query shows. The model's sequence vector comes from the objective that
represents histories where the run has one, else it is the mean of the items. `content_mean` is that
mean in any case; `popularity` offers everyone what most *training* users have. Histories without a
time order allow no "next item", so this is not one: records that name their target are
`next_item`'s.
"""

from __future__ import annotations

import numpy as np
import torch

from sailplan.config.fields import JsonObject
from sailplan.config.schema import EvaluationTask
from sailplan.curriculum.histories import read_histories
from sailplan.data.excerpt import show
from sailplan.data.reader import RecordReader
from sailplan.embed.embedder import Embedder
from sailplan.embed.scoring import Pairs
from sailplan.embed.sides import StoredSide
from sailplan.errors import ConfigurationError
from sailplan.evaluate import metrics
from sailplan.evaluate.examples import answers, spread
from sailplan.evaluate.retrieval_task import index_of, item_view
from sailplan.evaluate.sequences import popularity, represent
from sailplan.runtime.seeds import generator


def set_completion_task(
    embedder: Embedder, name: str, task: EvaluationTask, reader: RecordReader
) -> tuple[dict[str, float], list[JsonObject]]:
    """Metrics recall@k, mean_rank, mrr, the same under content_mean/ and popularity/, and
    examples. Collective.
    """
    assert reader.catalogue is not None, (
        "check_task asks for a data set of sequences, which has one"
    )
    catalogue, config = reader.catalogue, reader.config
    split = read_histories(reader, None if task.split == "all" else task.split)
    pool = split.used() if task.candidates == "split" else np.arange(len(catalogue), dtype=np.int64)
    view, target_view = item_view(config.views[task.query]), item_view(config.views[task.target])
    table = embedder.table(catalogue, target_view, pool)
    candidates = StoredSide.of(table, embedder.context.parallel.device)
    known = pool if view == target_view else split.used()
    items = embedder.table(catalogue, view, known)
    shown, wanted = metrics.set_completion(
        dict(zip(split.users, split.items, strict=True)), config.history_length
    )
    if task.limit is not None:
        kept = np.sort(generator("evaluation", name).permutation(len(wanted))[: task.limit])
        shown, wanted = [shown[place] for place in kept], [wanted[place] for place in kept]
    if not shown:
        raise ConfigurationError(
            f"evaluation.tasks.{name}.split={task.split}: no history of '{task.dataset}' has two "
            "known items; choose another split"
        )
    targets = index_of(candidates.positions, np.array(wanted, dtype=np.int64))
    left_out = [
        place[place >= 0]
        for place in (
            index_of(candidates.positions, np.array(history, dtype=np.int64)) for history in shown
        )
    ]
    device = embedder.context.parallel.device
    excluded = Pairs.of(
        torch.from_numpy(np.repeat(np.arange(len(shown)), [len(own) for own in left_out])),
        torch.from_numpy(np.concatenate(left_out)),
    ).to(device)
    rows = np.flatnonzero(targets >= 0)
    positives = Pairs(torch.from_numpy(rows), torch.from_numpy(targets[rows])).to(device)
    vectors, content = represent(embedder, items, known, shown, config.history_length)
    result: dict[str, float] = {}
    for prefix, queries in (("", vectors), ("content_mean/", content)):
        ranks = metrics.best_positive_ranks(
            queries, candidates, positives, excluded, embedder.exchange
        )
        result |= {
            prefix + key: value
            for key, value in metrics.recall(ranks, task.recall_at).items()
            if key != "queries" or not prefix
        }
    uses = popularity(embedder, reader)
    if uses is not None:
        hidden = [left_out[row] for row in rows]
        popular = torch.from_numpy(
            metrics.popularity_ranks(
                uses[candidates.positions].astype(float), targets[rows], hidden
            )
        )
        result |= {
            f"popularity/{key}": value
            for key, value in metrics.recall(popular, task.recall_at).items()
            if key != "queries"
        }
    result["candidates"] = float(len(candidates))
    chosen = spread(rows)
    found = answers(
        vectors[torch.from_numpy(chosen).to(device)],
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
