"""A model's state in 16 hex digits: equal weights give equal digits at any number of
data-parallel ranks.

Vectors are kept on disk under the fingerprint of the model that made them, so that a start after a
kill finds those of its own model and no others. Each number's bits are multiplied by a weight of
its place in the whole tensor and added up modulo 2^64, which no order or cut of the numbers
changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from sailplan.checkpoint.layout import Layout, layout_of, local
from sailplan.config.schema import Config
from sailplan.model.parallelize import reshard
from sailplan.runtime.process import Parallel

NUMBERS_AT_ONCE = 1 << 20
ODD = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(module: nn.Module, config: Config, parallel: Parallel) -> str:
    """Return 16 hex digits of the weights and of all settings that a vector depends on.

    Collective: one sum of 8 bytes a parameter.
    """
    reshard(module)
    named = [*module.named_parameters(), *module.named_buffers()]
    sums = torch.stack(
        [_sum(tensor, parallel) for _, tensor in named] or [torch.zeros((), dtype=torch.int64)]
    ).to(parallel.device)
    dist.all_reduce(sums)
    options = {
        one.name: getattr(config.data, one.name)
        for one in fields(config.data)
        if one.name not in ("sets", "workers", "prefetch", "root", "lanes", "teachers")
    }
    about = [
        dict(zip((name for name, _ in named), sums.tolist(), strict=False)),
        asdict(config.model),
        options,
        [config.parallel.dtype, parallel.tensor_parallel_size],
    ]
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sum(tensor: Tensor, parallel: Parallel) -> Tensor:
    """Return this rank's part of a tensor's sum, int64 []; of equal copies one rank's counts."""
    held = local(tensor)
    total = torch.zeros((), dtype=torch.int64, device=held.device)
    if not _counts(tensor, parallel):
        return total
    layout: Layout = layout_of(tensor, parallel)
    for block in layout.blocks:
        part = held.narrow(0, block.start, block.rows) if held.dim() else held
        rows = part.reshape(len(part) if part.dim() else 1, -1)
        offset = [*block.offset, 0, 0][:2]
        inner = rows.shape[1] // max(1, part.shape[1]) if part.dim() > 1 else 1
        columns = torch.arange(rows.shape[1], device=held.device) + offset[1] * inner
        weights = (2 * columns + 1) * ODD[0]
        step = max(1, NUMBERS_AT_ONCE // max(1, rows.shape[1]))
        for first in range(0, len(rows), step):
            some = rows[first : first + step].contiguous()
            bits = some.view(_BITS[some.element_size()]).to(torch.int64)
            numbers = torch.arange(first, first + len(some), device=held.device) + offset[0]
            total += ((bits * weights).sum(1) * ((2 * numbers + 1) * ODD[1])).sum()
    return total


def _counts(tensor: Tensor, parallel: Parallel) -> bool:
    """Return whether this rank's copy of what it holds is the one that is counted."""
    if not getattr(tensor, "tensor_model_parallel", False) and parallel.tensor_parallel_rank:
        return False
    if not isinstance(tensor, DTensor):
        return parallel.data_parallel_rank == 0
    place: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    return not any(
        number
        for number, placement in zip(place, tensor.placements, strict=False)
        if isinstance(placement, Replicate)
    )
