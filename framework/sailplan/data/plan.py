"""The plan of a stage: step number -> the records of the whole global batch, as a pure function.

Each step draws one data set from the stage's weights (stochastic specialisation, recipe section
4.3) with a counter-based random number keyed by (seed, stage, step); a `mixed_fraction` of the
steps draws several and makes homogeneous sub-batches. The rows of a data set continue where its
previous step in this stage stopped: the number of rows drawn before is a prefix count that is
summed per block of steps. Nothing depends on ranks, workers or history, so the step number is the
whole data state of a run.

Which rank takes which rows of a step is no matter of the plan: see shares.py. Weighted sums are
decided in float64 by integer-keyed uniforms; permutations are integers only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sailplan.config.schema import Config, StageConfig
from sailplan.data.order import keyed, positions, uniform
from sailplan.errors import ConfigurationError
from sailplan.runtime.seeds import derive

MIXED_PARTS = 4  # sub-batches of a mixed step unless the stage says; equal ones are merged
BLOCK_STEPS = 16384
SPLIT = "train"
STREAMS = 8  # lanes of the order, see order.py; of no matter to how many ranks there are


class PlannedSet(Protocol):
    """What a plan needs to know of a data set (RecordReader has it)."""

    @property
    def identity(self) -> str: ...

    def count(self, split: str) -> int: ...

    def select(self, split: str, numbers: NDArray[np.int64]) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class PlannedRows:
    """The rows of one data set in a step, in global order.

    `first_row`: number of the first row within the data set's stream of this stage. `numbers`:
    int64 [n], which of the records that the stage draws from each row is. `select` finds positions
    of numbers; where a shard mixes splits, it reads that shard's table, so a rank asks for its own
    rows with `at`, and for `positions` of all only with cause.
    """

    dataset: str
    first_row: int
    numbers: NDArray[np.int64]
    select: Callable[[NDArray[np.int64]], NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """Record positions of all rows, int64 [n]."""
        return self.select(self.numbers)

    def at(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the record positions of some of the rows (0 .. n - 1): int64 [k] -> int64 [k]."""
        return self.select(self.numbers[rows])


@dataclass(frozen=True)
class StepPlan:
    """All rows of a step: one part, or several homogeneous ones in a mixed step."""

    step: int
    parts: tuple[PlannedRows, ...]

    @property
    def dataset(self) -> str:
        """The data set's name; `a+b` for a mixed step."""
        return "+".join(part.dataset for part in self.parts)


