"""Refuse a wrong call in one line: the argument, what was found, what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sailplan_kernels.arguments import Masks, Negatives, PositiveIds
from sailplan_kernels.tiling import engines

BACKENDS = ("auto", "reference", "chunked", "triton")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def choose_backend(backend: str, queries: Tensor, score_dtype: torch.dtype | None = None) -> str:
    """The backend that will run."""
    return backend_for(backend, queries.device, queries.dtype, score_dtype)


def backend_for(
    backend: str, device: torch.device, dtype: torch.dtype, score_dtype: torch.dtype | None = None
) -> str:
    """The backend that will run for embeddings of `dtype` on `device`, before there are any.

    "auto" takes triton for half precision on a device that it compiles for, where it can run, else
    chunked. Raises ValueError for one that cannot run, or dtypes that do not go together.
    """
    allowed = (
        (None, torch.float64) if dtype is torch.float64 else (None, torch.float32, torch.float64)
    )
    if score_dtype not in allowed:
        raise ValueError(
            f"options.score_dtype: found {score_dtype}, expected one of "
            f"{', '.join(map(str, allowed))}"
        )
    if backend not in BACKENDS:
        raise ValueError(
            f"options.backend: found {backend!r}, expected one of {', '.join(BACKENDS)}"
        )
    if backend not in ("auto", "triton"):
        return backend
    obstacle = engines.why_no_triton(device, dtype, score_dtype)
    if backend == "triton" and obstacle is not None:
        raise ValueError(
            f"options.backend: found 'triton', but {obstacle}, expected 'auto', 'chunked' or "
            "'reference'"
        )
    half = dtype in (torch.float16, torch.bfloat16)
    return (
        "triton"
        if obstacle is None
        and (backend == "triton" or (half and device.type in engines.TRITON_DEVICES))
        else "chunked"
    )


def check_embeddings(queries: Tensor, keys: Tensor, hard: Tensor | None) -> None:
    """[N, D], [M, D] and [N, H, D] of one float dtype on one device."""
    for name, x, dimensions in (
        ("queries", queries, 2),
        ("keys", keys, 2),
        ("negatives.hard", hard, 3),
    ):
        if x is None:
            continue
        if x.dim() != dimensions or x.shape[-1] == 0:
            raise ValueError(
                f"{name}: found shape {tuple(x.shape)}, expected {dimensions} dimensions, the last "
                "not empty"
            )
        if x.dtype not in FLOATS:
            raise ValueError(f"{name}: found {x.dtype}, expected a float dtype")
        if x.dtype != queries.dtype or x.device != queries.device:
            raise ValueError(
                f"{name}: found {x.dtype} on {x.device}, expected {queries.dtype} on "
                f"{queries.device} as queries"
            )
        if x.shape[-1] != queries.shape[-1]:
            raise ValueError(
                f"{name}: found {x.shape[-1]} dimensions, expected {queries.shape[-1]} as queries"
            )
    if hard is not None and hard.shape[0] != queries.shape[0]:
        raise ValueError(
            f"negatives.hard: found {hard.shape[0]} rows, expected {queries.shape[0]}, one a query"
        )


def check_pairing(
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    positives: Tensor | PositiveIds | None,
    masks: Masks,
) -> None:
    """All that says which key belongs to which query, and the temperature; embeddings are
    checked already.
    """
    n, m, device = len(queries), len(keys), queries.device
    by_id = positives.ids if isinstance(positives, PositiveIds) else None
    index = None if isinstance(positives, PositiveIds) else positives
    check_vector("positives", index, (n,), torch.int64, device)
    check_vector("positives.ids", by_id, (n,), torch.int64, device)
    check_vector("masks.query_ids", masks.query_ids, (n,), torch.int64, device)
    check_vector("masks.key_ids", masks.key_ids, (m,), torch.int64, device)
    check_vector("masks.key_query_ids", masks.key_query_ids, (m,), torch.int64, device)
    check_vector("masks.query_valid", masks.query_valid, (n,), torch.bool, device)
    check_vector("masks.key_valid", masks.key_valid, (m,), torch.bool, device)
    if by_id is None:
        check_positives(index, n, m)
    elif masks.key_ids is None:
        raise ValueError("positives.ids: found without masks.key_ids, expected both")
    elif masks.query_ids is not None and masks.key_query_ids is None:
        raise ValueError(
            "positives.ids: found with masks.query_ids and without masks.key_query_ids, expected "
            "the latter too"
        )
    check_temperature(temperature, n)
    if masks.key_query_ids is not None and masks.query_ids is None:
        raise ValueError("masks.key_query_ids: found without masks.query_ids, expected both")


def check_negatives(negatives: Negatives, n: int, device: torch.device) -> None:
    """Hard negatives with their validity, and the highest cosine where it is one a row; shapes of ``hard`` are checked already."""
    if negatives.hard is not None:
        check_vector(
            "negatives.hard_valid",
            negatives.hard_valid,
            negatives.hard.shape[:2],
            torch.bool,
            device,
        )
    elif negatives.hard_valid is not None:
        raise ValueError("negatives.hard_valid: found without negatives.hard, expected both")
    elif negatives.shared:
        raise ValueError("negatives.shared: found True without negatives.hard, expected both")
    x = negatives.max_cosine
    if isinstance(x, Tensor) and (
        tuple(x.shape) != (n,) or x.dtype not in FLOATS or x.device != device
    ):
        raise ValueError(
            f"negatives.max_cosine: found {x.dtype} {tuple(x.shape)} on {x.device}, expected a "
            f"number or a float tensor ({n},) on {device}"
        )


def check_vector(
    name: str, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Ids and masks: exact shape and dtype, on the device or on the CPU."""
    if x is not None and (
        tuple(x.shape) != tuple(shape)
        or x.dtype != dtype
        or (x.device != device and x.device.type != "cpu")
    ):
        raise ValueError(
            f"{name}: found {x.dtype} {tuple(x.shape)} on {x.device}, expected {dtype} "
            f"{tuple(shape)} on {device} or the CPU"
        )


def check_log_probability(x: Tensor | None, n_keys: int, device: torch.device) -> None:
    """One float a key, or none."""
    if x is not None and (
        tuple(x.shape) != (n_keys,) or x.dtype not in FLOATS or x.device != device
    ):
        raise ValueError(
            f"key_log_probability: found {x.dtype} {tuple(x.shape)} on {x.device}, expected a "
            f"float tensor ({n_keys},) on {device}"
        )


def check_positives(positives: Tensor | None, n: int, m: int) -> None:
    """Indices into this rank's keys, -1 for none; the diagonal needs a key for every query.

    A device's values are the caller's word.
    """
    if positives is None:
        if m < n:
            raise ValueError(
                f"keys: found {m} for {n} queries, expected at least as many, or positives given"
            )
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
                f"temperature: found {temperature.dtype} {tuple(temperature.shape)}, expected a "
                f"float tensor () or ({n},)"
            )
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature: found {temperature}, expected a positive number")
