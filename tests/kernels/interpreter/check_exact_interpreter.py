"""The interpreter as exact_interpreter.py repairs it: right for bfloat16, and equal bits
whatever the shape and the processor.

Not collected by name: test_triton.py runs this file in a process of its own, with that plugin.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    product = tl.dot(
        tl.load(a + m[:, None] * K + k[None, :]),
        tl.load(b + k[:, None] * N + n[None, :]),
        tl.load(c + m[:, None] * N + n[None, :]),
    )
    tl.store(c + m[:, None] * N + n[None, :], product)


@triton.jit
def sum_kernel(a, rows, columns, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(a + m[:, None] * N + n[None, :])
    tl.store(rows + m, tl.sum(x, 1))
    tl.store(columns + n, tl.sum(x, 0))


@triton.jit
def round_kernel(a, b, N: tl.constexpr):
    tl.store(b + tl.arange(0, N), tl.load(a + tl.arange(0, N)).to(tl.bfloat16))


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def product(a, b, c):
    found = c.clone()
    dot_kernel[(1,)](a.contiguous(), b.contiguous(), found, len(a), b.shape[1], len(b))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_added_up_exactly_and_rounded_once(dtype):
    """math.fsum rounds the true sum; float64 in order is so near that one rounding to float32
    hides the rest.
    """
    a, b, c = noise(16, 64).to(dtype), noise(64, 32).to(dtype), noise(16, 32)
    terms = a.double()[:, None, :] * b.double().T[None]
    right = torch.tensor(
        [
            [math.fsum([*terms[i, j].tolist(), c[i, j].item()]) for j in range(32)]
            for i in range(16)
        ],
        dtype=torch.float64,
    )
    assert torch.equal(product(a, b, c), right.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_does_not_depend_on_its_neighbours(dtype):
    """What a BLAS chooses by: the shape, and where in it an element stands."""
    a, b, c = noise(64, 64).to(dtype), noise(64, 128).to(dtype), noise(64, 128)
    whole = product(a, b, c)
    for rows, columns in ((16, 16), (16, 128), (64, 16), (32, 64)):
        for i, j in ((0, 0), (64 - rows, 128 - columns)):
            part = product(
                a[i : i + rows],
                b[:, j : j + columns],
                c[i : i + rows, j : j + columns].contiguous(),
            )
            assert torch.equal(part, whole[i : i + rows, j : j + columns]), (rows, columns, i, j)


def test_sums_are_in_order_and_rounded_once():
    a = noise(64, 128)
    a[:, 5], a[7] = 1e6, -1e6  # float32 partial sums would lose the small ones
    rows, columns = torch.empty(64), torch.empty(128)
    sum_kernel[(1,)](a, rows, columns, 64, 128)
    for found, terms in ((rows, a), (columns, a.T)):
        assert torch.equal(
            found, torch.tensor([math.fsum(x.tolist()) for x in terms], dtype=torch.float64).float()
        )


def test_interpreter_rounds_to_nearest_even_and_keeps_nan():
    a = noise(4096)
    a[:5] = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, torch.nan, torch.inf, -torch.inf]
    )  # two ties, and what is no number
    b = torch.empty(4096, dtype=torch.bfloat16)
    round_kernel[(1,)](a, b, 4096)
    torch.testing.assert_close(b, a.bfloat16(), rtol=0, atol=0, equal_nan=True)
