"""Embedding with one state of the model, each thing once.

A stage's start and an evaluation look at the same items through several sets and patterns:
thousands of pairs share a few catalogue items, and mining reads what the subset has just read. The
embedder keeps every vector it has made, by catalogue item and view, and encodes only what is
missing. Its memory is bounded by the items seen; it is thrown away with the model state it belongs
to.

All ranks ask for the same things in the same order, so what is missing is the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sailplan.config.schema import ViewConfig
from sailplan.data.reader import RecordReader
from sailplan.embed.context import RunContext
from sailplan.embed.embedding import EmbeddedRows, embed_view
from sailplan.embed.exchange import exchange_of


@dataclass
class _Known:
    """Rows of one view so far; place[position] is the row, -1 where not embedded yet."""

    rows: EmbeddedRows | None
    place: NDArray[np.int64]


class Embedder:
    """Embed views of data sets with the context's encoder as it is now; every call is
    collective.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.exchange = exchange_of(context.parallel, context.config.parallel.exchange)
        self._known: dict[tuple[str, str, bool], _Known] = {}
        self._catalogue: dict[tuple[str, str], NDArray[np.int64]] = {}

    def rows(
        self,
        reader: RecordReader,
        view: str | ViewConfig,
        positions: NDArray[np.int64],
        *,
        per_modality: bool = False,
        text_from: str | None = None,
    ) -> EmbeddedRows:
        """As `embed_view`: the rows of the positions int64 [n], in their order."""
        view = reader.config.views[view] if isinstance(view, str) else view
        if text_from is not None or view.of == "history":
            return self._embed(reader, view, positions, per_modality, text_from)
        side = {"target": "item", "query": "query"}.get(view.of)
        if reader.config.kind == "pairs" and side is not None:
            items = self.catalogue_positions(reader, positions, side)
            if (items >= 0).all() and len(items):
                assert reader.catalogue is not None
                shown = self.rows(
                    reader.catalogue, replace(view, of="item"), items, per_modality=per_modality
                )
                return replace(shown, positions=np.asarray(positions, dtype=np.int64))
        return self._from_known(reader, view, positions, per_modality)

    def catalogue_positions(
        self, reader: RecordReader, positions: NDArray[np.int64], key: str
    ) -> NDArray[np.int64]:
        """Catalogue position of the item that each pair names under `key` (item | query): int64
        [n], -1 where it names none
        or an unknown one."""
        table = self._catalogue.setdefault(
            (reader.name, key), np.full(len(reader), -2, dtype=np.int64)
        )
        for position in positions[table[positions] == -2]:
            found = reader.find_item(reader.body(int(position)).get(key))
            table[position] = -1 if found is None else found
        return table[positions]

    def on_device(self, rows: EmbeddedRows) -> Tensor:
        """Return the rows' vectors float32 [n, D] on this rank's device."""
        return rows.fused.to(self.context.parallel.device)

    def _from_known(
        self,
        reader: RecordReader,
        view: ViewConfig,
        positions: NDArray[np.int64],
        per_modality: bool,
    ) -> EmbeddedRows:
        # Several modalities: their own vectors cost little beside the fused one, and may be asked
        # for next.
        per_modality = per_modality or len(view.modalities) > 1
        known = self._known.setdefault(
            (reader.name, repr(view), per_modality),
            _Known(None, np.full(len(reader), -1, dtype=np.int64)),
        )
        missing = np.unique(positions[known.place[positions] < 0])
        if len(missing) or known.rows is None:
            fresh = self._embed(reader, view, missing, per_modality, None)
            known.place[missing] = np.arange(len(fresh)) + (
                0 if known.rows is None else len(known.rows)
            )
            known.rows = fresh if known.rows is None else known.rows.joined(fresh)
        return known.rows.take(known.place[positions])

    def _embed(
        self,
        reader: RecordReader,
        view: ViewConfig,
        positions: NDArray[np.int64],
        per_modality: bool,
        text_from: str | None,
    ) -> EmbeddedRows:
        run = self.context
        return embed_view(
            run.encoder,
            reader,
            view,
            positions,
            parallel=run.parallel,
            config=run.config,
            per_modality=per_modality,
            text_from=text_from,
        )
