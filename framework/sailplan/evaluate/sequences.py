"""What tasks on histories share: the vector of a history by the model and by its mean, and what
most training records have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.data.reader import RecordReader
from sailplan.embed.context import RunContext
from sailplan.embed.embedder import Embedder
from sailplan.embed.encoding import evaluating
from sailplan.embed.sides import unit
from sailplan.embed.table import Table
from sailplan.evaluate.retrieval_task import index_of
from sailplan.objective.protocol import HistoryObjective
from sailplan.runtime.watch import together

HISTORIES = 1024  # represented at once


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
    embedder: Embedder,
    table: Table,
    positions: NDArray[np.int64],
    shown: Sequence[Sequence[int]],
    length: int,
) -> tuple[Tensor, Tensor]:
    """Return (the model's sequence vectors, the means of the unit item vectors), both [n, D] on
    the device. All ranks call it alike, as a learned representation may be a collective.

    table: of the items at rising catalogue positions [m]. shown: catalogue positions of each
    history, at most `length`. The model's are those of the objective that represents histories
    (`history_objective`) where the run has one, else the means. Items are read for HISTORIES
    histories at a time: HISTORIES * length * D * 4 bytes beside the result.
    """
    learned, found, means = history_objective(embedder.context), [], []
    for start in range(0, len(shown), HISTORIES):
        together()
        fused, valid = _items(embedder, table, positions, shown[start : start + HISTORIES], length)
        rows = valid.sum(1, keepdim=True).clamp_min(1)
        means.append((unit(fused) * valid.unsqueeze(-1)).sum(1) / rows)
        if learned is not None:
            with evaluating(learned):
                found.append(learned.represent(fused.flatten(0, 1), valid.flatten(), length))
    content = torch.cat(means)
    return torch.cat(found) if found else content, content


def _items(
    embedder: Embedder,
    table: Table,
    positions: NDArray[np.int64],
    shown: Sequence[Sequence[int]],
    length: int,
) -> tuple[Tensor, Tensor]:
    """Return the vectors [b, length, D] of histories' items, and bool [b, length] which there are."""
    counts = np.array([len(history) for history in shown])
    there = np.arange(length) < counts[:, None]
    index = np.full(there.shape, -1, dtype=np.int64)
    index[there] = index_of(positions, np.concatenate([np.asarray(each) for each in shown]))
    wanted = np.unique(index[index >= 0])
    items = table.take(wanted)
    place = np.searchsorted(wanted, index).clip(max=len(wanted) - 1)
    valid = (index >= 0) & np.asarray(items.valid)[place]
    device = embedder.context.parallel.device
    fused = embedder.on_device(items)[torch.from_numpy(place).to(device)]
    return fused, torch.from_numpy(valid).to(device)


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
