"""Refuse a wrong call in one line: the argument, what was found, what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sailplan_kernels.tiling import engines

BACKENDS = ("auto", "reference", "chunked", "triton")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def choose_backend(backend: str, queries: Tensor, score_dtype: torch.dtype | None = None) -> str:
    """The backend that will run."""
    return backend_for(backend, queries.device, queries.dtype, score_dtype)


def backend_for(backend: str, device: torch.device, dtype: torch.dtype, score_dtype: torch.dtype | None = None) -> str:
    """The backend that will run for embeddings of `dtype` on `device`, before there are any.

    "auto" takes triton for half precision on a device that it compiles for, where it can run, else chunked. Raises ValueError
    for one that cannot run, or dtypes that do not go together.
    """
    allowed = (None, torch.float64) if dtype is torch.float64 else (None, torch.float32, torch.float64)
    if score_dtype not in allowed:
        raise ValueError(f"score_dtype: found {score_dtype}, expected one of {', '.join(map(str, allowed))}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: found {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend not in ("auto", "triton"):
        return backend
    obstacle = engines.why_no_triton(device, dtype, score_dtype)
    if backend == "triton" and obstacle is not None:
        raise ValueError(f"backend: found 'triton', but {obstacle}, expected 'auto', 'chunked' or 'reference'")
    half = dtype in (torch.float16, torch.bfloat16)
    return "triton" if obstacle is None and (backend == "triton" or (half and device.type in engines.TRITON_DEVICES)) else "chunked"


def check_embeddings(queries: Tensor, keys: Tensor, hard: Tensor | None) -> None:
    """[N, D], [M, D] and [N, H, D] of one float dtype on one device."""
    for name, x, dimensions in (("queries", queries, 2), ("keys", keys, 2), ("hard_negatives", hard, 3)):
        if x is None:
            continue
        if x.dim() != dimensions or x.shape[-1] == 0:
            raise ValueError(f"{name}: found shape {tuple(x.shape)}, expected {dimensions} dimensions, the last not empty")
        if x.dtype not in FLOATS:
            raise ValueError(f"{name}: found {x.dtype}, expected a float dtype")
        if x.dtype != queries.dtype or x.device != queries.device:
            raise ValueError(f"{name}: found {x.dtype} on {x.device}, expected {queries.dtype} on {queries.device} as queries")
        if x.shape[-1] != queries.shape[-1]:
            raise ValueError(f"{name}: found {x.shape[-1]} dimensions, expected {queries.shape[-1]} as queries")
    if hard is not None and hard.shape[0] != queries.shape[0]:
        raise ValueError(f"hard_negatives: found {hard.shape[0]} rows, expected {queries.shape[0]}, one a query")


def check_pairing(
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    positives: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_query_ids: Tensor | None,
    query_valid: Tensor | None,
    key_valid: Tensor | None,
    positive_ids: Tensor | None = None,
) -> None:
    """All that says which key belongs to which query, and the temperature; embeddings are checked already."""
    n, m = len(queries), len(keys)
    for name, x, length, dtype in (
        ("positives", positives, n, torch.int64),
        ("positive_ids", positive_ids, n, torch.int64),
        ("query_ids", query_ids, n, torch.int64),
        ("key_ids", key_ids, m, torch.int64),
        ("key_query_ids", key_query_ids, m, torch.int64),
        ("query_valid", query_valid, n, torch.bool),
        ("key_valid", key_valid, m, torch.bool),
    ):
        check_vector(name, x, (length,), dtype, queries.device)
    if positive_ids is None:
        check_positives(positives, n, m)
    elif positives is not None:
        raise ValueError("positive_ids: found with positives, expected one of them")
    elif key_ids is None:
        raise ValueError("positive_ids: found without key_ids, expected both")
    elif query_ids is not None and key_query_ids is None:
        raise ValueError("positive_ids: found with query_ids and without key_query_ids, expected the latter too")
    check_temperature(temperature, n)
    if key_query_ids is not None and query_ids is None:
        raise ValueError("key_query_ids: found without query_ids, expected both")


def check_vector(name: str, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Ids and masks: exact shape and dtype, on the device or on the CPU."""
    if x is not None and (tuple(x.shape) != tuple(shape) or x.dtype != dtype or (x.device != device and x.device.type != "cpu")):
        raise ValueError(f"{name}: found {x.dtype} {tuple(x.shape)} on {x.device}, expected {dtype} {tuple(shape)} on {device} or the CPU")


def check_log_probability(x: Tensor | None, n_keys: int, device: torch.device) -> None:
    """One float a key, or none."""
    if x is not None and (tuple(x.shape) != (n_keys,) or x.dtype not in FLOATS or x.device != device):
        raise ValueError(f"key_log_probability: found {x.dtype} {tuple(x.shape)} on {x.device}, expected a float tensor ({n_keys},) on {device}")


def check_highest(x: float | Tensor | None, n: int, device: torch.device) -> None:
    """max_negative_score: none, a number, or one a row."""
    if isinstance(x, Tensor) and (tuple(x.shape) != (n,) or x.dtype not in FLOATS or x.device != device):
        raise ValueError(f"max_negative_score: found {x.dtype} {tuple(x.shape)} on {x.device}, expected a number or a float tensor ({n},) on {device}")


def check_positives(positives: Tensor | None, n: int, m: int) -> None:
    """Indices into this rank's keys, -1 for none; the diagonal needs a key for every query. A device's values are the caller's word."""
    if positives is None:
        if m < n:
            raise ValueError(f"keys: found {m} for {n} queries, expected at least as many, or positives given")
    elif n and m == 0:
        raise ValueError(f"keys: found none for {n} queries, expected at least one")
    elif n and positives.device.type == "cpu":
        low, high = (int(value) for value in positives.aminmax())
        if low < -1 or high >= m:
            raise ValueError(f"positives: found {low}..{high}, expected -1 (none) to {m - 1}")


def check_temperature(temperature: float | Tensor, n: int) -> None:
    """A positive number, or a 0-d or [N] float tensor (its values are the caller's word)."""
    if isinstance(temperature, Tensor):
        if temperature.dtype not in FLOATS or temperature.shape not in ((), (n,)):
            raise ValueError(
                f"temperature: found {temperature.dtype} {tuple(temperature.shape)}, expected a float tensor () or ({n},)"
            )
    elif not temperature > 0:
        raise ValueError(f"temperature: found {temperature}, expected a positive number")
