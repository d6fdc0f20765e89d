"""The gradients of the small replicated parameters (objectives, temperatures), averaged in one message.

The encoder's gradients are reduced by its sharding. Objectives and temperatures are plain tensors, equal on all
ranks; by the losses' convention the mean over data-parallel ranks of their gradients is the full-batch gradient.
A flat buffer carries all of them, and, as it travels anyway, the step's losses and metrics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sailplan.runtime.process import Parallel


def average_gradients(parameters: Sequence[nn.Parameter], values: dict[str, Tensor], parallel: Parallel) -> dict[str, Tensor]:
    """Averages the parameters' gradients, in place, and the 0-d `values` over the data-parallel group: one all-reduce.

    The list and the values' names must be the same on all ranks. A parameter without a gradient on any rank keeps
    None, so that the optimizer's momentum does not move what this step did not use; without one on some ranks, those
    count as zero. Returns the averaged values, 0-d.
    """
    if not parameters and not values:
        return {}
    names = sorted(values)
    dtype = torch.float32
    for tensor in [*parameters, *values.values()]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=dtype, device=parallel.device)
    pieces = [used, *[values[name].detach().to(parallel.device, dtype).reshape(1) for name in names]]
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        pieces.append(gradient.detach().to(dtype).reshape(-1))
    flat = torch.cat(pieces)
    dist.all_reduce(flat, group=parallel.data_parallel_group)
    flat /= parallel.data_parallel_size
    used, averaged, gradients = flat.split([len(parameters), len(names), flat.numel() - len(parameters) - len(names)])
    parts = gradients.split([parameter.numel() for parameter in parameters])
    for parameter, was_used, part in zip(parameters, used.tolist(), parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype) if was_used else None
    return dict(zip(names, averaged, strict=True))
