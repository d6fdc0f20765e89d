"""Integers and masks that the host knows, on their way to the device: one buffer, one copy.

What says which key belongs to which query comes from the data, so the loader has it on the CPU
before the step. Given there, it is combined there, and the device receives it in a single copy that
the host does not wait for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ALIGNMENT = 16


def upload(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on ``device``, contiguous.

    Those of the CPU that must travel do so in one copy, as views of one buffer.
    """
    travelling = {name: x.contiguous() for name, x in tensors.items() if x.device != device}
    if any(x.device.type != "cpu" for x in travelling.values()):
        raise ValueError(
            f"infonce: found ids or masks on neither the CPU nor {device}, expected one of them"
        )
    offsets, size = {}, 0
    for name, x in travelling.items():
        offsets[name] = size
        size += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
    if size:
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for name, x in travelling.items():
            buffer[offsets[name] : offsets[name] + x.nbytes] = x.view(-1).view(torch.uint8)
        there = buffer.to(device, non_blocking=True)
        for name, x in travelling.items():
            part = there[offsets[name] : offsets[name] + x.nbytes]
            travelling[name] = part.view(x.dtype).view(x.shape)
    return {
        name: travelling[name] if name in travelling else x.contiguous()
        for name, x in tensors.items()
    }
