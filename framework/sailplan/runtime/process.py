"""A rank's place in the world: its groups, its device, and the few messages that everything
needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Parallel:
    """This rank's place: tensor-parallel peers hold the same samples, data-parallel peers the
    same weights.
    """

    rank: int
    world_size: int
    device: torch.device
    data_parallel_group: dist.ProcessGroup
    data_parallel_rank: int
    data_parallel_size: int
    tensor_parallel_group: dist.ProcessGroup
    tensor_parallel_rank: int
    tensor_parallel_size: int
    nodes: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all ranks; a small all-reduce, which works on every back end."""
        dist.all_reduce(torch.zeros(1, device=self.device))

    def agree(self, flag: bool) -> bool:
        """True on all ranks if it is true on any of them."""
        value = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of all ranks, one rank's after the other's: int64 [k, c], k of each rank's own ->
        int64 [n, c] on the CPU. Two messages: a number a rank, then the rows alone.
        """
        counts = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        counts[self.rank] = len(rows)
        dist.all_reduce(counts)
        ends = counts.cumsum(0).tolist()
        result = torch.zeros(ends[-1], rows.shape[1], dtype=torch.int64, device=self.device)
        result[ends[self.rank] - len(rows) : ends[self.rank]] = rows.to(self.device)
        dist.all_reduce(result)
        return result.cpu()

    def broadcast_text(self, text: str) -> str:
        """Rank 0's text on every rank."""
        box: list[str | None] = [text]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return str(box[0])


def device_type() -> str:
    """The kind of device that a run on this machine computes on."""
    return "cuda" if torch.cuda.is_available() else "cpu"
