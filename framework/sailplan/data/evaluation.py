"""Rows for embedding a data set as it is: without augmentation or dropped fields, the same every
time.

Evaluation, mining, balancing and export all read through here. What each row costs is foreseen
before anything is decoded, so that rows of nearly equal lengths are encoded together, and all ranks
know which of them encodes which. Rows of a history view come in groups of history_length;
`text_from` makes one row per held-out entry of an item's record instead of one row per item (unseen
keywords as queries).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.config.schema import Config, ViewConfig
from sailplan.data.costs import RowCosts
from sailplan.data.dealing import sorted_batches
from sailplan.data.decoding import media_of, view_item
from sailplan.data.processor import Processor, ViewRow, processor_of
from sailplan.data.reader import BadSample, RecordReader
from sailplan.data.record import EncoderInputs, Item
from sailplan.data.text import clean
from sailplan.errors import ConfigurationError

logger = logging.getLogger("sailplan.data")


@dataclass(frozen=True)
class RowTask:
    """Rows that are decoded together."""

    positions: NDArray[np.int64]  # of the records
    texts: list[str] | None = None  # of `text_from`, one a record


class EvaluationRows:
    """The rows of a view over some records of a data set.

    positions: int64 [len]: the record of each row (a history's rows share one). group: rows per
    record of a history view, else 1. text_from: a key of the record's JSON that holds language ->
    list of texts, such as held_out_tags: one row per English entry (or of the first language), with
    that entry as its text.
    """

    def __init__(
        self,
        reader: RecordReader,
        view: ViewConfig,
        positions: Sequence[int] | NDArray[np.int64],
        config: Config,
        text_from: str | None = None,
        processor: Processor | None = None,
    ) -> None:
        if text_from and view.of == "history":
            raise ConfigurationError(
                f"query_text={text_from}: a history view of '{reader.name}' cannot take its text "
                "from there"
            )
        self.reader, self.view, self.config = reader, view, config
        self.processor = processor or processor_of(config)
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

    def shares(self, ranks: int) -> list[list[NDArray[np.int64]]]:
        """Return each rank's batches: arrays of row numbers, of at most `evaluation.batch` rows
        (or one history) and of
        `step.token_budget`, every row in one of them."""
        rows = max(1, self.config.evaluation.batch // self.group)
        batches = sorted_batches(
            self._costs().reshape(-1, self.group).sum(1), ranks, rows, self.config.step.token_budget
        )
        places = np.arange(self.group)
        return [
            [(batch[:, None] * self.group + places).reshape(-1) for batch in own] for own in batches
        ]

    def task(self, rows: NDArray[np.int64]) -> RowTask:
        """Return what `make` needs of rows int64 [b], histories whole: small, for a worker."""
        assert (rows[:: self.group] % self.group == 0).all() and len(rows) % self.group == 0, (
            "histories are not cut"
        )
        texts = None if self._texts is None else [self._texts[row] for row in rows.tolist()]
        return RowTask(self.positions[rows[:: self.group]], texts)

    def inputs(self, rows: NDArray[np.int64]) -> tuple[EncoderInputs, Tensor]:
        """Return `make` of these rows int64 [b]."""
        return self.make(self.task(rows))

    def make(self, task: RowTask) -> tuple[EncoderInputs, Tensor]:
        """Return the inputs of a task's rows and their ids int64 [b].

        ids as in ViewBatch: equal for the same document, for text-only views for the same text; -1
        where the row has none of the view's modalities, is past a history's end, or cannot be read
        (a warning names it).
        """
        self.reader.prefetch([task.positions])
        texts: Sequence[str | None] = task.texts or [None] * len(task.positions)
        decoded = [
            row
            for position, text in zip(task.positions.tolist(), texts, strict=True)
            for row in self._rows(position, text)
        ]
        return self.processor.batch(
            decoded, self.processor.tokens(decoded, self.view), self.view
        ), torch.tensor([row.id for row in decoded])

    def _costs(self) -> NDArray[np.int64]:
        """Foreseen cost of each row, int64 [len]."""
        if self._texts is not None:
            tokens = self.processor.tokens([ViewRow(text=text) for text in self._texts], self.view)
            return np.array(
                [self.processor.counted(len(ids), 0, 0, self.view) for ids in tokens],
                dtype=np.int64,
            )
        return (
            RowCosts(self.config, self.processor)
            .foreseen(self.reader, self.view, self.positions[:: self.group], None)
            .costs.reshape(-1)
        )

    def _rows(self, position: int, text: str | None) -> list[ViewRow]:
        """The `group` rows of the record at a position."""
        try:
            record = self.reader.read(position, media=media_of([self.view]), needs=(self.view.of,))
            items: list[Item | None] = (
                list(record.history)
                if self.view.of == "history"
                else [view_item(record, self.view)]
            )
            items += [None] * (self.group - len(items))
            return [
                self.processor.row(item, self.view, self.reader.config, text=text) for item in items
            ]
        except BadSample as problem:
            logger.warning("%s: left out of the evaluation: %s", self.reader.name, problem)
            return [ViewRow() for _ in range(self.group)]


def entry_texts(body: dict[str, object], key: str) -> list[str]:
    """Cleaned texts of a record's JSON entry {language: [text, ...]}: the English ones, else of
    the first language; may be empty.
    """
    languages = body.get(key)
    if not isinstance(languages, dict) or not languages:
        return []
    texts = languages.get("en") or next(iter(languages.values()))
    return [text for text in map(clean, [texts] if isinstance(texts, str) else texts) if text]