class Plan:
    """A stage's plan. Steps count from 0 within the stage.

    weights: data set -> sampling weight (need not sum to 1). sets: data set -> reader. subsets:
    data set -> sorted int64 positions to draw from instead of the split "train" (curriculum
    subsets). Raises ConfigurationError for empty sets or negative weights.
    """

    def __init__(
        self,
        config: Config,
        stage_name: str,
        stage: StageConfig,
        weights: Mapping[str, float],
        sets: Mapping[str, PlannedSet],
        subsets: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> None:
        data = config.data
        self.global_batch = stage.global_batch or config.global_batch
        for key, value in (
            ("data.segment", data.segment),
            ("data.window", data.window),
            ("global_batch", self.global_batch),
        ):
            if value < 1:
                raise ConfigurationError(f"{key}={value}: expected at least 1")
        self.steps, self.stage_name, self.seed = stage.steps, stage_name, config.seed
        self.segment, self.window = data.segment, data.window
        self.names = sorted(name for name, weight in weights.items() if weight != 0)
        values = np.array([weights[name] for name in self.names], dtype=np.float64)
        if not self.names or (values < 0).any() or not np.isfinite(values).all():
            raise ConfigurationError(
                f"stages.{stage_name}.data: the weights {dict(weights)} need at least one above 0, "
                "none negative"
            )
        self._edges = np.cumsum(values) / values.sum()
        closed = [name for name in self.names if name not in sets]
        if closed:
            raise ConfigurationError(
                f"stages.{stage_name}.data names '{closed[0]}', which is not open: is it made by "
                "an earlier stage's `artifacts`?"
            )
        self._sets = {name: sets[name] for name in self.names}
        self._subsets = {
            name: np.asarray(subset, dtype=np.int64)
            for name, subset in (subsets or {}).items()
            if name in self._sets
        }
        for name in self.names:
            if self.size(name) == 0:
                raise ConfigurationError(
                    f"data.sets.{name}: stage '{stage_name}' finds no record of split '{SPLIT}' to "
                    "draw; check its shards or subset"
                )
        self._keys = {name: derive("order", stage_name, name) for name in self.names}
        self._draw_key, self._order_seed = (
            derive("draw", config.seed, stage_name),
            derive("order", config.seed),
        )
        self._mixed_fraction = stage.mixed_fraction
        unit = (
            1 if self.global_batch % STREAMS else STREAMS
        )  # equally many rows of each lane, where that can be
        units = self.global_batch // unit
        wanted = stage.mixed_rows
        parts = min(-(-self.global_batch // wanted) if wanted else MIXED_PARTS, units)
        self._part_rows = [
            (units // parts + (turn < units % parts)) * unit for turn in range(parts)
        ]
        self._prefix = [
            np.zeros(len(self.names), dtype=np.int64)
        ]  # rows drawn per set before block b
        self.step = lru_cache(maxsize=8)(self._step)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "step"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.step = lru_cache(maxsize=8)(self._step)

    def draws(self, first_step: int, count: int) -> NDArray[np.int64]:
        """Index into `names` of each sub-batch of steps first_step ..; int64 [count, parts];
        equal within unmixed steps.
        """
        if len(self.names) == 1:
            return np.zeros((count, len(self._part_rows)), dtype=np.int64)
        steps = np.arange(first_step, first_step + count, dtype=np.int64)
        columns = [uniform(self._draw_key, 1, steps, turn) for turn in range(len(self._part_rows))]
        chosen = np.searchsorted(self._edges, np.stack(columns, axis=1), side="right").clip(
            max=len(self.names) - 1
        )
        mixed = uniform(self._draw_key, 2, steps) < self._mixed_fraction
        return np.where(mixed[:, None], chosen, chosen[:, :1]).astype(np.int64)

    def _step(self, step: int) -> StepPlan:
        """The rows of one step, in global order (cached: `plan.step(s)`)."""
        if step < 0:
            raise IndexError(f"step {step} of stage '{self.stage_name}'")
        drawn = self.draws(step, 1)[0]
        before = self._rows_before(step)
        parts = []
        for choice in dict.fromkeys(drawn.tolist()):
            name, count = (
                self.names[choice],
                sum(
                    rows
                    for rows, other in zip(self._part_rows, drawn, strict=True)
                    if other == choice
                ),
            )
            first = int(before[choice])
            order = positions(
                self._keys[name],
                self.size(name),
                self._order_seed,
                first,
                count,
                STREAMS,
                self.segment,
                self.window,
            )
            parts.append(PlannedRows(name, first, order, partial(self._select, name)))
        return StepPlan(step, tuple(parts))

    def digest(self, step: int) -> str:
        """Return 16 hex digits of SHA-256 over the sets and the rows' places of a step: equal on
        any number of ranks.

        A set stands for its content by its `identity` (ids and splits of all its records, in
        order), a row by its number in the split or, of a subset, its position; so no record is
        looked up, and ranks that see other shards differ from their first step on.
        """
        digest = hashlib.sha256()
        for part in self.step(step).parts:
            drawn = part.positions if part.dataset in self._subsets else part.numbers
            digest.update(
                f"{part.dataset}\0{self._sets[part.dataset].identity}\0{len(part)}\0".encode()
            )
            digest.update(drawn.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def spare(self, dataset: str, step: int, row: int, attempt: int) -> int:
        """Position of the record that replaces row `row` of the data set's stream at the given
        attempt (from 0).
        """
        number = keyed(self._draw_key, 3, self._keys[dataset], step, row, attempt) % np.uint64(
            self.size(dataset)
        )
        return int(self._select(dataset, number.astype(np.int64))[0])

    def rows_seen(self, step: int) -> dict[str, int]:
        """Rows of each data set in the steps before `step`."""
        return dict(zip(self.names, self._rows_before(step).tolist(), strict=True))

    def size(self, dataset: str) -> int:
        """Records of the data set that this stage draws from."""
        return (
            len(self._subsets[dataset])
            if dataset in self._subsets
            else self._sets[dataset].count(SPLIT)
        )

    # ---------------------------------------------------------------- parts
    def _select(self, name: str, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of the records number 0 .. size - 1 that the stage draws from."""
        return (
            self._subsets[name][numbers]
            if name in self._subsets
            else self._sets[name].select(SPLIT, numbers)
        )

    def _rows(self, first_step: int, count: int) -> NDArray[np.int64]:
        """Rows per data set in a run of steps; int64 [sets]."""
        drawn, rows = self.draws(first_step, count), np.zeros(len(self.names), dtype=np.int64)
        for turn, size in enumerate(self._part_rows):
            rows += np.bincount(drawn[:, turn], minlength=len(self.names)) * size
        return rows

    def _rows_before(self, step: int) -> NDArray[np.int64]:
        block = step // BLOCK_STEPS
        while len(self._prefix) <= block:
            last = len(self._prefix) - 1
            self._prefix.append(self._prefix[last] + self._rows(last * BLOCK_STEPS, BLOCK_STEPS))
        return self._prefix[block] + self._rows(block * BLOCK_STEPS, step - block * BLOCK_STEPS)
