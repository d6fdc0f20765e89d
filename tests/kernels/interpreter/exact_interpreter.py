"""Triton's interpreter made right for bfloat16, and the same on every processor: a pytest
plugin, so that it comes before any kernel, in a process of its own.

Versions 3.6 to 3.9 multiply the raw 16-bit patterns of bfloat16 in tl.dot, and cut float32 off
instead of rounding it.
They leave the order of a product's and of a sum's terms to numpy and its BLAS, which choose it by
processor and by shape.
Here both are added up in float64, one term after the other, and rounded once: products of half
types and of float32 are exact in float64, so an element depends on its own row and column alone.
Importing this turns the interpreter on (TRITON_INTERPRET must be set before a kernel is defined)
and repairs all of it.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import threadpoolctl
import triton
import triton.language as tl
from triton.runtime import interpreter

_sum = interpreter.ReduceOps.sum
_cast = interpreter.InterpreterBuilder.cast_impl


def _exact(x):
    """In float64, which holds every value of the types that kernels multiply."""
    bits = x.data.astype(np.uint32) << 16 if x.dtype.scalar == tl.bfloat16 else None
    return (x.data if bits is None else bits.view(np.float32)).astype(np.float64)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    a, b, total = _exact(a), _exact(b), d.data.astype(np.float64)
    for k in range(a.shape[-1]):
        total += a[..., :, k, None] * b[..., k, None, :]
    return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)


def _ordered_sum(self, input):
    data = input.handle.data
    if self.axis is None or not np.issubdtype(data.dtype, np.floating):
        return _sum(self, input)
    # In order by definition, where np.sum goes by pairs.
    total = np.add.accumulate(data, axis=self.axis, dtype=np.float64).take(-1, axis=self.axis)
    return self.to_tensor(
        np.expand_dims(total, self.axis) if self.keep_dims else total, input.dtype
    )


def _cast_impl(self, src, dst_type):
    if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
        return _cast(self, src, dst_type)
    bits = np.ascontiguousarray(src.data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(
        np.uint16
    )  # to nearest, ties to even
    return interpreter.TensorHandle(
        np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded), tl.bfloat16
    )


interpreter.ReduceOps.sum = _ordered_sum
interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter.InterpreterBuilder.cast_impl = _cast_impl


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"triton {triton.__version__}")
    for library in threadpoolctl.threadpool_info():
        terminalreporter.write_line(f"{library['internal_api']} for {library.get('architecture')}")
