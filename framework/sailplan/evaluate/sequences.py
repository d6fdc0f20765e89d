"""What tasks on histories share: the vector of a history by the model and by its mean, and what
most training records have.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.data.reader import RecordReader
from sailplan.embed.context import RunContext
from sailplan.embed.embedder import Embedder
from sailplan.embed.encoding import evaluating
from sailplan.embed.rows import EmbeddedRows
from sailplan.embed.sides import unit
from sailplan.evaluate.retrieval_task import index_of
from sailplan.objective.protocol import HistoryObjective


def history_objective(context: RunContext) -> HistoryObjective | None:
    """Return the objective that represents histories, whatever its entry is called; None where
    the run has none.

    Of several it is the one that the run trains, in its last stage that trains any: an entry that
    is only there would be its own baseline.
    """
    found = {
        name: each
        for name, each in context.objectives.items()
        if isinstance(each, HistoryObjective)
    }
    for stage in reversed(context.config.order):
        weights = context.config.stages[stage].objectives
        trained = [name for name in found if weights.get(name)]
        if trained:
            return found[max(trained, key=lambda name: weights[name])]
    return next(iter(found.values()), None)


def represent(
    embedder: Embedder, items: EmbeddedRows, shown: list[list[int]], length: int
) -> tuple[Tensor, Tensor]:
    """Return (the model's sequence vectors, the means of the unit item vectors), both [n, D] on
    the device.

    shown: catalogue positions of each history, at most `length`. The model's are those of the
    objective that represents histories (`history_objective`) where the run has one, else the means.
    """
    index = np.full((len(shown), length), -1, dtype=np.int64)
    for row, history in enumerate(shown):
        index[row, : len(history)] = index_of(items.positions, np.array(history, dtype=np.int64))
    index[~items.valid[index.clip(min=0)]] = -1
    device = embedder.context.parallel.device
    valid = torch.from_numpy(index >= 0).to(device)
    fused = embedder.on_device(items)[torch.from_numpy(index.clip(min=0)).to(device)]
    content = (unit(fused) * valid.unsqueeze(-1)).sum(1) / valid.sum(1, keepdim=True).clamp_min(1)
    learned = history_objective(embedder.context)
    if learned is None:
        return content, content
    with evaluating(learned):
        return learned.represent(fused.flatten(0, 1), valid.flatten(), length), content


def popularity(embedder: Embedder, reader: RecordReader) -> NDArray[np.int64] | None:
    """Return how many training records have each catalogue item, int64 [catalogue]; None without
    a training record.

    Collective: each data-parallel rank reads its share of the records.
    """
    assert reader.catalogue is not None, "sequences have a catalogue"
    exchange, count = embedder.exchange, reader.count("train")
    uses = np.zeros(len(reader.catalogue), dtype=np.int64)
    share = np.arange(
        count * exchange.rank // exchange.world_size,
        count * (exchange.rank + 1) // exchange.world_size,
    )
    for position in reader.select("train", share).tolist() if len(share) else []:
        found = map(reader.find_item, reader.item_ids(position))
        uses[list({place for place in found if place is not None})] += 1
    total = exchange.sum(torch.from_numpy(uses).to(embedder.context.parallel.device)).cpu().numpy()
    return total if total.any() else None
