"""The ranks' shares of a step: who encodes which rows, in how many micro-batches a view; the
same on all ranks.

A pure function of the step: the plan names its rows, the length tables tell what each costs in
every view that the step's patterns show, hard negatives included, and `dealing` shares them out.
The order of the rows and so the digest of a step know nothing of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sailplan.config.schema import Config, DatasetConfig, PatternKey, StageConfig
from sailplan.data.costs import RowCosts, draw_seeds
from sailplan.data.dealing import Integers, deal, micro_batches_needed
from sailplan.data.negatives import HardNegativeStore
from sailplan.data.order import seeds
from sailplan.data.plan import Plan, PlannedRows
from sailplan.data.reader import RecordReader
from sailplan.data.record import HardNegatives, ViewKey
from sailplan.runtime.seeds import derive

OWN_NEGATIVES = derive("own negative")


@dataclass(frozen=True)
class ShownViews:
    """What the rows of a data set show in a stage."""

    patterns: dict[str, float]  # pattern -> weight
    views: list[str]
    negatives: dict[
        str, tuple[int, int]
    ]  # pattern -> how many a row brings: mined for it, and the record's own; those with any

    @property
    def keys(self) -> list[ViewKey]:
        """Return the keys of a step's view batches."""
        return [*self.views, *(HardNegatives(name) for name in self.negatives)]


@dataclass(frozen=True)
class PartShares:
    """How the rows of one data set of a step are shared out."""

    owners: Integers  # [n] data-parallel rank of each row
    micro_batches: dict[ViewKey, int]  # view batch -> number, equal on all ranks


def stage_patterns(stage: StageConfig, name: str, dataset: DatasetConfig) -> dict[str, float]:
    """Pattern name -> weight of the patterns that a stage trains on a data set (all unless the
    stage names some).
    """
    chosen = stage.patterns.get(name) or list(dataset.patterns)
    return {pattern: dataset.patterns[pattern].weight for pattern in chosen}


def shown_views(
    stage: StageConfig, name: str, dataset: DatasetConfig, store: HardNegativeStore | None
) -> ShownViews:
    """Return the views, and the negatives, that a stage's patterns of a data set show."""
    patterns = stage_patterns(stage, name, dataset)
    sides = [
        side
        for pattern in patterns
        for side in (dataset.patterns[pattern].query, dataset.patterns[pattern].target)
    ]
    counts = {}
    for pattern in patterns:
        mined = store.positions.get(PatternKey(name, pattern)) if store is not None else None
        own = (
            dataset.negatives
            if dataset.views[dataset.patterns[pattern].target].of == "target"
            else 0
        )
        counts[pattern] = (mined.shape[1] if mined is not None else 0, own)
    return ShownViews(
        patterns,
        list(dict.fromkeys(sides)),
        {pattern: brought for pattern, brought in counts.items() if sum(brought)},
    )


def row_seeds(seed: int, stage: str, step: int, dataset: str, rows: Integers) -> Integers:
    """Return the seeds of everything random about rows, int64 [n], from their numbers in the
    data set's stream [n].
    """
    return seeds(derive(seed, stage, step, dataset), rows)


class StepShares:
    """Shares of any step of a stage among `size` data-parallel ranks."""

    def __init__(
        self,
        config: Config,
        stage: StageConfig,
        plan: Plan,
        readers: Mapping[str, RecordReader],
        costs: RowCosts,
        size: int,
        negatives: HardNegativeStore | None = None,
    ) -> None:
        self.config, self.stage, self.plan, self.readers = config, stage, plan, readers
        self.costs, self.size, self.negatives = costs, size, negatives

    def step(self, step: int) -> list[PartShares]:
        """Return the shares of each part of a step, in the plan's order."""
        loads, result = np.zeros(self.size, dtype=np.int64), []
        by_length = self.config.step.dealing == "length" and self.size > 1
        for part in self.plan.step(step).parts:
            dataset = self.readers[part.dataset].config
            shown, count = shown_views(self.stage, part.dataset, dataset, self.negatives), len(part)
            if by_length or self.config.step.token_budget:
                found = self.foreseen(step, part)
            else:  # nothing depends on them
                found = {
                    key: np.zeros((count, group), dtype=np.int64)
                    for key, group in self._groups(shown, dataset).items()
                }
            if by_length:
                owners = deal(
                    np.sum([costs.sum(1) for costs in found.values()], axis=0), self.size, loads
                )
            else:
                owners = np.arange(count, dtype=np.int64) % self.size
            counts = np.bincount(owners, minlength=self.size)
            places = np.arange(count) - np.repeat(
                np.cumsum(counts) - counts, counts
            )  # of a rank's rows, in its order
            by_rank = np.argsort(owners, kind="stable")
            needed = {}
            for key, costs in found.items():
                lines = np.zeros(
                    (self.size, max(1, int(counts.max())), costs.shape[1]), dtype=np.int64
                )
                lines[owners[by_rank], places] = costs[by_rank]
                micro_batch, budget = self.config.step.micro_batch, self.config.step.token_budget
                needed[key] = micro_batches_needed(
                    lines.reshape(self.size, -1), micro_batch, budget, counts * costs.shape[1]
                )
            result.append(PartShares(owners, needed))
        return result

    def fingerprint(self, step: int) -> str:
        """Return 16 hex digits of the shares of a step: equal on ranks that see the same shards,
        tokenizer and configuration.
        """
        digest = hashlib.sha256()
        for part in self.step(step):
            numbers = sorted((str(key), count) for key, count in part.micro_batches.items())
            digest.update(part.owners.tobytes() + repr(numbers).encode())
        return digest.hexdigest()[:16]

    def foreseen(self, step: int, part: PlannedRows) -> dict[ViewKey, Integers]:
        """Return the costs of the rows of a part in each view batch, int64 [n, g]."""
        reader = self.readers[part.dataset]
        dataset = reader.config
        shown = shown_views(self.stage, part.dataset, dataset, self.negatives)
        rows = part.first_row + np.arange(len(part), dtype=np.int64)
        of_rows = row_seeds(self.config.seed, self.plan.stage_name, step, part.dataset, rows)
        found: dict[ViewKey, Integers] = {
            name: self.costs.foreseen(
                reader,
                dataset.views[name],
                part.positions,
                draw_seeds(of_rows, derive("view", name)),
            )
            for name in shown.views
        }
        for pattern, (mined, own) in shown.negatives.items():
            target = dataset.patterns[pattern].target
            store = (
                self.negatives.positions[PatternKey(part.dataset, pattern)]
                if mined and self.negatives is not None
                else None
            )
            places = (
                store[part.positions]
                if store is not None
                else np.empty((len(rows), 0), dtype=np.int64)
            )
            drawn = (
                draw_seeds(of_rows, derive("negative", target)),
                draw_seeds(of_rows, OWN_NEGATIVES),
            )
            found[HardNegatives(pattern)] = np.concatenate(
                [
                    self.costs.foreseen_mined(reader, dataset.views[target], places, drawn[0]),
                    self.costs.foreseen_own(
                        reader, dataset.views[target], part.positions, own, drawn[1]
                    ),
                ],
                axis=1,
            )
        return found

    def _groups(self, shown: ShownViews, dataset: DatasetConfig) -> dict[ViewKey, int]:
        groups: dict[ViewKey, int] = {
            name: dataset.history_length if dataset.views[name].of == "history" else 1
            for name in shown.views
        }
        return groups | {
            HardNegatives(pattern): sum(brought) for pattern, brought in shown.negatives.items()
        }
