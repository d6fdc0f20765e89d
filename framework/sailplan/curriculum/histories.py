"""User histories as the collaborative artifacts see them: training users only, as a sparse
user-item matrix.

Held-out users exist for the evaluation alone; this module is the one door through which histories
reach training artifacts, and it lets only the train split through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from sailplan.config.schema import ARTIFACT, Config
from sailplan.data.reader import RecordReader
from sailplan.data.writer import Record, write_shards
from sailplan.errors import BadDataError, ConfigurationError


@dataclass(frozen=True)
class Histories:
    """Training users (or, asked for, others) and the distinct catalogue items that each used."""

    users: list[str]
    items: list[list[int]]  # catalogue positions per user, in the record's order, each once
    unknown: int  # ids that the catalogue does not hold, left out

    def used(self) -> np.ndarray:
        """Sorted catalogue positions int64 [m] that some user used."""
        return np.unique(
            np.concatenate(
                [np.asarray(items, dtype=np.int64) for items in self.items]
                or [np.empty(0, dtype=np.int64)]
            )
        )

    def matrix(self, used: np.ndarray) -> sparse.csr_matrix:
        """Binary user-item matrix float64 [users, m]; column c is catalogue position used[c]."""
        rows = np.repeat(np.arange(len(self.items)), [len(items) for items in self.items])
        columns = np.searchsorted(
            used,
            np.concatenate(
                [np.asarray(items, dtype=np.int64) for items in self.items] or [used[:0]]
            ),
        )
        return sparse.csr_matrix(
            (np.ones(len(rows)), (rows, columns)), shape=(len(self.items), len(used))
        )


def read_histories(reader: RecordReader, split: str | None = "train") -> Histories:
    """All histories of a split (None: of all) of a `sequences` data set.

    `items`, or `history` and `target`, are a user's items.

    Raises BadDataError when the split holds no history with a known item.
    """
    assert reader.catalogue is not None
    users, items, unknown = [], [], 0
    for position in reader.positions(split):
        found = [
            reader.catalogue.find(name) for name in dict.fromkeys(reader.item_ids(int(position)))
        ]
        known = [place for place in found if place is not None]
        unknown += len(found) - len(known)
        if known:
            users += reader.ids([position])
            items.append(known)
    if not users:
        raise BadDataError(
            f"data.sets.{reader.name}: no history of the split '{split}' names an item of the "
            f"catalogue '{reader.catalogue.name}'; "
            "expected some; check the split and the ids"
        )
    return Histories(users, items, unknown)


def source_of_histories(config: Config, catalogue: str) -> str:
    """Name of the sequences data set with recorded histories over a catalogue.

    Raises ConfigurationError unless there is exactly one.
    """
    found = [
        name
        for name, dataset in config.data.sets.items()
        if dataset.kind == "sequences"
        and dataset.catalogue == catalogue
        and not dataset.shards.startswith(ARTIFACT)
    ]
    if len(found) != 1:
        raise ConfigurationError(
            f"data.sets: {len(found)} sequences data sets with recorded histories over "
            f"'{catalogue}' ({', '.join(found) or 'none'}): "
            "expected exactly one, the stage's artifacts are made from it"
        )
    return found[0]


def write_artifact(bodies: Sequence[dict[str, object]], folder: Path, name: str) -> None:
    """JSON records (each with an id "NAME/KEY") as webdataset shards folder/NAME-*.tar, the same
    bytes every time.
    """
    write_shards([Record(body) for body in bodies], folder, name, per_shard=4096)
