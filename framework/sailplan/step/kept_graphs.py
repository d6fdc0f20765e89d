"""How many micro-batches keep their graphs between the two passes: as many as free memory holds
(`step.kept_graphs: auto`).

A kept graph saves one forward of its micro-batch. One is always kept, as a replay would need the
same memory. The first step with a set of data sets in a stage keeps one and measures: how large the
largest graph is, and how much memory the step needed at its peak. From the second on, so many more
graphs are kept as fit into what is left. On a GPU the allocator's counters are read, elsewhere the
tensors that autograd saves are added up and the host's available memory is shared by its ranks. The
ranks agree on the smallest number, once for each such set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from sailplan.runtime.process import Parallel

AUTO = "auto"
# Of what the process can still have; the rest is for fragments and for batches with longer rows
GPU_SHARE = 0.9
HOST_SHARE = 0.5  # of the host's available memory, over the ranks of the host


@dataclass
class _Measured:
    """Of the first step of a kind."""

    before: int  # bytes allocated at its start (GPU)
    largest: int = 0  # bytes of the largest graph


class KeptGraphs:
    """Decides, for each step, how many graphs to keep.

    setting: a number (-1: all), or "auto". available: bytes that more graphs may take, for tests;
    None: of this machine.
    """

    def __init__(
        self,
        setting: int | str,
        encoder: nn.Module,
        parallel: Parallel,
        available: Callable[[], int] | None = None,
    ) -> None:
        self.encoder, self.parallel = encoder, parallel
        self.fixed = None if setting == AUTO else int(setting)
        self._available = available or self._free
        self._known: dict[tuple[str, ...], int] = {}
        self._measured: dict[tuple[str, ...], _Measured] = {}
        self._now: _Measured | None = None

    def begin(self, kind: Sequence[str]) -> int:
        """The number for a step (-1: all).

        kind: stage and data sets, the same on all ranks; a collective at the second step of each.
        """
        self._now = None
        if self.fixed is not None:
            return self.fixed
        key = tuple(kind)
        if key in self._measured and key not in self._known:
            self._known[key] = self._agreed(self._measured[key])
        if key not in self._known:
            self._now = self._measured[key] = _Measured(self._allocated())
            self._start_peak()
            return 1
        return self._known[key]

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Around the forward of a micro-batch with its graph."""
        now = self._now
        if now is None:
            yield
        elif self._on_gpu:
            before = self._allocated()
            yield
            now.largest = max(now.largest, self._allocated() - before)
        else:
            saved = SavedBytes(self.encoder)
            with saved_tensors_hooks(saved.note, _unchanged):
                yield
            now.largest = max(now.largest, saved.total)

    def _agreed(self, measured: _Measured) -> int:
        number = 1 + max(0, self._available()) // max(1, measured.largest)
        smallest = torch.tensor(
            [min(number, 2**31)], dtype=torch.int64, device=self.parallel.device
        )
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return int(smallest.item())

    # ---------------------------------------------------------------- memory
    @property
    def _on_gpu(self) -> bool:
        return self.parallel.device.type == "cuda"

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.parallel.device) if self._on_gpu else 0

    def _start_peak(self) -> None:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.parallel.device)

    def _free(self) -> int:
        """Bytes that more kept graphs may take on this rank, after a step that kept one."""
        if not self._on_gpu:
            return int(HOST_SHARE * host_memory()) // int(
                os.environ.get("LOCAL_WORLD_SIZE", self.parallel.world_size)
            )
        device, before = (
            self.parallel.device,
            min(measured.before for measured in self._measured.values()),
        )
        # What the first step left behind, the optimizer's state, is there at every later peak.
        peak = torch.cuda.max_memory_allocated(device) + max(0, self._allocated() - before)
        usable = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return int(GPU_SHARE * usable) - peak


class SavedBytes:
    """Adds up the memory of the tensors that autograd saves, each once, without the encoder's
    parameters, which are there anyway.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.total = 0
        self._encoder = encoder
        self._seen: set[int] = set()

    def note(self, tensor: Tensor) -> Tensor:
        if not self._seen:
            parameters = (
                p.to_local() if isinstance(p, DTensor) else p for p in self._encoder.parameters()
            )
            self._seen = {_place(parameter) for parameter in parameters}
        place = _place(tensor)
        if place not in self._seen:
            self._seen.add(place)
            self.total += tensor.untyped_storage().nbytes()
        return tensor


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def host_memory() -> int:
    """Bytes of memory that the host can still give: Linux's MemAvailable, at most what the
    control group leaves; 0 where unknown.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        return found if most == "max" else min(found, max(0, int(most) - used))
    except (OSError, ValueError):
        return found
