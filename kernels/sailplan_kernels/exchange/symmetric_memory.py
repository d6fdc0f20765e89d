"""The all-gather without a kernel: a rank puts its shard where its peers can read it, and the
copy engine fetches theirs.

The stream of AllGather with another way out: the same bytes, and a window of one shard more in
memory, but no multiprocessor is taken from the matrix products that go on meanwhile. Own rows are
at hand and are not fetched. Gradients come home by AllGather's reduce-scatter. For ranks whose
devices reach each other's memory (NVLink on one host); torch.distributed._symmetric_memory does the
mapping and the flags.

**Unproved: no GPU has run it.** What is tested, over files that processes share, is everything but
three calls of torch and the side stream: who reads what when, uneven shards, and that a window is
not overwritten while a peer still reads it.
"""

from __future__ import annotations

import socket
import zlib
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sailplan_kernels.exchange.all_gather import AllGather, Waitable


class Window(Protocol):
    """Memory of equal size on every rank that all of them can read."""

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...

    def barrier(self) -> None:
        """What any rank has asked for before is done before anything that is asked for after."""


class SymmetricMemory(AllGather):
    """Exchange over a process group (None: the default group).

    Raises ValueError, on all ranks, where it cannot work.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(group)
        obstacle = self.obstacle()
        if obstacle is not None:
            raise ValueError(
                f"symmetric_memory: found {obstacle}, expected CUDA devices of one host that reach "
                "each other's memory; use all_gather"
            )
        self._window: Window | None = None
        self._bytes = 0
        self._side: torch.cuda.Stream | None = None

    def obstacle(self) -> str | None:
        """What stands in the way, the same answer on all ranks; None: nothing. A collective."""
        devices = range(torch.cuda.device_count())
        reach = bool(devices) and all(
            torch.cuda.can_device_access_peer(a, b) for a in devices for b in devices if a != b
        )
        hosts = self.sizes(
            zlib.crc32(socket.gethostname().encode()) if reach else -1 - bool(devices)
        )
        if -1 in hosts:
            return "no CUDA device"
        if -2 in hosts:
            return "CUDA devices that do not reach each other's memory"
        return "ranks on several hosts" if len(set(hosts)) > 1 else None

    def open(self, size: int) -> Window:
        """A window of ``size`` bytes. A collective."""
        import torch.distributed._symmetric_memory as symmetric_memory

        if self._side is not None:
            # Nobody reads the former window any more when all have come here
            self._side.synchronize()
        self._memory = symmetric_memory.empty(
            size, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device())
        )
        return symmetric_memory.rendezvous(
            self._memory, self.group or dist.distributed_c10d._get_default_group()
        )

    def start(self, everyone: Tensor, mine: Tensor) -> _Fetching:
        if mine.nbytes > self._bytes:  # the same on all ranks: ``mine`` is padded to the longest
            self._window, self._bytes = self.open(mine.nbytes), mine.nbytes
        side, window = self._aside(everyone, mine), self._window
        shape = tuple(mine.shape)
        if window is not None and mine.nbytes:
            with side:
                window.barrier()  # peers have fetched what lay here before
                window.get_buffer(self.rank, shape, mine.dtype).copy_(mine)
                window.barrier()
                for step in range(
                    1, self.world_size
                ):  # from the next rank first: no two read the same one at a time
                    peer = (self.rank + step) % self.world_size
                    everyone[peer * shape[0] : (peer + 1) * shape[0]].copy_(
                        window.get_buffer(peer, shape, mine.dtype)
                    )
        return _Fetching(self._side)

    def start_parts(self, everyone: list[Tensor], mine: list[Tensor]) -> Waitable:
        """The largest part, the vectors, by the copy engines; the others in a collective."""
        large = max(range(len(mine)), key=lambda part: mine[part].nbytes)
        small = [part for part in range(len(mine)) if part != large]
        if small:
            super().start_parts(
                [everyone[part] for part in small], [mine[part] for part in small]
            ).wait()
        whole, own = everyone[large], mine[large]
        whole[self.rank * len(own) : (self.rank + 1) * len(own)].copy_(
            own
        )  # what ``start`` leaves out
        return self.start(whole, own)

    def _aside(self, *used: Tensor) -> AbstractContextManager[object]:
        """A CUDA stream beside the current one, after all that this one has done so far."""
        if not used[0].is_cuda:
            return nullcontext()
        self._side = self._side or torch.cuda.Stream()
        self._side.wait_stream(torch.cuda.current_stream())
        for x in used:
            x.record_stream(self._side)
        return torch.cuda.stream(self._side)


class _Fetching:
    """To be waited for like a collective's work."""

    def __init__(self, side: torch.cuda.Stream | None) -> None:
        self.side = side

    def wait(self) -> None:
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)
