"""L2 normalisation that survives zero vectors and huge norms, and the norms of Matryoshka prefixes.

Under autograd it is ``normalize``. A loss that computes its gradient in the forward pass goes
without the copies that autograd keeps: ``operand`` gives its matrix products the vectors
themselves, whose inverse norms every score carries anyway, and ``normalized_gradient_`` turns the
sum it has accumulated into the vectors' gradient, in place.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sailplan_kernels.tiling.products import segments

EPSILON = 1e-12
# Rows whose length lies between it and its inverse: their products are far from overflow and from
# nothing
SAFE_LENGTH = 1e-4


def normalize(x: Tensor) -> Tensor:
    """``x`` [..., D] with rows of length one, in x's dtype (float32 or float64).

    The row is divided by its largest entry first, so squares neither overflow nor vanish; length
    does not matter to the result or its gradient, so that entry counts as a constant. A row without
    an entry above EPSILON has no
    direction: it becomes zero and its gradient is zero (a clamp alone would hand it a gradient of
    1/EPSILON).
    """
    return _unit(x)[0]


def _unit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``normalize(x)`` and what it has divided by: the largest entry, then the length of what is
    left [..., 1].
    """
    largest = torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1, keepdim=True)
    alive = ~(largest <= EPSILON)  # what is no number stays none: a loss of it must not look right
    largest = torch.where(alive, largest, 1.0)
    scaled = torch.where(alive, x / largest, 0.0)
    length = torch.where(alive, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True), 1.0)
    return scaled / length, largest, length


def operand(
    x: Tensor, valid: Tensor | None, dtype: torch.dtype, at_once: int
) -> tuple[Tensor, Tensor | None]:
    """[n, D] what the matrix products read of ``x`` [n, D], in ``dtype``, and by what its rows
    were multiplied [n]; None: by nothing.

    It is ``x`` itself where that is safe. Where x has another dtype, or, on a CPU, a row whose
    entries are so large or small (or NaN, in padding) that products might fail, it is normalised in
    float32 or float64, rounded once, zero in rows not ``valid``; ``at_once`` rows at a time. On a
    device the host does not wait to look: padding is zeroed, and all other rows are to have entries
    that are far from overflow. valid: bool [n]; None: there is no padding.
    """
    x = x.detach()
    if x.dtype == dtype:
        if x.device.type != "cpu":
            return (x.contiguous() if valid is None else torch.where(valid[:, None], x, 0.0)), None
        length = torch.linalg.vector_norm(x, dim=-1)
        if ((length == 0) | ((length > SAFE_LENGTH) & (length < 1 / SAFE_LENGTH))).all():
            return x.contiguous(), None
    found = torch.empty(x.shape, dtype=dtype, device=x.device)
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = torch.empty(len(x), dtype=wide, device=x.device)
    for start in range(0, len(x), at_once):
        here = slice(start, start + at_once)
        part = x[here].to(wide)
        unit, largest, length = _unit(
            part if valid is None else torch.where(valid[here, None], part, 0.0)
        )
        found[here] = unit
        scale[here] = (largest.reciprocal() / length)[:, 0]
    return found, scale


def normalized_gradient_(
    gradient: Tensor,
    operand: Tensor,
    norms: Tensor,
    prefixes: tuple[int, ...],
    moment: Tensor | None,
    scale: Tensor | None,
    at_once: int,
) -> None:
    """From the gradient of the scaled operand's dot products [n, D] to that of what was given,
    in place.

    A cosine is <x_p, y_p> a_p b_p with inverse prefix norms a, b, so d cos / dx = y_p a_p b_p - cos
    a_p^2 x_p. ``moment`` [P, n], sums of G * cosine, says what the second term of the shorter
    prefixes is. Scores do not depend on a row's length, so whatever is then left along the whole
    row is taken out at once: the longest prefix's term, and what rounding has left there.
    """
    for start in range(0, len(gradient), at_once):
        here = slice(start, start + at_once)
        project_(
            gradient[here],
            operand[here],
            norms[:, here],
            prefixes,
            None if moment is None else moment[:, here],
        )
        if scale is not None:
            gradient[here].mul_(scale[here, None])


def project_(
    gradient: Tensor, x: Tensor, norms: Tensor, prefixes: tuple[int, ...], moment: Tensor | None
) -> Tensor:
    """One piece of ``normalized_gradient_``, without the scale; [n] what was left along the rows
    when the shorter prefixes' terms were out.
    """
    square, dtype = norms.square(), gradient.dtype
    if moment is not None and len(prefixes) > 1:
        share = segments(square[:-1] * moment[: len(prefixes) - 1]).to(dtype)
        for weight, (first, end) in zip(share, pairwise((0, *prefixes)), strict=False):
            gradient[:, first:end].addcmul_(x[:, first:end], weight[:, None], value=-1)
    along = (x * gradient).sum(1)
    gradient.addcmul_(x, (along * square[-1]).to(dtype)[:, None], value=-1)
    return along


def inverse_norms(x: Tensor, prefixes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[P, n] 1 / length of the first d_p entries, 0 where they are all zero."""
    lengths = torch.empty((len(prefixes), len(x)), dtype=dtype, device=x.device)
    for length, end in zip(lengths, prefixes, strict=True):
        torch.linalg.vector_norm(x[:, :end], dim=1, dtype=dtype, out=length)
    return lengths.reciprocal_().nan_to_num_(nan=torch.nan, posinf=0.0)
