"""Matrix products that accumulate in full precision, and how many rows fit into a budget."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, accumulate: torch.dtype) -> Tensor:
    """a @ b (2-d or batched) in ``accumulate``; half-precision operands are multiplied as they are, never rounded after."""
    if a.dtype == accumulate:
        return a @ b
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=accumulate)


def add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    """target += a @ b, in target's dtype."""
    if a.dtype == target.dtype:
        target.addmm_(a, b)
    else:
        target += torch.mm(a, b, out_dtype=target.dtype)


def rows_per_chunk(budget: int, width: int, dimension: int, dtype: torch.dtype) -> int:
    """Rows whose cosines, scores, one temporary and three masks, and embeddings fit into ``budget`` bytes; at least one."""
    size = torch.finfo(dtype).bits // 8
    return max(1, budget // (width * (3 * size + 3) + 4 * dimension * size))
