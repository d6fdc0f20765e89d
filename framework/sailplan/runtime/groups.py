"""The process groups of a world: one over the ranks that hold the same samples, one over those
that hold the same weights.

megatron-core's own set-up forms some dozen groups of which most are copies of these, with a twin
for gloo each: at W ranks about 12 W sockets a rank. Here each rank forms the groups that it is in
and no other, a group over the whole world is the default one, and all have the run's time-out.
megatron-core's layers find them where its own set-up would have left them.
"""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist

from sailplan.runtime.environment import node_count
from sailplan.runtime.process import Parallel


def group_of(ranks: list[int], timeout: datetime.timedelta | None = None) -> dist.ProcessGroup:
    """Return the group of these ranks, of which this one is one: the default group where they
    are all. Only they take part.
    """
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD  # type: ignore[return-value]
    return dist.new_group(
        ranks, timeout=timeout or default_timeout(), use_local_synchronization=True
    )


def default_timeout() -> datetime.timedelta:
    """Return the default group's time-out, which every group of a run has: torch's own would be
    30 minutes for each new one.
    """
    from torch.distributed.distributed_c10d import _get_default_group

    group = _get_default_group()
    kind = group._device_types[0]
    found: datetime.timedelta = getattr(
        group._get_backend(kind).options, "_timeout", datetime.timedelta(minutes=30)
    )
    return found


def form_groups(tensor: int, device: torch.device) -> Parallel:
    """Form the groups of a world that has its default group; return this rank's place in them.

    tensor: ranks that hold the same samples, neighbours by number; a divisor of the world's size.
    """
    from megatron.core import parallel_state

    rank, world_size = dist.get_rank(), dist.get_world_size()
    peers = [rank - rank % tensor + place for place in range(tensor)]
    copies = list(range(rank % tensor, world_size, tensor))
    tensor_parallel, data_parallel = group_of(peers), group_of(copies)
    alone = next(
        (
            group
            for group, ranks in ((tensor_parallel, peers), (data_parallel, copies))
            if len(ranks) == 1
        ),
        None,
    ) or group_of([rank])
    parallel_state.destroy_model_parallel()
    state = vars(parallel_state)
    state["_TENSOR_MODEL_PARALLEL_GROUP"] = state["_MODEL_PARALLEL_GROUP"] = tensor_parallel
    state["_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS"] = state["_MODEL_PARALLEL_GLOBAL_RANKS"] = peers
    state["_DATA_PARALLEL_GROUP"] = state["_DATA_PARALLEL_GROUP_WITH_CP"] = data_parallel
    state["_DATA_PARALLEL_GLOBAL_RANKS"] = state["_DATA_PARALLEL_GLOBAL_RANKS_WITH_CP"] = copies
    # Nothing is pipelined, cut along its context or made of experts: those groups hold this rank
    # alone.
    for name in (
        "_CONTEXT_PARALLEL",
        "_PIPELINE_MODEL_PARALLEL",
        "_EXPERT_MODEL_PARALLEL",
        "_EXPERT_TENSOR_PARALLEL",
        "_EMBEDDING",
    ):
        state[f"{name}_GROUP"] = alone
    state["_CONTEXT_PARALLEL_GLOBAL_RANKS"] = state["_PIPELINE_GLOBAL_RANKS"] = state[
        "_EMBEDDING_GLOBAL_RANKS"
    ] = [rank]
    parallel_state._set_global_memory_buffer()
    return Parallel(
        rank=rank,
        world_size=world_size,
        device=device,
        data_parallel_group=data_parallel,
        data_parallel_rank=copies.index(rank),
        data_parallel_size=len(copies),
        tensor_parallel_group=tensor_parallel,
        tensor_parallel_rank=peers.index(rank),
        tensor_parallel_size=len(peers),
        nodes=node_count(world_size),
    )


def leave_groups() -> None:
    """Forget the groups of `form_groups`, and close the default group with them."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
