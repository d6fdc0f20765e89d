"""From a model's hidden states to one vector a row.

Shape legend: b rows, t tokens, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over present tokens."""
    return _weighted(hidden, mask.to(hidden.dtype))


def weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean weighted by position, 1 for the first token (Muennighoff, SGPT, arXiv
    2202.08904).
    """
    return _weighted(hidden, mask.cumsum(1).to(hidden.dtype) * mask.to(hidden.dtype))


def cls(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the first present token."""
    return _at(hidden, mask.to(torch.int64).argmax(1))


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the last present token."""
    places = torch.arange(mask.size(1), device=mask.device)
    return _at(hidden, (places * mask).argmax(1))


def maximum(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the largest number of each dimension over present tokens."""
    return hidden.masked_fill(~mask.bool()[..., None], -torch.inf).amax(1)


POOLINGS: dict[
    str, Callable[[Tensor, Tensor], Tensor]
] = {  # hidden [b, t, h], mask [b, t] with a token in each row -> [b, h]
    "mean": mean,
    "weighted_mean": weighted_mean,
    "cls": cls,
    "last_token": last_token,
    "max": maximum,
}


def _weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    return (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


def _at(hidden: Tensor, place: Tensor) -> Tensor:
    return hidden.gather(1, place[:, None, None].expand(-1, 1, hidden.size(2)))[:, 0]
