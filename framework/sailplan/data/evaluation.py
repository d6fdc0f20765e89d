"""Rows for embedding a data set as it is: in order, without augmentation or dropped fields, the same every time.

Evaluation, mining, balancing and export all read through here. The number of rows is known before anything is
decoded, so that every rank can take an equal slice and run the same number of forward passes. Rows of a history
view come in groups of history_length; `text_from` makes one row per held-out entry of an item's record instead of
one row per item (unseen keywords as queries).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.config.schema import DataConfig, ViewConfig
from sailplan.data.collate import media_of, view_item
from sailplan.data.reader import BadSample, RecordReader
from sailplan.data.record import EncoderInputs, Item
from sailplan.data.text import clean
from sailplan.data.views import ViewDecoder, ViewRow, shared_decoder
from sailplan.errors import ConfigurationError

logger = logging.getLogger("sailplan.data")


class EvaluationRows:
    """The rows of a view over some records of a data set.

    positions: int64 [len]: the record of each row (a history's rows share one). group: rows per record of a history
    view, else 1. text_from: a key of the record's JSON that holds language -> list of texts, such as held_out_tags:
    one row per English entry (or of the first language), with that entry as its text.
    """

    def __init__(
        self,
        reader: RecordReader,
        view: ViewConfig,
        positions: Sequence[int] | NDArray[np.int64],
        config: DataConfig,
        text_from: str | None = None,
        decoder: ViewDecoder | None = None,
    ) -> None:
        if text_from and view.of == "history":
            raise ConfigurationError(f"query_text={text_from}: a history view of '{reader.name}' cannot take its text from there")
        self.reader, self.view, self.config = reader, view, config
        self.decoder = decoder or shared_decoder(config)
        self.group = reader.config.history_length if view.of == "history" else 1
        given = np.asarray(positions, dtype=np.int64)
        self._texts: list[str] | None = None
        if text_from:
            found = [entry_texts(reader.body(int(position)), text_from) for position in given]
            self._texts = [text for texts in found for text in texts]
            self.positions = np.repeat(given, [len(texts) for texts in found])
        else:
            self.positions = np.repeat(given, self.group)

    def __len__(self) -> int:
        return len(self.positions)

    def batches(self, batch: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[EncoderInputs, NDArray[np.int64], Tensor]]:
        """(inputs of b rows, record positions int64 [b], ids int64 [b]) over rows start .. stop - 1, at most `batch` each.

        ids as in ViewBatch: equal for the same document, for text-only views for the same text; -1 where the row has
        none of the view's modalities, is past a history's end, or cannot be read (a warning names it). `start` and
        `batch` must be multiples of `group`.
        """
        assert batch % self.group == 0 and start % self.group == 0, "histories are not cut"
        end = len(self) if stop is None else min(stop, len(self))
        for first in range(start, end, batch):
            rows = [row for place in range(first, min(first + batch, end), self.group) for row in self._rows(place)]
            tokens = self.decoder.tokens(rows, self.view)
            yield (
                self.decoder.inputs(rows, tokens, self.view),
                self.positions[first : first + len(rows)],
                torch.tensor([row.id for row in rows]),
            )

    def _rows(self, place: int) -> list[ViewRow]:
        """The `group` rows that start at row `place`."""
        text = self._texts[place] if self._texts is not None else None
        try:
            record = self.reader.read(int(self.positions[place]), media=media_of([self.view]), needs=(self.view.of,))
            items: list[Item | None] = list(record.history) if self.view.of == "history" else [view_item(record, self.view)]
            items += [None] * (self.group - len(items))
            return [self.decoder.row(item, self.view, self.reader.config, text=text) for item in items]
        except BadSample as problem:
            logger.warning("%s: left out of the evaluation: %s", self.reader.name, problem)
            return [ViewRow() for _ in range(self.group)]


def entry_texts(body: dict[str, object], key: str) -> list[str]:
    """Cleaned texts of a record's JSON entry {language: [text, ...]}: the English ones, else of the first language; may be empty."""
    languages = body.get(key)
    if not isinstance(languages, dict) or not languages:
        return []
    texts = languages.get("en") or next(iter(languages.values()))
    return [text for text in map(clean, [texts] if isinstance(texts, str) else texts) if text]
