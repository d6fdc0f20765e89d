"""The ranks' shares of a step: who encodes which rows, in how many micro-batches a view; the
same on all ranks.

A pure function of the step: the plan names its rows, the length tables tell what each costs in
every view that the step's patterns show, hard negatives included, and `dealing` shares them out. A rank
encodes each distinct item of its rows once.
The order of the rows and so the digest of a step know nothing of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sailplan.config.schema import Config, DatasetConfig, PatternKey, StageConfig
from sailplan.data.costs import UNKNOWN, Foreseen, RowCosts, item_draws
from sailplan.data.dealing import Integers, deal, micro_batches_needed
from sailplan.data.negatives import HardNegativeStore
from sailplan.data.order import seeds
from sailplan.data.plan import Plan, PlannedRows
from sailplan.data.reader import RecordReader
from sailplan.data.record import HardNegatives, ViewKey
from sailplan.runtime.seeds import derive


@dataclass(frozen=True)
class ShownViews:
    """What the rows of a data set show in a stage."""

    patterns: dict[str, float]  # pattern -> weight
    views: list[str]
    negatives: dict[
        str, tuple[int, int]
    ]  # pattern -> how many a row brings: mined for it, and the record's own; those with any
    encoded: dict[str, list[ViewKey]]  # view -> the view batches that its micro-batches hold

    @property
    def keys(self) -> list[ViewKey]:
        """Return the keys of a step's view batches."""
        return [*self.views, *(HardNegatives(name) for name in self.negatives)]

    def group(self, key: ViewKey, dataset: DatasetConfig) -> int:
        """Return how many items each row of a view batch has."""
        if isinstance(key, HardNegatives):
            return sum(self.negatives[key.pattern])
        return dataset.history_length if dataset.views[key].of == "history" else 1


@dataclass(frozen=True)
class PartShares:
    """How the rows of one data set of a step are shared out."""

    owners: Integers  # [n] data-parallel rank of each row
    # View of `ShownViews.encoded` -> number, equal on all ranks; one rank alone cuts as it needs
    micro_batches: dict[str, int]


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
    views = list(dict.fromkeys(sides))
    negatives = {pattern: brought for pattern, brought in counts.items() if sum(brought)}
    return ShownViews(patterns, views, negatives, _encoded(dataset, views, negatives))


def _encoded(
    dataset: DatasetConfig, views: Iterable[str], negatives: Iterable[str]
) -> dict[str, list[ViewKey]]:
    """Views -> the view batches whose items are encoded together.

    Negatives go with their pattern's target, a history with a target that is shown alike. No two
    other views do: of the same item they are meant to draw differently, or they would be equal.
    """
    targets = [name for name in views if dataset.views[name].of == "target"]
    having = {
        name: next(
            (
                target
                for target in targets
                if replace(dataset.views[target], of="history") == dataset.views[name]
            ),
            name,
        )
        for name in views
    }
    encoded: dict[str, list[ViewKey]] = {view: [] for view in views if view in having.values()}
    for name, view in having.items():
        encoded[view].append(name)
    for pattern in negatives:
        encoded[having[dataset.patterns[pattern].target]].append(HardNegatives(pattern))
    return encoded


def row_seeds(seed: int, stage: str, step: int, dataset: str, rows: Integers) -> Integers:
    """Return the seeds of what is drawn of records, int64 [n], from their rows' numbers in the
    data set's stream [n]; of items, `costs.item_seed` tells.
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
        if self.size == 1:
            alone = (np.zeros(len(part), dtype=np.int64) for part in self.plan.step(step).parts)
            return [PartShares(owners, {}) for owners in alone]
        loads, result = np.zeros(self.size, dtype=np.int64), []
        by_length = self.config.step.dealing == "length"
        for part in self.plan.step(step).parts:
            dataset = self.readers[part.dataset].config
            shown, count = shown_views(self.stage, part.dataset, dataset, self.negatives), len(part)
            if by_length or self.config.step.token_budget:
                found = self.foreseen(step, part)
            else:  # nothing depends on them
                found = {
                    key: Foreseen(
                        np.zeros((count, group), dtype=np.int64),
                        np.full((count, group), UNKNOWN, dtype=np.int64),
                    )
                    for key in shown.keys
                    for group in [shown.group(key, dataset)]
                }
            if by_length:
                owners = deal(
                    np.sum([one.costs.sum(1) for one in found.values()], axis=0), self.size, loads
                )
            else:
                owners = np.arange(count, dtype=np.int64) % self.size
            needed = {
                view: self._micro_batches(owners, [found[key] for key in keys])
                for view, keys in shown.encoded.items()
            }
            result.append(PartShares(owners, needed))
        return result

    def _micro_batches(self, owners: Integers, shown: Sequence[Foreseen]) -> int:
        """Return into how many micro-batches all ranks cut the distinct items of their rows."""
        items = np.concatenate([one.items for one in shown], axis=1)
        costs = np.concatenate([one.costs for one in shown], axis=1).ravel()
        ranks = np.repeat(owners, items.shape[1])
        unknown = items.ravel() == UNKNOWN
        _, numbers = np.unique(
            np.where(unknown, UNKNOWN - np.arange(items.size), items.ravel()), return_inverse=True
        )
        _, first = np.unique(ranks * items.size + numbers, return_index=True)
        ranks, costs = ranks[first], costs[first]  # of each rank's items, rank by rank
        counts = np.bincount(ranks, minlength=self.size)
        places = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
        lines = np.zeros((self.size, max(1, int(counts.max(initial=0)))), dtype=np.int64)
        lines[ranks, places] = costs
        step = self.config.step
        return micro_batches_needed(lines, step.micro_batch, step.token_budget, counts)

    def fingerprint(self, step: int) -> str:
        """Return 16 hex digits of the shares of a step: equal on ranks that see the same shards,
        tokenizer and configuration.
        """
        digest = hashlib.sha256()
        for part in self.step(step):
            numbers = sorted((str(key), count) for key, count in part.micro_batches.items())
            digest.update(part.owners.tobytes() + repr(numbers).encode())
        return digest.hexdigest()[:16]

    def foreseen(self, step: int, part: PlannedRows) -> dict[ViewKey, Foreseen]:
        """Return what is known of the items that the rows of a part show in each view batch."""
        reader = self.readers[part.dataset]
        dataset = reader.config
        shown = shown_views(self.stage, part.dataset, dataset, self.negatives)
        step_seed = derive(self.config.seed, self.plan.stage_name, step, part.dataset)
        draws = {
            key: item_draws(step_seed, view) for view, keys in shown.encoded.items() for key in keys
        }
        found: dict[ViewKey, Foreseen] = {
            name: self.costs.foreseen(reader, dataset.views[name], part.positions, draws[name])
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
                else np.empty((len(part), 0), dtype=np.int64)
            )
            key = HardNegatives(pattern)
            view = dataset.views[target]
            brought = (
                self.costs.foreseen_mined(reader, view, places, draws[key]),
                self.costs.foreseen_own(reader, view, part.positions, own, draws[key]),
            )
            found[key] = Foreseen(
                *(np.concatenate(each, axis=1) for each in zip(*brought, strict=True))
            )
        return found
