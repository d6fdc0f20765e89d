"""Embedding with one state of the model, each thing once: what is there already is read from the
store.

A stage's start and an evaluation look at the same items through several sets and patterns:
thousands of pairs share a few catalogue items, and mining reads what the subset has just read. So
vectors lie in the store by record and view, catalogue items by their own positions, and only what
is missing is encoded.

All ranks ask for the same things in the same order.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sailplan.config.schema import ViewConfig
from sailplan.data.config import MODALITIES
from sailplan.data.reader import RecordReader
from sailplan.embed.context import RunContext
from sailplan.embed.encoding import ShardEncoder
from sailplan.embed.exchange import exchange_of
from sailplan.embed.fingerprint import fingerprint
from sailplan.embed.item_places import ItemPlaces, find_items
from sailplan.embed.rows import EmbeddedRows
from sailplan.embed.selection import MarkedPositions, Positions, digest_of
from sailplan.embed.store import FUSED, EmbeddingStore, ViewStore
from sailplan.embed.table import EmbeddedTable, SequentialTable, in_memory
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.watch import meet

SIDES = {"target": "item", "query": "query"}  # what a pair's view shows -> its key in the record


class Embedder:
    """Embed views of data sets with the context's encoder as it is now; every call is
    collective.
    """

    def __init__(self, context: RunContext) -> None:
        """Collective. Vectors are kept in the context's store."""
        parallel = context.parallel
        self.context = context
        self.exchange = exchange_of(parallel, context.config.parallel.exchange)
        self.folder = context.store or Path(on_main(parallel, "embedding", tempfile.mkdtemp))
        name = fingerprint(context.encoder, context.config, parallel)
        self.store = EmbeddingStore(self.folder, name, parallel, context.config.store)
        self._views: dict[tuple[str, str, str | None], ViewStore] = {}
        self._items: dict[tuple[str, str, str], tuple[ItemPlaces, MarkedPositions, bool]] = {}

    def close(self) -> None:
        """Remove the vectors, once no rank reads them any more. Collective."""
        meet("the last look at vectors")
        self.context.parallel.barrier()
        on_main(
            self.context.parallel,
            f"removing {self.folder}",
            lambda: shutil.rmtree(self.folder, ignore_errors=True),
        )

    def table(
        self,
        reader: RecordReader,
        view: str | ViewConfig,
        positions: Positions,
        *,
        per_modality: bool = False,
        text_from: str | None = None,
    ) -> EmbeddedTable | SequentialTable:
        """Return a table of a view of the records at `positions`, encoded where they were not.

        view: a name among the data set's views, or another one (catalogue items shown as another
        set's target). per_modality: the modalities' own vectors, too. text_from: take the text from
        this key of the record, one row per entry, so the table may have another length.
        """
        view = reader.config.views[view] if isinstance(view, str) else view
        kinds = (FUSED, *(name for name in MODALITIES if per_modality and name in view.modalities))
        if text_from is not None or view.of == "history":
            store = self._view(reader, view, text_from)
            shards, missing = store.begin(positions, kinds)
            ShardEncoder(self.context, reader, view, positions, shards, text_from).encode(missing)
            store.finish(shards, positions)
            return SequentialTable(shards)
        if reader.config.kind == "pairs" and view.of in SIDES and reader.catalogue is not None:
            places, named, all_named = self._places(reader, positions, SIDES[view.of])
            if all_named:
                item = replace(view, of="item")
                store = self._encoded(reader.catalogue, item, named, kinds)
                return EmbeddedTable(store, positions, places, kinds)
        if len(positions) > 1 and isinstance(positions, np.ndarray):
            rising = bool((np.diff(positions) > 0).all())
            store = self._encoded(
                reader, view, positions if rising else np.unique(positions), kinds
            )
        else:
            store = self._encoded(reader, view, positions, kinds)
        return EmbeddedTable(store, positions, positions, kinds)

    def rows(
        self,
        reader: RecordReader,
        view: str | ViewConfig,
        positions: NDArray[np.int64],
        *,
        per_modality: bool = False,
        text_from: str | None = None,
    ) -> EmbeddedRows:
        """Return `table` in memory: for samples and small sets."""
        table = self.table(reader, view, positions, per_modality=per_modality, text_from=text_from)
        return in_memory(table)

    def catalogue_positions(
        self, reader: RecordReader, positions: Positions, key: str
    ) -> NDArray[np.int64]:
        """Catalogue position of the item that each pair names under `key` (item | query): int64
        [n], -1 where it names none
        or an unknown one."""
        return self._places(reader, positions, key)[0][:]

    def on_device(self, rows: EmbeddedRows) -> Tensor:
        """Return the rows' vectors float32 [n, D] on this rank's device."""
        return rows.fused.to(self.context.parallel.device)

    # ---------------------------------------------------------------- parts
    def _encoded(
        self, reader: RecordReader, view: ViewConfig, positions: Positions, kinds: tuple[str, ...]
    ) -> ViewStore:
        """Return the store of a view, in which rising positions are encoded."""
        store = self._view(reader, view, None)
        shards, missing = store.begin(positions, kinds)
        encoder = ShardEncoder(self.context, reader, view, positions, shards, known=store)
        encoder.encode(missing)
        store.finish(shards, positions)
        return store

    def _view(self, reader: RecordReader, view: ViewConfig, text_from: str | None) -> ViewStore:
        key = (reader.name, repr(view), text_from)
        if key not in self._views:
            self._views[key] = self.store.view(reader, view, text_from)
        return self._views[key]

    def _places(
        self, reader: RecordReader, positions: Positions, key: str
    ) -> tuple[ItemPlaces, MarkedPositions, bool]:
        digest = digest_of(positions)
        if (reader.name, key, digest) not in self._items:
            name = hashlib.sha256(f"{reader.identity} {digest}".encode()).hexdigest()[:16]
            folder = self.store.folder / reader.name / f"{key}-{name}"
            self._items[reader.name, key, digest] = find_items(
                self.context.parallel, reader, positions, key, folder
            )
        return self._items[reader.name, key, digest]
