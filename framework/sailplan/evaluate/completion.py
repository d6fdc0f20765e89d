"""Set completion: which item belongs to a user's others? The collaborative task, with two baselines beside the model.

Members of a held-out user's history are left out one at a time and looked for among the catalogue, without the
items that the query shows. The model's sequence vector comes from the objective that represents histories where the run has one, else it
is the mean of the items. `content_mean` is that mean in any case; `popularity` offers everyone what most
*training* users have. Histories without a time order allow no "next item", so this is not one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.config.schema import EvaluationTask
from sailplan.curriculum.histories import read_histories
from sailplan.data.excerpt import show
from sailplan.data.reader import RecordReader
from sailplan.embed.embedder import Embedder
from sailplan.embed.embedding import EmbeddedRows, evaluating
from sailplan.embed.scoring import Pairs, unit
from sailplan.errors import ConfigurationError
from sailplan.evaluate import metrics
from sailplan.evaluate.examples import answers, spread
from sailplan.evaluate.sides import index_of, item_view
from sailplan.objective.protocol import HistoryObjective
from sailplan.runtime.seeds import generator


def set_completion_task(
    embedder: Embedder, name: str, task: EvaluationTask, reader: RecordReader
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics recall@k, mean_rank, mrr, the same under content_mean/ and popularity/, and examples. Collective."""
    assert reader.catalogue is not None, "check_task asks for a data set of sequences, which has one"
    catalogue, config = reader.catalogue, reader.config
    split = read_histories(reader, None if task.split == "all" else task.split)
    pool = split.used() if task.candidates == "split" else np.arange(len(catalogue), dtype=np.int64)
    view, target_view = item_view(config.views[task.query]), item_view(config.views[task.target])
    candidates = embedder.rows(catalogue, target_view, pool)
    candidates = candidates.where(candidates.valid)
    items = embedder.rows(catalogue, view, pool if view == target_view else split.used())
    shown, wanted = metrics.set_completion(dict(zip(split.users, split.items, strict=True)), config.history_length)
    if task.limit is not None:
        kept = np.sort(generator("evaluation", name).permutation(len(wanted))[: task.limit])
        shown, wanted = [shown[place] for place in kept], [wanted[place] for place in kept]
    if not shown:
        raise ConfigurationError(
            f"evaluation.tasks.{name}.split={task.split}: no history of '{task.dataset}' has two known items; choose another split"
        )
    targets = index_of(candidates.positions, np.array(wanted, dtype=np.int64))
    left_out = [place[place >= 0] for place in (index_of(candidates.positions, np.array(history, dtype=np.int64)) for history in shown)]
    device, where = embedder.context.parallel.device, embedder.on_device(candidates)
    excluded = Pairs.of(
        torch.from_numpy(np.repeat(np.arange(len(shown)), [len(own) for own in left_out])), torch.from_numpy(np.concatenate(left_out))
    ).to(device)
    rows = np.flatnonzero(targets >= 0)
    positives = Pairs(torch.from_numpy(rows), torch.from_numpy(targets[rows])).to(device)
    vectors, content = _represent(embedder, items, shown, config.history_length)
    result: dict[str, float] = {}
    for prefix, queries in (("", vectors), ("content_mean/", content)):
        ranks = metrics.best_positive_ranks(queries, where, positives, excluded, embedder.exchange)
        result |= {prefix + key: value for key, value in metrics.recall(ranks, task.recall_at).items() if key != "queries" or not prefix}
    popular = _popularity(reader, candidates, targets[rows], [left_out[row] for row in rows])
    result |= {f"popularity/{key}": value for key, value in metrics.recall(popular, task.recall_at).items() if key != "queries"}
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
        examples.append({"query": {"text": ", ".join(item["text"] for item in history), "items": history}, "results": results})
    return result, examples


def _represent(embedder: Embedder, items: EmbeddedRows, shown: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """(the model's sequence vectors, the means of the unit item vectors), both [n, D] on the device."""
    index = np.full((len(shown), length), -1, dtype=np.int64)
    for row, history in enumerate(shown):
        index[row, : len(history)] = index_of(items.positions, np.array(history, dtype=np.int64))
    index[~items.valid[index.clip(min=0)]] = -1
    device = embedder.context.parallel.device
    valid = torch.from_numpy(index >= 0).to(device)
    fused = embedder.on_device(items)[torch.from_numpy(index.clip(min=0)).to(device)]
    content = (unit(fused) * valid.unsqueeze(-1)).sum(1) / valid.sum(1, keepdim=True).clamp_min(1)
    learned = next((each for each in embedder.context.objectives.values() if isinstance(each, HistoryObjective)), None)
    if learned is None:
        return content, content
    with evaluating(learned):
        return learned.represent(fused.flatten(0, 1), valid.flatten(), length), content


def _popularity(reader: RecordReader, candidates: EmbeddedRows, targets: NDArray[np.int64], left_out: list[NDArray[np.int64]]) -> Tensor:
    """Ranks int64 [n] of the targets by how many training users have each candidate."""
    train = read_histories(reader, "train")
    assert reader.catalogue is not None
    uses = np.bincount(np.concatenate([np.asarray(items) for items in train.items]), minlength=len(reader.catalogue))
    return torch.from_numpy(metrics.popularity_ranks(uses[candidates.positions].astype(float), targets, left_out))
