"""L2 normalisation that survives zero vectors and huge norms, and the norms of Matryoshka prefixes."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-12


def normalize(x: Tensor) -> Tensor:
    """``x`` [..., D] with rows of length one, in x's dtype (float32 or float64).

    The row is divided by its largest entry first, so squares neither overflow nor vanish; length does not matter to
    the result or its gradient, so that entry counts as a constant. A row without an entry above EPSILON has no
    direction: it becomes zero and its gradient is zero (a clamp alone would hand it a gradient of 1/EPSILON).
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    alive = largest > EPSILON
    scaled = x / torch.where(alive, largest, 1.0)
    scaled = torch.where(alive, scaled, 0.0)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(alive, length, 1.0)


def inverse_norms(x: Tensor, prefixes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[P, n] 1 / length of the first d_p entries, 0 where they are all zero."""
    squares, total, start = [], None, 0
    for end in prefixes:
        part = torch.linalg.vector_norm(x[:, start:end], dim=1, dtype=dtype).square()
        total = part if total is None else total + part
        squares.append(total)
        start = end
    lengths = torch.stack(squares).sqrt()
    return torch.where(lengths > 0, lengths.reciprocal(), 0.0)
