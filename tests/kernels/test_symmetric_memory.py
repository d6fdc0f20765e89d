"""The exchange over symmetric memory: refused without CUDA; its order of reads and writes over
files that ranks share.
"""

from __future__ import annotations

import time
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sailplan_kernels import AllGather, SymmetricMemory, infonce
from sailplan_kernels.arguments import grouped
from sailplan_kernels.testing import run_ranks


class Files:
    """A window in files that all ranks have mapped; rank 1 reads late."""

    def __init__(self, folder: Path, rank: int, world_size: int, size: int) -> None:
        self.rank = rank
        self.memory = [
            torch.from_file(str(folder / f"{size}-{r}"), shared=True, size=size, dtype=torch.uint8)
            for r in range(world_size)
        ]

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self.rank == 1 and rank != 1:
            time.sleep(0.02)
        return self.memory[rank][: prod(sizes) * dtype.itemsize].view(dtype).view(sizes)

    def barrier(self) -> None:
        dist.barrier()


class OverFiles(SymmetricMemory):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__()

    def obstacle(self) -> str | None:
        return None

    def open(self, size: int) -> Files:
        return Files(self.folder, self.rank, self.world_size, size)


def test_without_cuda_it_is_refused_in_one_line():
    def work(rank, _):
        with pytest.raises(ValueError) as caught:
            SymmetricMemory()
        return str(caught.value)

    said = run_ranks(work, 2)
    expected = "found no CUDA device, expected CUDA devices of one host that reach each other's memory; use all_gather"
    assert said == [f"symmetric_memory: {expected}"] * 2


def test_it_gathers_what_all_gather_does(make_case, tmp_path):
    """The same bits; two streams at a time and one after the other share a window, which then
    has to grow.
    """
    ranks = [
        make_case(seed, (5, 0, 3), (7, 0, 4), dim, query_negatives=True)[0]
        for seed, dim in ((0, 6), (1, 6), (2, 9))
    ]

    def work(rank, _):
        symmetric, found = OverFiles(tmp_path), []
        for case in ranks:
            for exchange in (AllGather(), symmetric):
                mine = {
                    name: x.clone().requires_grad_() if name in ("queries", "keys") else x
                    for name, x in case[rank].items()
                }
                out = infonce(**grouped(mine), exchange=exchange)
                out.loss.backward()
                found.append((out.loss.detach(), mine["queries"].grad, mine["keys"].grad))
        return found

    for found in run_ranks(work, 3):
        for one, other in zip(found[::2], found[1::2], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
