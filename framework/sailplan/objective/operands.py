"""The losses' door: what their kernels read and exchange of the embeddings, where half precision
computes.

A cosine does not depend on a vector's length, so a vector is normalised first and then rounded: in
float32, and once. The rounded vectors are half as long a message as float32 ones, and what
`backend: auto` gives to Triton on a GPU. Several losses and patterns read one view: its rounded
vectors exist once, each reader's gradient comes back through an entrance of its own, and the sum of
them is float32's, as is the normalisation's part of the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

HALF = (torch.bfloat16, torch.float16)
NO_DIRECTION = 1e-12  # a row without an entry above it becomes zero, with a gradient of zero


class Rounded:
    """Vectors [..., D] of length one in a half-precision dtype, zero where there is no direction.

    vectors: float32 [..., D], with a graph or without; a row that is not finite stays so, and its
    gradient is zero (it is padding, or the loss is not finite either). `read` gives the rounded
    ones for one reader: [..., D], differentiable once.
    """

    def __init__(self, vectors: Tensor, dtype: torch.dtype) -> None:
        self.vectors = vectors
        given = vectors.detach()
        # Divided by the largest entry first, so that no square overflows or vanishes.
        largest = torch.linalg.vector_norm(given, torch.inf, dim=-1, keepdim=True)
        length = largest * torch.linalg.vector_norm(given / largest, dim=-1, keepdim=True)
        self.length = torch.where(
            largest > NO_DIRECTION, length, torch.where(largest.isnan(), largest, torch.inf)
        )
        self.values = (given / self.length).to(dtype)

    def read(self) -> Tensor:
        result: Tensor = _Read.apply(self.vectors, self.length, self.values)
        return result


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, vectors: Tensor, length: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, length)
        return values.detach()  # the same memory for every reader

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        vectors, length = ctx.saved_tensors  # type: ignore[attr-defined]
        unit, gradient = vectors / length, gradient.to(vectors.dtype)
        found = (gradient - unit * torch.linalg.vecdot(unit, gradient)[..., None]) / length
        return torch.where(length.isnan(), 0.0, found), None, None
