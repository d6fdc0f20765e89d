"""Copies between host and device that do not make the host wait.

A copy from ordinary memory to a GPU, and any read of one number back, stops the host until the
device has done all it was given. From pinned memory the copy is one more entry in the device's
queue. On the CPU, and on a stand-in device, the same calls are plain copies.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`, copied from pinned memory where the device is a GPU; no wait.

    For the small tensors of a step. The pinned copy comes from torch's cache of pinned memory,
    which reuses it only after the transfer is done. Micro-batches have staging buffers of their own
    (step.upload).
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
