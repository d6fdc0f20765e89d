"""Matrix products that accumulate in full precision, and the exact softplus."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

WIDENED = 512  # rows of an operand


def product(a: Tensor, b: Tensor, target: Tensor, before: Tensor | None) -> None:
    """target = before + a @ b [n, m], in target's dtype; half-precision operands are multiplied
    as they are, never rounded after.

    In float64 some rows of float32 operands are widened at once, so that no copy of either is in
    memory."""
    if a.dtype == target.dtype:
        torch.mm(a, b, out=target) if before is None else torch.addmm(before, a, b, out=target)
    elif target.dtype is not torch.float64:
        if before is None:
            set_product(target, a, b)
        elif _adds_in_place(a.dtype, target.dtype, target.device):
            torch.addmm(before, a, b, out_dtype=target.dtype, out=target)
        else:
            torch.add(before, torch.mm(a, b, out_dtype=target.dtype), out=target)
    else:
        for rows, part in zip(target.split(WIDENED), a.split(WIDENED), strict=True):
            wide = part.to(target.dtype)
            for place, columns in zip(rows.split(WIDENED, 1), b.split(WIDENED, 1), strict=True):
                torch.mm(wide, columns.to(target.dtype), out=place)
        if before is not None:
            target += before


def add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    """target += a @ b, in target's dtype: by the product itself, which reads and writes
    ``target`` once and makes no other tensor.
    """
    if a.dtype == target.dtype:
        target.addmm_(a, b)
    elif _adds_in_place(a.dtype, target.dtype, target.device):
        torch.addmm(target, a, b, out_dtype=target.dtype, out=target)
    else:
        target += torch.mm(a, b, out_dtype=target.dtype)


def set_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    """target = a @ b, as ``add_product``; what it held does not matter."""
    if a.dtype == target.dtype:
        torch.mm(a, b, out=target)
    elif _adds_in_place(a.dtype, target.dtype, target.device):
        torch.addmm(target, a, b, out_dtype=target.dtype, beta=0, out=target)
    else:
        target.copy_(torch.mm(a, b, out_dtype=target.dtype))


@lru_cache(maxsize=64)
def _adds_in_place(operand: torch.dtype, target: torch.dtype, device: torch.device) -> bool:
    """Whether this torch multiplies half-precision operands onto a wider tensor: the first
    versions with ``out_dtype`` wanted both alike.
    """
    x, total = (
        torch.zeros(16, 16, dtype=operand, device=device),
        torch.zeros(16, 16, dtype=target, device=device),
    )
    try:
        torch.addmm(total, x, x, out_dtype=target, out=total)
    except (RuntimeError, TypeError):  # also NotImplementedError
        return False
    return True


def prefix_dots(a: Tensor, b: Tensor, prefixes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[P, ...] dot products over the first d_p entries of the last dimension."""
    both = a.to(dtype) * b.to(dtype)
    found = torch.empty((len(prefixes), *both.shape[:-1]), dtype=dtype, device=both.device)
    for target, end in zip(found, prefixes, strict=True):
        torch.sum(both[..., :end], -1, out=target)
    return found


def segments(weight: Tensor) -> Tensor:
    """[P, ...] weights of each prefix's own dimensions, those that it has beyond the one before,
    from the prefixes' own; in place.
    """
    for s in reversed(range(len(weight) - 1)):
        weight[s].add_(weight[s + 1])
    return weight


def of_dimensions(weight: Tensor, prefixes: tuple[int, ...]) -> Tensor:
    """[..., D] of every dimension, or [..., 1] where all have the same, from [P, ...] of the
    prefixes' segments.
    """
    if len(prefixes) == 1:
        return weight[0].unsqueeze(-1)
    return weight.movedim(0, -1).index_select(-1, _segment_of(prefixes, weight.device))


@lru_cache(maxsize=64)
def _segment_of(prefixes: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [D] the prefix that a dimension first belongs to; uploaded once."""
    lengths = torch.tensor(
        [end - start for start, end in zip((0, *prefixes), prefixes, strict=False)]
    )
    return torch.arange(len(prefixes)).repeat_interleave(lengths).to(device)


def row_dots(a: Tensor, b: Tensor, at_once: int) -> Tensor:
    """[n] dot products of the rows of ``a`` and ``b`` [n, D], in b's dtype; the products of that
    many rows are in memory at once.
    """
    return torch.cat(
        [
            torch.linalg.vecdot(x.to(b.dtype), y)
            for x, y in zip(a.split(at_once), b.split(at_once), strict=True)
        ]
    )


def add_scaled_rows(target: Tensor, index: Tensor, rows: Tensor, weight: Tensor) -> None:
    """target[index[e]] += weight[e] * rows[e], in target's dtype and in an order that does not
    change.
    """
    target.index_put_(
        (index,), rows.to(target.dtype) * weight[:, None].to(target.dtype), accumulate=True
    )


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), where torch's default cut-off would drop exp(-20); 0 far below zero."""
    return F.softplus(x, threshold=80)


def softplus_sum(x: Tensor) -> Tensor:
    """[n] sums over the rows of softplus(x) [n, m], with one more [n, m] in memory."""
    logarithms = x.abs().neg_().exp_().log1p_().sum(1)
    return logarithms.add_(x.clamp_min(0).sum(1))
