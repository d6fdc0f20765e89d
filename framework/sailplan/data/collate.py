"""From a step's plan to this rank's StepBatch: read, decode every needed view once, sort the
distinct items by length, cut them into micro-batches.

Which rows are this rank's, and how many micro-batches a view has, `shares` tells. Everything random
about a row comes from (seed, stage, step, data set, row number) through `row_seeds`, all that is
random about an item from its place in its data set through `item_seed`: it is the same on any rank,
worker and restart, and an item that several rows show is encoded once for all of them.
A record that cannot be used (broken bytes or JSON, unknown ids) is replaced by the plan's spare for
that row, which is equally deterministic, and reported in `quarantined`; so is one on the list of
exclusions, of which nothing is read or reported. An item that merely lacks a
declared modality is no error: its row is not valid in that view and the pattern's mean leaves it
out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from sailplan.config.schema import Config, DatasetConfig, PatternKey, StageConfig, ViewConfig
from sailplan.data.costs import RowCosts
from sailplan.data.dealing import cut, micro_batches_needed
from sailplan.data.decoding import ItemDecoder, media_of, view_item
from sailplan.data.exclusions import Exclusions
from sailplan.data.negatives import HardNegativeStore
from sailplan.data.order import seeds
from sailplan.data.plan import Plan, PlannedRows
from sailplan.data.processor import ViewRow, processor_of
from sailplan.data.read_ahead import ReadAhead
from sailplan.data.reader import BadSample, RecordReader
from sailplan.data.record import (
    BadRecord,
    EncoderInputs,
    HardNegatives,
    Record,
    StepBatch,
    TeacherKey,
    ViewBatch,
    ViewKey,
)
from sailplan.data.row_values import labels, log_probabilities, teacher_scores
from sailplan.data.shares import PartShares, ShownViews, StepShares, row_seeds, shown_views
from sailplan.data.teachers import Teachers
from sailplan.errors import BadDataError
from sailplan.runtime.seeds import derive

SPARES = 16  # replacements read for one row
DRAWS = 1024  # and drawn, those that are left out included
SEQUENCE = derive("sequence")


@dataclass
class _Rows:
    """The rows of a part while they are gathered."""

    records: list[Record] = field(default_factory=list)
    views: dict[ViewKey, list[ViewRow]] = field(default_factory=dict)  # view -> r * g rows
    positions: list[int] = field(default_factory=list)
    quarantined: list[BadRecord] = field(default_factory=list)


class _Wanted(NamedTuple):
    """What the rows of a part show of their records."""

    views: list[str]
    media: frozenset[str]
    needs: set[str]


class Collator:
    """Makes the step batches of one data-parallel rank; a pure function of the step number and
    of the records that are left out.

    first_step: of the stage, as `exclusions` count them.
    """

    def __init__(
        self,
        config: Config,
        stage: StageConfig,
        plan: Plan,
        readers: Mapping[str, RecordReader],
        rank: int = 0,
        size: int = 1,
        negatives: HardNegativeStore | None = None,
        teachers: Teachers | None = None,
        exclusions: Exclusions | None = None,
        first_step: int = 1,
    ) -> None:
        self.config, self.stage, self.plan, self.readers = config, stage, plan, dict(readers)
        self.rank, self.size, self.negatives, self.teachers = rank, size, negatives, teachers
        self.exclusions = exclusions if exclusions is not None else Exclusions()
        self.first_step = first_step
        self.processor = processor_of(config)
        self.costs = RowCosts(config, self.processor)
        self.shares = StepShares(config, stage, plan, self.readers, self.costs, size, negatives)
        self.ahead = ReadAhead(config, plan, self.readers, self.shares, rank, size)

    def batches(self, step: int) -> list[StepBatch]:
        """One StepBatch per data set of the step (one, or several in a mixed step).

        Raises BadDataError when a row finds no usable spare.
        """
        self.ahead.upto(step)
        digest = self.plan.digest(step)
        return [
            self._batch(step, part, shares, digest)
            for part, shares in zip(self.plan.step(step).parts, self.shares.step(step), strict=True)
        ]

    def _batch(self, step: int, part: PlannedRows, shares: PartShares, digest: str) -> StepBatch:
        reader = self.readers[part.dataset]
        dataset = reader.config
        shown = shown_views(self.stage, part.dataset, dataset, self.negatives)
        names, mined = shown.views, self.negatives.positions if self.negatives is not None else {}
        rows = _Rows(views={key: [] for key in shown.keys})
        own = np.flatnonzero(shares.owners == self.rank)
        of_rows = row_seeds(
            self.config.seed, self.plan.stage_name, step, part.dataset, part.first_row + own
        )
        of_records = seeds(of_rows, SEQUENCE)
        needs = {dataset.views[name].of for name in names} | {"negatives"}
        wanted = _Wanted(names, media_of([dataset.views[name] for name in names]), needs)
        decoder = ItemDecoder(
            self.processor,
            dataset,
            derive(self.config.seed, self.plan.stage_name, step, part.dataset),
            {key: view for view, keys in shown.encoded.items() for key in keys},
        )
        for row, position, seed in zip(
            (part.first_row + own).tolist(), part.at(own).tolist(), of_records.tolist(), strict=True
        ):
            used = self._add_row(rows, reader, decoder, wanted, step, row, position, seed)
            for name, (count, of_record) in shown.negatives.items():
                places = (
                    mined[PatternKey(part.dataset, name)][used]
                    if count
                    else np.empty(0, dtype=np.int64)
                )
                key = HardNegatives(name)
                rows.views[key] += self._negatives(rows, reader, decoder, key, places, step)
                rows.views[key] += decoder.rows(rows.records[-1].negatives, key, of_record)
        return StepBatch(
            step=step,
            dataset=part.dataset,
            record_ids=[record.id for record in rows.records],
            views=self._view_batches(rows.views, shown, dataset, shares.micro_batches),
            scores=torch.tensor([record.score for record in rows.records], dtype=torch.float32)
            if reader.scored
            else None,
            teacher_scores=None
            if dataset.teacher_scores is None
            else teacher_scores(rows.records, dataset.negatives),
            labels=None if dataset.label is None else labels(rows.records),
            target_log_probability=log_probabilities(rows.records, dataset.negatives),
            teachers=self._teachers(rows.records, {name: dataset.views[name] for name in names}),
            patterns=shown.patterns,
            positions=rows.positions,
            quarantined=rows.quarantined,
            digest=digest,
            rank_rows=tuple(np.bincount(shares.owners, minlength=self.size).tolist()),
        )

    def _add_row(
        self,
        rows: _Rows,
        reader: RecordReader,
        decoder: ItemDecoder,
        wanted: _Wanted,
        step: int,
        row: int,
        position: int,
        seed: int,
    ) -> int:
        """Decode one record in all views; on a bad sample its spare. Returns the position used."""
        bad: list[BadRecord] = []
        for attempt in range(DRAWS):
            if self._left_out(reader, position, step):
                position = self.plan.spare(reader.name, step, row, attempt)
                continue
            try:
                record = reader.read(
                    position,
                    seed=seed,
                    media=wanted.media,
                    needs=wanted.needs,
                )
                if reader.scored and record.score is None:
                    raise BadSample(
                        record.id, "has no `score`, but the data set's first pair has one"
                    )
                decoded = [decoder.record(record, name) for name in wanted.views]
            except BadSample as problem:
                bad.append(_named(reader.ids([position])[0], problem, position))
                if len(bad) > SPARES:
                    break
                position = self.plan.spare(reader.name, step, row, attempt)
                continue
            rows.quarantined += bad
            rows.positions.append(position)
            rows.records.append(record)
            for name, of_view in zip(wanted.views, decoded, strict=True):
                rows.views[name] += of_view
            return position
        rows.quarantined += bad
        last = f", last {bad[-1].id}: {bad[-1].reason}" if bad else ", all of them left out before"
        raise BadDataError(
            f"data.sets.{reader.name}: {len(bad) or DRAWS} records in a row cannot be used{last}; "
            "run `sailplan data validate`",
            [(one.id, one.reason) for one in rows.quarantined],
        )

    def _left_out(self, reader: RecordReader, position: int, step: int) -> bool:
        return self.exclusions.holds(reader.name, position, self.first_step + step)

    def _negatives(
        self,
        rows: _Rows,
        reader: RecordReader,
        decoder: ItemDecoder,
        key: HardNegatives,
        positions: np.ndarray,
        step: int,
    ) -> list[ViewRow]:
        view, result = decoder.view(key), []
        for position in positions.tolist():
            row = ViewRow()
            if position >= 0 and not self._left_out(reader, position, step):
                try:
                    record = reader.read(position, media=media_of([view]), needs={view.of})
                    (row,) = decoder.rows([view_item(record, view)], key)
                except BadSample as problem:  # one negative less: the row stays not valid
                    rows.quarantined.append(
                        BadRecord(
                            reader.ids([position])[0], f"as a hard negative: {problem}", position
                        )
                    )
            result.append(row)
        return result

    def _view_batches(
        self,
        rows: Mapping[ViewKey, list[ViewRow]],
        shown: ShownViews,
        dataset: DatasetConfig,
        micro_batches: Mapping[str, int],
    ) -> dict[ViewKey, ViewBatch]:
        views = {}
        for view, keys in shown.encoded.items():
            distinct: dict[tuple[str, int | None] | None, int] = {}
            first: list[ViewRow] = []
            numbers = {}
            for key in keys:
                for row in rows[key]:
                    if distinct.setdefault(row.shown, len(first)) == len(first):
                        first.append(row)
                numbers[key] = torch.tensor(
                    [distinct[row.shown] for row in rows[key]], dtype=torch.int64
                )
            encoded, order = self._micro_batches(
                first, dataset.views[view], micro_batches.get(view)
            )
            for key in keys:
                views[key] = ViewBatch(
                    micro_batches=encoded if key == view else (),
                    order=order[numbers[key]],
                    valid=torch.tensor([row.valid for row in rows[key]], dtype=torch.bool),
                    ids=torch.tensor([row.id for row in rows[key]], dtype=torch.int64),
                    group=shown.group(key, dataset),
                    encoded_with=None if key == view else view,
                )
        return {key: views[key] for key in shown.keys}

    def _micro_batches(
        self, rows: list[ViewRow], view: ViewConfig, count: int | None
    ) -> tuple[list[EncoderInputs], torch.Tensor]:
        """Cut rows of a view into `count` micro-batches of nearly equal costs (None: as many as
        they need).

        Returns with them the place of each row in them one behind the other, int64 [len(rows)].
        Spares may bring more distinct items than were foreseen: then all parts grow a little.
        """
        tokens = self.processor.tokens(rows, view)
        costs = np.array(
            [
                self.processor.cost(row, len(ids), view)
                for row, ids in zip(rows, tokens, strict=True)
            ],
            dtype=np.int64,
        )
        rising, step = np.argsort(costs, kind="stable"), self.config.step
        if count is None:
            needed = micro_batches_needed(costs[None], step.micro_batch, step.token_budget)
            count = max(1, needed)
        size = max(step.micro_batch, -(-len(rows) // count))
        parts = [
            slice(start, start + size) for start in range(0, count * size, size)
        ]  # the last are empty where other ranks have more rows
        if step.token_budget:
            parts = cut(costs[rising], count, size)
        micro_batches = []
        for part in parts:
            micro_batches.append(
                self.processor.batch(
                    [rows[row] for row in rising[part]], [tokens[row] for row in rising[part]], view
                )
            )
        order = torch.empty(len(rows), dtype=torch.int64)
        order[torch.from_numpy(rising)] = torch.arange(len(rows))
        return micro_batches, order

    def _teachers(
        self, records: list[Record], views: dict[str, ViewConfig]
    ) -> dict[TeacherKey, torch.Tensor]:
        if self.teachers is None:
            return {}
        result = {}
        for name, view in views.items():
            if view.of != "history":
                items = [view_item(record, view) for record in records]
                for teacher in self.teachers.names:
                    result[TeacherKey(name, teacher)] = self.teachers.look_up(
                        teacher, [item.id if item is not None else "" for item in items]
                    )
        return result


def _named(record_id: str, problem: BadSample, position: int) -> BadRecord:
    """The record and the reason; a reason that lies in another record names that."""
    reason = problem.reason if problem.record_id == record_id else str(problem)
    return BadRecord(record_id, reason, position)
