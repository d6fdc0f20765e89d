"""The embedding store: vectors of views on disk, made once by the rank that owns them, read by all.

    FOLDER/FINGERPRINT/DATASET/VIEW/REQUEST/...     see `embed.shards`

A folder's vectors belong to one state of the model, its fingerprint's; those of another state are
removed when the store is opened. What is asked of a view at once is a request; positions that an
earlier request of the view has are not encoded again. A request that was cut short is gone on with:
the shards that are there stay.

All ranks must see the folder. All ranks ask for the same things in the same order; rank 0 alone
looks which shards are there, so that all have one answer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sailplan.config.fields import JsonObject
from sailplan.config.schema import ViewConfig
from sailplan.data.reader import RecordReader
from sailplan.embed.config import StoreConfig
from sailplan.embed.rows import EmbeddedRows
from sailplan.embed.selection import Positions, digest_of
from sailplan.embed.shards import COMPLETE, REQUEST, Shards
from sailplan.runtime.files import write_whole
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import sum_over_ranks
from sailplan.runtime.watch import meet

FUSED = "fused"
SHARDS, FEWEST_ROWS = 16, 1024  # of a rank's share, unless a shard had fewer rows


class EmbeddingStore:
    """The vectors of one state of a model below a folder."""

    def __init__(
        self, folder: Path, fingerprint: str, parallel: Parallel, settings: StoreConfig
    ) -> None:
        """Collective; removes what other states of the model left in the folder."""
        self.folder, self.parallel, self.settings = folder / fingerprint, parallel, settings

        def clear() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            for other in folder.iterdir():
                if other.name != fingerprint:
                    shutil.rmtree(other, ignore_errors=True)

        on_main(parallel, f"opening the embedding store {folder}", clear)

    def view(self, reader: RecordReader, view: ViewConfig, text_from: str | None) -> ViewStore:
        """Return the store of a view of a data set."""
        about = f"{reader.identity} {reader.name} {view!r} {text_from}"
        if reader.catalogue is not None:
            about += f" {reader.catalogue.identity}"
        digest = hashlib.sha256(about.encode()).hexdigest()[:16]
        return ViewStore(self, self.folder / reader.name / digest)


class ViewStore:
    """Vectors of one view of a data set, by record position."""

    def __init__(self, store: EmbeddingStore, folder: Path) -> None:
        self.store, self.folder = store, folder
        self._complete: dict[str, Shards] = {}
        self._looked = False

    def begin(self, positions: Positions, kinds: Sequence[str]) -> tuple[Shards, list[int]]:
        """Return a request's shards and the numbers of those that are to be encoded. Collective.

        positions: rising. kinds: fused, and the modalities whose own vectors are wanted.
        """
        about: dict[str, object] = {"positions": digest_of(positions), "kinds": list(kinds)}
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        if name in self._complete:
            return self._complete[name], []
        parallel, settings = self.store.parallel, self.store.settings
        # As many shards for each rank, of at most shard_rows, and small ones of a small share: a
        # rank holds one
        ranks = parallel.data_parallel_size
        share = -(-len(positions) // ranks)
        each = -(-share // min(settings.shard_rows, max(FEWEST_ROWS, -(-share // SHARDS))))
        about |= {
            "count": len(positions),
            "size": max(1, -(-len(positions) // max(1, ranks * each))),
            "precision": settings.precision,
        }

        def look() -> JsonObject:
            folder = self.folder / name
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / REQUEST).is_file():
                write_whole(folder / REQUEST, json.dumps(about))
            found = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
            done = (folder / COMPLETE).is_file()
            earlier = {} if self._looked else self._on_disk()
            missing = [] if done else Shards(folder, found).missing()
            return {"about": found, "done": done, "missing": missing, "earlier": earlier}

        found = on_main(parallel, f"looking into {self.folder}", look)
        self._looked = True
        for other, what in found["earlier"].items():
            self._complete.setdefault(other, Shards(self.folder / other, what))
        shards = Shards(self.folder / name, found["about"])
        if found["done"]:
            self._complete[name] = shards
        return shards, found["missing"]

    def finish(self, shards: Shards, positions: Positions) -> None:
        """Note that all shards of a request are there. Collective."""
        if shards.folder.name in self._complete:
            return
        parallel = self.store.parallel
        meet(f"encoding of {self.folder}")
        rows = np.zeros(len(shards), dtype=np.int64)
        for shard in range(parallel.rank, len(shards), parallel.world_size):
            rows[shard] = shards.rows_of(shard)
        rows = sum_over_ranks(rows)
        starts = np.arange(0, shards.count, shards.size, dtype=np.int64)
        on_main(
            parallel, f"finishing {shards.folder}", lambda: shards.finish(rows, positions[starts])
        )
        self._complete[shards.folder.name] = shards

    def known(self, positions: NDArray[np.int64], kinds: Sequence[str]) -> NDArray[np.bool_]:
        """Return which of rising positions int64 [k] complete requests have, with these kinds."""
        found = np.zeros(len(positions), dtype=bool)
        for shards in self._with(kinds):
            left = np.flatnonzero(~found)
            found[left] = shards.find(positions[left])[0]
        return found

    def read(self, positions: NDArray[np.int64], kinds: Sequence[str]) -> EmbeddedRows:
        """Return the rows of rising positions int64 [k]; no kinds: ids alone, with vectors of no
        dimension.
        """
        ids = np.full(len(positions), -1, dtype=np.int64)
        vectors: dict[str, NDArray[np.float32]] = {}
        left = np.arange(len(positions))
        for shards in self._with(kinds):
            if not len(left):
                break
            here, found, parts = shards.find(positions[left], kinds)
            ids[left[here]] = found
            for kind, part in parts.items():
                if here.all() and len(left) == len(positions):
                    vectors[kind] = part
                elif here.any():
                    whole = vectors.setdefault(
                        kind, np.zeros((len(positions), part.shape[1]), np.float32)
                    )
                    whole[left[here]] = part
            left = left[~here]
        assert not len(left), "rows are read after they were encoded"
        return block(positions, ids, vectors)

    def _with(self, kinds: Sequence[str]) -> list[Shards]:
        """Return the complete requests that have these kinds, the largest first."""
        found = [one for one in self._complete.values() if set(kinds) <= set(one.kinds)]
        return sorted(found, key=lambda one: -one.count)

    def _on_disk(self) -> dict[str, object]:
        return {
            path.parent.name: json.loads((path.parent / REQUEST).read_text(encoding="utf-8"))
            for path in sorted(self.folder.glob(f"*/{COMPLETE}"))
        }


def block(
    positions: NDArray[np.int64], ids: NDArray[np.int64], vectors: dict[str, NDArray[np.float32]]
) -> EmbeddedRows:
    """Return rows of arrays; without the fused kind vectors have no dimension."""
    parts = {kind: torch.from_numpy(part) for kind, part in vectors.items()}
    fused = parts.pop(FUSED, torch.zeros(len(positions), 0))
    return EmbeddedRows(fused, torch.from_numpy(ids), positions, ids >= 0, parts)
