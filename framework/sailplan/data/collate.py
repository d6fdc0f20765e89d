"""From a step's plan to this rank's StepBatch: read, decode every needed view once, sort by length, cut into micro-batches.

Everything random about a row comes from derive(seed, stage, step, data set, row number), so it is the same on any
rank, worker and restart. A record that cannot be used (broken bytes or JSON, unknown ids) is replaced by the plan's
spare for that row, which is equally deterministic, and reported in `quarantined`. An item that merely lacks a
declared modality is no error: its row is not valid in that view and the pattern's mean leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from sailplan.config.schema import Config, DatasetConfig, StageConfig, ViewConfig
from sailplan.data.negatives import HardNegativeStore
from sailplan.data.packing import SequenceLayout, pack
from sailplan.data.plan import Plan, PlannedRows
from sailplan.data.reader import BadSample, RecordReader
from sailplan.data.record import Item, Record, StepBatch, ViewBatch
from sailplan.data.teachers import TeacherTable
from sailplan.data.views import ViewRow, shared_decoder
from sailplan.errors import BadDataError
from sailplan.runtime.seeds import derive

SPARES = 16  # replacements tried for one row


@dataclass
class _Rows:
    """The rows of a part while they are gathered."""

    records: list[Record] = field(default_factory=list)
    views: dict[str, list[ViewRow]] = field(default_factory=dict)  # view -> r * g rows
    quarantined: list[tuple[str, str]] = field(default_factory=list)


def view_item(record: Record, view: ViewConfig) -> Item | None:
    """The item of a record that a view shows (for `history` use record.history)."""
    return {"item": record.item, "query": record.query, "target": record.target}[view.of]


def media_of(views: Sequence[ViewConfig]) -> frozenset[str]:
    """Which bytes the views need to have read."""
    return frozenset(modality for view in views for modality in view.modalities if modality != "text")


def stage_patterns(stage: StageConfig, name: str, dataset: DatasetConfig) -> dict[str, float]:
    """Pattern name -> weight of the patterns that a stage trains on a data set (all unless the stage names some)."""
    chosen = stage.patterns.get(name) or list(dataset.patterns)
    return {pattern: dataset.patterns[pattern].weight for pattern in chosen}


class Collator:
    """Makes the step batches of one data-parallel rank; a pure function of the step number."""

    def __init__(
        self,
        config: Config,
        stage: StageConfig,
        plan: Plan,
        readers: Mapping[str, RecordReader],
        rank: int = 0,
        size: int = 1,
        negatives: HardNegativeStore | None = None,
        teachers: TeacherTable | None = None,
    ) -> None:
        plan.check_ranks(size)
        self.config, self.stage, self.plan, self.readers = config, stage, plan, dict(readers)
        self.rank, self.size, self.negatives, self.teachers = rank, size, negatives, teachers
        self.decoder = shared_decoder(config.data)
        self.layout = SequenceLayout.planned(config.model, config.parallel)

    def batches(self, step: int) -> list[StepBatch]:
        """One StepBatch per data set of the step (one, or several in a mixed step). Raises BadDataError when a row finds no usable spare."""
        digest = self.plan.digest(step)
        return [self._batch(step, part, digest) for part in self.plan.step(step).parts]

    def _batch(self, step: int, part: PlannedRows, digest: str) -> StepBatch:
        reader = self.readers[part.dataset]
        dataset = reader.config
        patterns = stage_patterns(self.stage, part.dataset, dataset)
        names = list(dict.fromkeys(side for name in patterns for side in (dataset.patterns[name].query, dataset.patterns[name].target)))
        mined = {
            name: self.negatives.positions[f"{part.dataset}/{name}"]
            for name in patterns
            if self.negatives is not None and f"{part.dataset}/{name}" in self.negatives.positions
        }
        # How many negatives a row brings: those mined for the pattern, and the record's own.
        own = {name: dataset.negatives if dataset.views[dataset.patterns[name].target].of == "target" else 0 for name in patterns}
        brought = {name: (mined[name].shape[1] if name in mined else 0) + own[name] for name in patterns}
        brought = {name: count for name, count in brought.items() if count}
        rows = _Rows(views={name: [] for name in [*names, *(f"negatives/{name}" for name in brought)]})
        for row, position in zip(*part.rank_rows(self.rank, self.size), strict=True):
            seed = derive(self.config.seed, self.plan.stage_name, step, part.dataset, int(row))
            position = self._add_row(rows, reader, names, step, int(row), int(position), seed)
            for name in brought:
                view = dataset.patterns[name].target
                places = mined[name][position] if name in mined else np.empty(0, dtype=np.int64)
                rows.views[f"negatives/{name}"] += self._negatives(rows, reader, view, places, seed)
                rows.views[f"negatives/{name}"] += self._own_negatives(rows.records[-1], own[name], dataset.views[view], dataset, seed)
        views = {name: self._view_batch(rows.views[name], dataset.views[name], dataset) for name in names}
        for name, count in brought.items():
            key = f"negatives/{name}"
            views[key] = self._view_batch(rows.views[key], dataset.views[dataset.patterns[name].target], dataset, group=count)
        return StepBatch(
            step=step,
            dataset=part.dataset,
            record_ids=[record.id for record in rows.records],
            views=views,
            scores=torch.tensor([record.score for record in rows.records], dtype=torch.float32) if reader.scored else None,
            target_log_probability=_log_probabilities(rows.records, dataset.negatives),
            teachers=self._teachers(rows.records, {name: dataset.views[name] for name in names}),
            patterns=patterns,
            quarantined=rows.quarantined,
            digest=digest,
        )

    def _add_row(self, rows: _Rows, reader: RecordReader, names: list[str], step: int, row: int, position: int, seed: int) -> int:
        """Decode one record in all views; on a bad sample its spare. Returns the position used."""
        dataset = reader.config
        views = {name: dataset.views[name] for name in names}
        media, needs = media_of(list(views.values())), {view.of for view in views.values()} | {"negatives"}
        for attempt in range(SPARES + 1):
            try:
                record = reader.read(position, seed=derive(seed, "sequence"), media=media, needs=needs)
                if reader.scored and record.score is None:
                    raise BadSample(record.id, "has no `score`, but the data set's first pair has one")
                decoded = {name: self._decode(record, name, view, dataset, seed) for name, view in views.items()}
            except BadSample as problem:
                rows.quarantined.append(_named(reader.ids([position])[0], problem))
                position = self.plan.spare(reader.name, step, row, attempt)
                continue
            rows.records.append(record)
            for name in names:
                rows.views[name] += decoded[name]
            return position
        raise BadDataError(
            f"data.sets.{reader.name}: {SPARES + 1} records in a row cannot be used, last {': '.join(rows.quarantined[-1])}; run `sailplan data validate`",
            rows.quarantined,
        )

    def _decode(self, record: Record, name: str, view: ViewConfig, dataset: DatasetConfig, seed: int) -> list[ViewRow]:
        if view.of != "history":
            return [self.decoder.row(view_item(record, view), view, dataset, derive(seed, name))]
        length = dataset.history_length
        items: list[Item | None] = [*record.history, *[None] * (length - len(record.history))]
        return [self.decoder.row(item, view, dataset, derive(seed, name, place)) for place, item in enumerate(items)]

    def _negatives(self, rows: _Rows, reader: RecordReader, view_name: str, positions: np.ndarray, seed: int) -> list[ViewRow]:
        view, result = reader.config.views[view_name], []
        for place, position in enumerate(positions.tolist()):
            row = ViewRow()
            if position >= 0:
                try:
                    record = reader.read(position, media=media_of([view]), needs={view.of})
                    row = self.decoder.row(view_item(record, view), view, reader.config, derive(seed, "negative", view_name, place))
                except BadSample as problem:  # one negative less: the row stays not valid
                    rows.quarantined.append((reader.ids([position])[0], f"as a hard negative: {problem}"))
            result.append(row)
        return result

    def _own_negatives(self, record: Record, count: int, view: ViewConfig, dataset: DatasetConfig, seed: int) -> list[ViewRow]:
        items: list[Item | None] = [*record.negatives[:count], *[None] * (count - len(record.negatives))]
        return [self.decoder.row(item, view, dataset, derive(seed, "own negative", place)) for place, item in enumerate(items)]

    def _view_batch(self, rows: list[ViewRow], view: ViewConfig, dataset: DatasetConfig, group: int | None = None) -> ViewBatch:
        tokens = self.decoder.tokens(rows, view)
        by_length = sorted(range(len(rows)), key=lambda row: len(tokens[row]))
        size = self.config.step.micro_batch
        micro_batches = []
        for start in range(0, len(rows), size):
            chosen = by_length[start : start + size]
            inputs = self.decoder.inputs([rows[row] for row in chosen], [tokens[row] for row in chosen], view)
            micro_batches.append(replace(inputs, packing=pack(inputs, self.layout)))
        order = torch.empty(len(rows), dtype=torch.int64)
        order[torch.tensor(by_length)] = torch.arange(len(rows))
        return ViewBatch(
            micro_batches=micro_batches,
            order=order,
            valid=torch.tensor([row.valid for row in rows]),
            ids=torch.tensor([row.id for row in rows]),
            group=group or (dataset.history_length if view.of == "history" else 1),
        )

    def _teachers(self, records: list[Record], views: dict[str, ViewConfig]) -> dict[str, torch.Tensor]:
        if self.teachers is None:
            return {}
        result = {}
        for name, view in views.items():
            if view.of != "history":
                items = [view_item(record, view) for record in records]
                for teacher in self.teachers.names:
                    result[f"{name}/{teacher}"] = self.teachers.look_up(teacher, [item.id if item is not None else "" for item in items])
        return result


def _named(record_id: str, problem: BadSample) -> tuple[str, str]:
    """(record id, reason); a reason that lies in another record names that."""
    return record_id, problem.reason if problem.record_id == record_id else str(problem)


def _log_probabilities(records: list[Record], negatives: int) -> torch.Tensor | None:
    """float32 [r]: log of each record's target_probability; None unless every record has one.

    Of records that bring negatives with a known probability each, the log of the ratio: how often the target is a key of
    the batch for one time that a given item of the negatives' kind is one of its negatives.
    """
    found = [record.target_probability for record in records if record.target_probability is not None]
    if not found or len(found) != len(records):
        return None
    among = [negatives * (record.negative_probability or 0) or 1.0 for record in records]
    return (torch.tensor(found, dtype=torch.float64) / torch.tensor(among, dtype=torch.float64)).log().to(torch.float32)
