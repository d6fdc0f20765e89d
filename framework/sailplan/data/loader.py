"""Step batches ready before they are asked for, the same ones for any number of workers.

They are made ahead (`data.ahead`), one task a step, so order and resume are the range of steps and
nothing else. Bad samples are counted here, where all steps of the rank come by, over the latest
thousand rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping

from sailplan.config.schema import Config, StageConfig
from sailplan.data.ahead import ahead
from sailplan.data.collate import Collator
from sailplan.data.negatives import HardNegativeStore
from sailplan.data.plan import Plan
from sailplan.data.reader import RecordReader
from sailplan.data.record import StepBatch
from sailplan.data.teachers import Teachers
from sailplan.errors import BadDataError

RECENT_ROWS = 1000


class StepLoader:
    """Iterates over the steps start_step ..

    stop_step - 1 (default: the stage's last) of a data-parallel rank; each is a list[StepBatch]
    (one, or several in a mixed step).

    Raises while iterating: BadDataError when more than data.bad_sample_limit of the latest 1,000
    rows had to be replaced, or a row found no spare. Close it (or leave the `with` block) to end
    workers early.
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
    ) -> None:
        self.collator = Collator(
            config,
            stage,
            plan,
            readers,
            data_parallel_rank,
            data_parallel_size,
            negatives,
            teachers,
        )
        self.data, self.start_step, self.stop_step = (
            config.data,
            start_step,
            plan.steps if stop_step is None else stop_step,
        )
        self._recent: deque[tuple[int, int]] = deque()  # (rows, bad samples) of the latest steps
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
            steps, self.collator.batches, workers=data.workers, prefetch=data.prefetch
        )
        for batches in self._running:
            self._count(batches)
            yield batches

    def close(self) -> None:
        """End the workers or the thread of the running iteration, if there is one."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _count(self, batches: list[StepBatch]) -> None:
        self._recent.append(
            (
                sum(len(batch.record_ids) for batch in batches),
                sum(len(batch.quarantined) for batch in batches),
            )
        )
        while (
            len(self._recent) > 1
            and sum(rows for rows, _ in self._recent) - self._recent[0][0] >= RECENT_ROWS
        ):
            self._recent.popleft()
        rows, bad = sum(rows for rows, _ in self._recent), sum(bad for _, bad in self._recent)
        # never over a base smaller than RECENT_ROWS: one bad sample in the first small batch is no
        # reason to stop
        if bad > self.data.bad_sample_limit * max(rows, RECENT_ROWS):
            name, reason = next(
                entry for batch in reversed(batches) for entry in reversed(batch.quarantined)
            )
            raise BadDataError(
                f"{bad} bad samples in the latest {rows} rows, the limit is "
                f"data.bad_sample_limit={self.data.bad_sample_limit}; "
                f"last: {name}: {reason}; run `sailplan data validate`",
                [entry for batch in batches for entry in batch.quarantined],
            )
