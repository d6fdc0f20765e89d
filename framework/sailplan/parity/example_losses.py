"""Losses to try the parity check on: the library's own, and three mistakes that public trainers
make.

sailplan check parity --loss sailplan.parity.example_losses:exact
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sailplan_kernels import infonce
from sailplan_kernels.exchange import AllGather

TEMPERATURE = 0.1


def exact(queries: Tensor, keys: Tensor) -> Tensor:
    """The library's InfoNCE over all ranks' keys."""
    return infonce(
        queries, keys, torch.tensor(TEMPERATURE, dtype=queries.dtype), exchange=AllGather()
    ).loss


def local_only(queries: Tensor, keys: Tensor) -> Tensor:
    """Wrong: only the rank's own keys are negatives."""
    return F.cross_entropy(queries @ keys.T / TEMPERATURE, torch.arange(len(queries)))


def gathered_without_gradient(queries: Tensor, keys: Tensor) -> Tensor:
    """Wrong: torch's all_gather has no backward, so no rank hears how its keys hurt the others'
    queries.
    """
    everyone = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, keys.detach())
    everyone[dist.get_rank()] = keys
    first = dist.get_rank() * len(queries)
    return F.cross_entropy(
        queries @ torch.cat(everyone).T / TEMPERATURE, torch.arange(first, first + len(queries))
    )


def scaled_by_world(queries: Tensor, keys: Tensor) -> Tensor:
    """Wrong: the right direction, multiplied once more by the number of ranks."""
    return exact(queries, keys) * dist.get_world_size()
