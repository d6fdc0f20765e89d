"""Which engine goes through the tiles, or a clear word why it cannot."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from sailplan_kernels.tiling.fallback import FallbackEngine
from sailplan_kernels.tiling.tile import Engine
from sailplan_kernels.tiling.torch_engine import TorchEngine
from sailplan_kernels.triton_kernels import versions

_TRITON_ENGINE = "sailplan_kernels.tiling.triton_engine"
TRITON_DEVICES = (
    "cuda",
)  # types of device that Triton compiles for; on others its interpreter may run
_SCHEDULE: ContextVar[str | None] = ContextVar("schedule of the Triton engine", default=None)


@contextmanager
def triton_schedule(schedule: str) -> Iterator[None]:
    """Losses called inside go over their tiles as said, see TritonEngine: for measurements of
    one schedule beside the other.
    """
    token = _SCHEDULE.set(schedule)
    try:
        yield
    finally:
        _SCHEDULE.reset(token)


def make_engine(backend: str) -> Engine:
    """The engine of a checked backend, "chunked" or "triton".

    Kernels that do not compile here are gone around (fallback.py), unless
    a schedule was asked for: a measurement of it must be of it."""
    if backend == "chunked":
        return TorchEngine()
    triton_engine, schedule = importlib.import_module(_TRITON_ENGINE).TritonEngine, _SCHEDULE.get()
    if schedule is not None:
        return triton_engine(schedule)
    names = (
        ("auto", "tiles")
        if "persistent" in versions.schedules(versions.installed())
        else ("tiles",)
    )
    return FallbackEngine([*map(triton_engine, names), TorchEngine()])


def why_no_triton(
    device: torch.device, dtype: torch.dtype, score_dtype: torch.dtype | None = None
) -> str | None:
    """What stands in the way of "triton" for such tensors; None: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec(_TRITON_ENGINE) is None:
        return "this build has no Triton engine"
    if obstacle := versions.why_not(versions.installed()):
        return obstacle
    if dtype is torch.float64:
        return "the Triton engine computes in float32 and the inputs are float64"
    if score_dtype is torch.float64:
        return "the Triton engine computes scores in float32 and score_dtype is float64"
    if device.type not in TRITON_DEVICES and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the inputs are on {device.type} and Triton's interpreter is off"
    return None
