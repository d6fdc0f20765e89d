"""Step batches ready before they are asked for, the same ones for any number of workers.

They are made ahead (`data.ahead`), one task a step, so order and resume are the range of steps, the
list of records that are left out, and nothing else.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence

from sailplan.config.schema import Config, StageConfig
from sailplan.data.ahead import ahead
from sailplan.data.collate import Collator
from sailplan.data.exclusions import Exclusion, Exclusions
from sailplan.data.negatives import HardNegativeStore
from sailplan.data.plan import Plan
from sailplan.data.reader import RecordReader
from sailplan.data.record import StepBatch
from sailplan.data.teachers import Teachers


class StepLoader:
    """Iterates over the steps start_step .. stop_step - 1 (default: the stage's last) of a
    data-parallel rank; each is a list[StepBatch] (one, or several in a mixed step).

    exclusions: records that are left out; what is added while iterating counts from its own step
    on. first_step: of the stage, as they count. Raises BadDataError while iterating where a row
    finds no spare. Close it (or leave the `with` block) to end workers early.
    """

    def __init__(
        self,
        plan: Plan,
        readers: Mapping[str, RecordReader],
        config: Config,
        stage: StageConfig,
        *,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        start_step: int = 0,
        stop_step: int | None = None,
        negatives: HardNegativeStore | None = None,
        teachers: Teachers | None = None,
        exclusions: Exclusions | None = None,
        first_step: int = 1,
    ) -> None:
        self.exclusions = exclusions if exclusions is not None else Exclusions()
        self.collator = Collator(
            config,
            stage,
            plan,
            readers,
            data_parallel_rank,
            data_parallel_size,
            negatives,
            teachers,
            self.exclusions,
            first_step,
        )
        self.data, self.start_step, self.stop_step = (
            config.data,
            start_step,
            plan.steps if stop_step is None else stop_step,
        )
        self._running: Generator[list[StepBatch], None, None] | None = None

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step)

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[list[StepBatch]]:
        self.close()
        steps, data = range(self.start_step, self.stop_step), self.data
        self._running = ahead(
            self.exclusions.told_with(steps, data.workers),
            self._batches,
            workers=data.workers,
            prefetch=data.prefetch,
        )
        for batches in self._running:  # noqa: UP028  it is closed by `close`, not with this generator
            yield batches

    def _batches(self, task: tuple[int, Sequence[Exclusion]]) -> list[StepBatch]:
        step, fresh = task
        self.exclusions.add(fresh)
        return self.collator.batches(step)

    def close(self) -> None:
        """End the workers or the thread of the running iteration, if there is one."""
        if self._running is not None:
            self._running.close()
            self._running = None
