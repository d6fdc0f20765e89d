"""Step batches ready before they are asked for, the same ones for any number of workers.

A torch DataLoader runs over a data set whose index is the step number, so order and resume are the
sampler's plain range and nothing else. A worker sends a whole step as one shared buffer (a step has
hundreds of tensors; each would take a file descriptor). Without workers a thread decodes one step
ahead. Bad samples are counted here, where all steps of the rank come by, over the latest thousand
rows.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sailplan.config.schema import Config, StageConfig
from sailplan.data.collate import Collator
from sailplan.data.negatives import HardNegativeStore
from sailplan.data.plan import Plan
from sailplan.data.reader import RecordReader
from sailplan.data.record import StepBatch
from sailplan.data.teachers import Teachers
from sailplan.errors import BadDataError, SailplanError

RECENT_ROWS = 1000
ALIGNMENT = 64  # bytes
Packed = tuple[bytes, Tensor]


class _Steps(Dataset[Packed | SailplanError]):
    """Step number -> packed step batches.

    Errors come back as values: a worker's raise would lose their one-line form.
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __getitem__(self, step: int) -> Packed | SailplanError:
        try:
            return pack(self.collator.batches(step))
        except SailplanError as error:
            return error


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
        self._running: Iterator[list[StepBatch]] | None = None

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step)

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[list[StepBatch]]:
        self.close()
        self._running = self._from_workers() if self.data.workers > 0 else self._from_thread()
        for batches in self._running:
            self._count(batches)
            yield batches

    def close(self) -> None:
        """End the workers or the thread of the running iteration, if there is one."""
        if self._running is not None:
            self._running.close()  # type: ignore[attr-defined]
            self._running = None

    def _from_thread(self) -> Iterator[list[StepBatch]]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as thread:
            ahead = deque(
                thread.submit(self.collator.batches, step)
                for step in range(self.start_step, self.stop_step)[:1]
            )
            for step in range(self.start_step, self.stop_step):
                if step + 1 < self.stop_step:
                    ahead.append(thread.submit(self.collator.batches, step + 1))
                yield ahead.popleft().result()

    def _from_workers(self) -> Iterator[list[StepBatch]]:
        os.environ.setdefault(
            "TOKENIZERS_PARALLELISM", "false"
        )  # the tokenizer's threads do not survive the fork
        loader = DataLoader(
            _Steps(self.collator),
            batch_size=None,
            sampler=range(self.start_step, self.stop_step),
            num_workers=self.data.workers,
            prefetch_factor=self.data.prefetch,
            collate_fn=_unchanged,  # type: ignore[arg-type]
            # By a thread of the loader's: uploads start from there (step.upload)
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="fork",
        )
        for packed in loader:
            if isinstance(packed, SailplanError):
                raise packed
            yield unpack(packed)

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


def _unchanged(packed: Packed) -> Packed:
    return packed


class _TensorPickler(pickle.Pickler):
    """Pickles everything but the tensors, which it collects."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.offset = 0

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        place = (self.offset, value.nbytes, value.dtype, tuple(value.shape))
        self.tensors.append(value)
        self.offset += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
        return place


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, buffer: Tensor) -> None:
        super().__init__(file)
        self.buffer = buffer

    def persistent_load(self, place: Any) -> Tensor:
        offset, size, dtype, shape = place
        return self.buffer[offset : offset + size].view(dtype).view(shape)


def pack(batches: list[StepBatch]) -> Packed:
    """Everything but tensors as bytes, all tensors one after the other in one uint8 buffer."""
    file = io.BytesIO()
    pickler = _TensorPickler(file)
    pickler.dump(batches)
    buffer, offset = torch.empty(pickler.offset, dtype=torch.uint8), 0
    for tensor in pickler.tensors:
        buffer[offset : offset + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return file.getvalue(), buffer


def unpack(packed: Packed) -> list[StepBatch]:
    """The inverse of `pack`; the tensors are views of the one buffer."""
    content, buffer = packed
    result: list[StepBatch] = _TensorUnpickler(io.BytesIO(content), buffer).load()
    return result
