"""Embed a view of a small set into memory, for whoever has no run around it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sailplan.config.schema import Config, ViewConfig
from sailplan.data.reader import RecordReader
from sailplan.embed.context import RunContext
from sailplan.embed.embedder import Embedder
from sailplan.embed.rows import EmbeddedRows
from sailplan.runtime.process import Parallel


def embed_view(
    encoder: nn.Module,
    reader: RecordReader,
    view: str | ViewConfig,
    positions: NDArray[np.int64],
    *,
    parallel: Parallel,
    config: Config,
    per_modality: bool = False,
    text_from: str | None = None,
) -> EmbeddedRows:
    """Return the rows of the records at `positions` int64 [k], on every rank. Collective; all
    ranks are on one node.

    As `Embedder.rows`, with a store that is gone afterwards. n * D * 4 bytes.
    """
    embedder = Embedder(RunContext(config, parallel, encoder, {}, {reader.name: reader}))
    rows = embedder.rows(reader, view, positions, per_modality=per_modality, text_from=text_from)
    embedder.close()
    return rows
