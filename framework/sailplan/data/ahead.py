"""Work that is done ahead of whoever asks for its results: by forked workers, or by one thread.

A torch DataLoader whose sampler is the list of tasks hands results back in the order of the tasks,
so order and resume are the caller's and nothing else. A worker sends a result as one shared buffer
(it may have hundreds of tensors; each would take a file descriptor). Without workers a thread is
one task ahead.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sailplan.errors import SailplanError

ALIGNMENT = 64  # bytes
Packed = tuple[bytes, Tensor]
Task = TypeVar("Task")
Result = TypeVar("Result")


def ahead(
    tasks: Iterable[Task], work: Callable[[Task], Result], *, workers: int, prefetch: int = 2
) -> Generator[Result, None, None]:
    """Yield `work(task)` of every task, in order.

    tasks: iterated here, as far as is worked ahead. workers: processes, 0 for a thread. prefetch:
    tasks that each worker is ahead. A SailplanError of the work is raised here in its own form.
    Close the iterator to end workers early.
    """
    return _from_workers(tasks, work, workers, prefetch) if workers else _from_thread(tasks, work)


def _from_thread(
    tasks: Iterable[Task], work: Callable[[Task], Result]
) -> Generator[Result, None, None]:
    remaining = iter(tasks)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as thread:
        started: deque[Future[Result]] = deque()
        while True:
            for task in remaining:
                started.append(thread.submit(work, task))
                if len(started) > 1:
                    break
            if not started:
                return
            yield started.popleft().result()


def _from_workers(
    tasks: Iterable[Task], work: Callable[[Task], Result], workers: int, prefetch: int
) -> Generator[Result, None, None]:
    # The tokenizer's threads do not survive the fork
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        _Work(work),
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        prefetch_factor=prefetch,
        collate_fn=_unchanged,  # type: ignore[arg-type]
        # By a thread of the loader's: uploads start from there (step.upload)
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork",
    )
    for packed in loader:
        if isinstance(packed, SailplanError):
            raise packed
        yield unpack(packed)


class _Work(Dataset[Packed | SailplanError], Generic[Task, Result]):
    """Task -> packed result.

    Errors come back as values: a worker's raise would lose their one-line form.
    """

    def __init__(self, work: Callable[[Task], Result]) -> None:
        self.work = work

    def __getitem__(self, task: Task) -> Packed | SailplanError:
        try:
            return pack(self.work(task))
        except SailplanError as error:
            return error


def _unchanged(packed: Packed) -> Packed:
    return packed


class _TensorPickler(pickle.Pickler):
    """Pickles everything but the tensors, which it collects."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.offset = 0

    def persistent_id(self, value: object) -> object:
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


def pack(value: object) -> Packed:
    """Everything but tensors as bytes, all tensors one after the other in one uint8 buffer."""
    file = io.BytesIO()
    pickler = _TensorPickler(file)
    pickler.dump(value)
    buffer, offset = _buffer(pickler.offset), 0
    for tensor in pickler.tensors:
        buffer[offset : offset + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return file.getvalue(), buffer


def _buffer(size: int) -> Tensor:
    """Return uint8 [size]; in a worker in shared memory, where it would be copied to else."""
    if get_worker_info() is None or not size:
        return torch.empty(size, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))


def unpack(packed: Packed) -> Any:
    """The inverse of `pack`; the tensors are views of the one buffer."""
    content, buffer = packed
    return _TensorUnpickler(io.BytesIO(content), buffer).load()
