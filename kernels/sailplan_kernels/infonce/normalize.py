"""L2 normalisation that survives zero vectors and huge norms, and the norms of Matryoshka prefixes.

Under autograd it is ``normalize``. A loss that computes its gradient in the forward pass goes without the copies that
autograd keeps: ``operand`` gives its matrix products the vectors themselves, whose inverse norms every score carries
anyway, and ``normalized_gradient_`` turns the sum it has accumulated into the vectors' gradient, in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-12
TAME = 1e-4  # rows whose largest entry lies between it and its inverse: their products are far from overflow and from nothing


def normalize(x: Tensor) -> Tensor:
    """``x`` [..., D] with rows of length one, in x's dtype (float32 or float64).

    The row is divided by its largest entry first, so squares neither overflow nor vanish; length does not matter to
    the result or its gradient, so that entry counts as a constant. A row without an entry above EPSILON has no
    direction: it becomes zero and its gradient is zero (a clamp alone would hand it a gradient of 1/EPSILON).
    """
    return _unit(x)[0]


def _unit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``normalize(x)`` and what it has divided by: the largest entry, then the length of what is left [..., 1]."""
    largest = torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1, keepdim=True)
    alive = largest > EPSILON
    largest = torch.where(alive, largest, 1.0)
    scaled = torch.where(alive, x / largest, 0.0)
    length = torch.where(alive, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True), 1.0)
    return scaled / length, largest, length


def operand(x: Tensor, valid: Tensor, dtype: torch.dtype, at_once: int) -> tuple[Tensor, bool]:
    """[n, D] what the matrix products read of ``x`` [n, D], in ``dtype``, and whether it is a normalised copy.

    It is ``x`` itself where that is safe. Where x has another dtype, or a row whose entries are so large or small (or NaN,
    in padding) that products might fail, it is normalised in float32 or float64, rounded once, zero in rows not ``valid``;
    ``at_once`` rows at a time.
    """
    x = x.detach()
    if x.dtype == dtype:
        largest = torch.linalg.vector_norm(x, torch.inf, dim=-1)
        if ((largest == 0) | ((largest > TAME) & (largest < 1 / TAME))).all():
            return x.contiguous(), False
    found = torch.empty(x.shape, dtype=dtype, device=x.device)
    for target, some, counts in zip(found.split(at_once), x.split(at_once), valid.split(at_once), strict=True):
        target.copy_(_unit(_wide(some, counts))[0])
    return found, True


def normalized_gradient_(gradient: Tensor, x: Tensor, valid: Tensor, copied: bool, at_once: int) -> None:
    """From the gradient of the operand [n, D], whatever it has along each row, to the gradient of ``x``, in place.

    Scores do not depend on a row's length, so what ``gradient`` has along the row is taken out.
    """
    for part, some, counts in zip(gradient.split(at_once), x.split(at_once), valid.split(at_once), strict=True):
        unit, largest, length = _unit(_wide(some, counts))
        part.addcmul_(unit, torch.linalg.vecdot(unit, part)[:, None], value=-1)
        if copied:
            part.div_(length).div_(largest)


def _wide(x: Tensor, valid: Tensor) -> Tensor:
    """In float32 at least; padding may hold anything, also NaN, and becomes zero."""
    return torch.where(valid[:, None], x, 0.0).to(torch.promote_types(x.dtype, torch.float32))


def inverse_norms(x: Tensor, prefixes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[P, n] 1 / length of the first d_p entries, 0 where they are all zero."""
    lengths: list[Tensor] = []
    start = 0
    for end in prefixes:
        part = torch.linalg.vector_norm(x[:, start:end], dim=1, dtype=dtype)
        lengths.append(torch.hypot(lengths[-1], part) if lengths else part)
        start = end
    length = torch.stack(lengths)
    return torch.where(length > 0, length.reciprocal(), 0.0)
