"""The gradients of the small replicated parameters (objectives, temperatures), averaged in one
message.

The encoder's gradients are reduced by its sharding. Objectives and temperatures are plain tensors,
equal on all ranks; by the losses' convention the mean over data-parallel ranks of their gradients
is the full-batch gradient.
A flat buffer carries all of them, and, as it travels anyway, the step's losses and metrics. Nothing
of it is read by the host here: a step reads all its numbers at once, when it must wait for the
verdict in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sailplan.runtime.process import Parallel
from sailplan.runtime.transfer import to_device


@dataclass(frozen=True)
class Averaged:
    """What `average_gradients` averaged, still on the device."""

    names: list[str]
    values: Tensor  # [names]
    parameters: Sequence[nn.Parameter]
    used: Tensor  # [parameters]; above 0 where any rank had a gradient

    def named(self) -> dict[str, Tensor]:
        """The values by name, 0-d."""
        return dict(zip(self.names, self.values, strict=True))

    def drop_unused(self, used: Sequence[float]) -> None:
        """Remove the gradients of parameters that no rank used, so that momentum does not move
        what this step did not use.

        used: the numbers of `self.used`, read by the caller.
        """
        for parameter, was_used in zip(self.parameters, used, strict=True):
            if not was_used:
                parameter.grad = None


def average_gradients(
    parameters: Sequence[nn.Parameter], values: dict[str, Tensor], parallel: Parallel
) -> Averaged:
    """Averages the parameters' gradients, in place, and the 0-d `values` over the data-parallel
    group: one all-reduce.

    The list and the values' names must be the same on all ranks. A parameter without a gradient on
    some ranks counts as zero there; without one on any rank it holds zeros until
    `Averaged.drop_unused`.
    """
    names = sorted(values)
    dtype = torch.float32
    for tensor in [*parameters, *values.values()]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    used = to_device(
        torch.tensor([parameter.grad is not None for parameter in parameters], dtype=dtype),
        parallel.device,
    )
    pieces = [
        used,
        *[values[name].detach().to(parallel.device, dtype).reshape(1) for name in names],
    ]
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        pieces.append(gradient.detach().to(dtype).reshape(-1))
    flat = torch.cat(pieces)
    if flat.numel():
        dist.all_reduce(flat, group=parallel.data_parallel_group)
        flat /= parallel.data_parallel_size
    used, averaged, gradients = flat.split(
        [len(parameters), len(names), flat.numel() - len(parameters) - len(names)]
    )
    for parameter, part in zip(
        parameters, gradients.split([parameter.numel() for parameter in parameters]), strict=True
    ):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
    return Averaged(names, averaged, parameters, used)
