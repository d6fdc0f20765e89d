"""Starting a rank: device, process groups, megatron-core's parallel state. One place knows the meshes.

Under torchrun or Slurm the usual environment variables say which rank this is; without them the process is
a world of one, with a real process group, so that one rank and a thousand run the same code.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sailplan.runtime.config import ParallelConfig
from sailplan.runtime.environment import fill_in_slurm, node_count, world_size_from_environment


@dataclass(frozen=True)
class Parallel:
    """This rank's place: tensor-parallel peers hold the same samples, data-parallel peers the same weights."""

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

    def broadcast_text(self, text: str) -> str:
        """Rank 0's text on every rank."""
        box: list[str | None] = [text]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return str(box[0])


def device_type() -> str:
    """The kind of device that a run on this machine computes on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def started(config: ParallelConfig) -> Iterator[Parallel]:
    """Joins the world, forms the groups, yields this rank's place; leaves the world at the end.

    Raises ConfigurationError before any group is formed if `parallel.tensor` does not divide the world.
    """
    from megatron.core import parallel_state

    fill_in_slurm()
    world_size = world_size_from_environment()
    config.check_world(world_size)
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    if device_type() == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // local_world))
    timeout = datetime.timedelta(seconds=config.timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        if world_size == 1:
            dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
        try:
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=config.tensor)
            yield Parallel(
                rank=rank,
                world_size=world_size,
                device=device,
                data_parallel_group=parallel_state.get_data_parallel_group(),
                data_parallel_rank=parallel_state.get_data_parallel_rank(),
                data_parallel_size=parallel_state.get_data_parallel_world_size(),
                tensor_parallel_group=parallel_state.get_tensor_model_parallel_group(),
                tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
                tensor_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
                nodes=node_count(world_size),
            )
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
