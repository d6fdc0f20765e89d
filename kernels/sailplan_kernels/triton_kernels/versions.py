"""Which schedules each version of Triton compiles, and in which tiles: what is chosen is chosen
by version.

A schedule stands here where `python -m sailplan_kernels.aot` rejects none of its configurations
with that version. A version that is newer than all of these is taken for the newest; what it does
refuse is gone around when it runs (tiling/fallback.py).

None compiles warps that are specialised over descriptors of the host in tiles of 128 rows on sm_90
from 3.7 on: the pass that halves such a tile among groups of warps does not halve the descriptor's
block (triton-lang/triton issue 11587, open in 2026-11; 3.6 did not look). So there is no such
kernel here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, wraps
from typing import TypeVar, cast

import torch

Version = tuple[int, int]
Chooser = TypeVar("Chooser", bound=Callable[[torch.dtype, str, str, int], object])

SCHEDULES: dict[Version, tuple[str, ...]] = {
    (3, 6): ("tiles", "persistent"),  # 3.6.0: torch 2.10 and 2.11
    (3, 7): (
        "tiles",
        "persistent",
    ),  # 3.7.1: torch 2.13, whose CUDA 12 and CUDA 13 builds bring the same
}
# What a version compiles in another tile than configurations.py says, else it spills: of (schedule,
# dtype, kind, masks, capability), the last in whole tens.
_HALF, _FULL = (torch.bfloat16, torch.float16), (torch.float32,)
_ROWS, _SIGMOID = (
    ("plain", "moments"),
    ("sigmoid", "sigmoid moments"),
)  # each two have their statistics kernel in common
_Change = tuple[str, tuple[torch.dtype, ...], tuple[str, ...], str, int, dict[str, int]]
_CHANGED: dict[Version, tuple[_Change, ...]] = {
    (3, 6): (
        ("tiles", _FULL, _ROWS, "ids", 80, {"BK": 16}),
        ("tiles", _FULL, _ROWS, "ids", 90, {"BK": 16}),
        ("tiles", _FULL, _ROWS, "ids", 100, {"warps": 4}),
        ("tiles", _FULL, _ROWS, "limits", 80, {"BK": 16}),
        ("tiles", _FULL, _ROWS, "odd", 80, {"warps": 4}),
        ("tiles", _FULL, _ROWS, "odd", 90, {"warps": 4}),
        ("tiles", _FULL, ("columns",), "ids", 80, {"BK": 16, "warps": 8}),
        ("tiles", _FULL, ("columns",), "ids", 100, {"BK": 16, "warps": 8}),
        ("tiles", _FULL, ("columns",), "limits", 100, {"warps": 8}),
        ("tiles", _FULL, _SIGMOID, "ids", 80, {"BK": 16, "warps": 4}),
        ("persistent", _HALF, _ROWS, "limits", 100, {"BN": 32}),
    ),
    (3, 7): (
        ("tiles", _FULL, _ROWS, "ids", 80, {"BN": 64, "BK": 16, "warps": 8}),
        ("tiles", _FULL, _SIGMOID, "ids", 80, {"BN": 64, "BK": 16, "warps": 8}),
        ("tiles", _FULL, ("columns",), "ids", 80, {"warps": 8}),
        ("tiles", _FULL, ("columns",), "limits", 80, {"warps": 8}),
        ("tiles", _FULL, _ROWS, "limits", 90, {"warps": 8}),
        ("tiles", _FULL, ("moments",), "limits", 100, {"warps": 8}),
        ("tiles", _FULL, ("columns",), "limits", 100, {"warps": 8}),
        ("tiles", _FULL, ("symmetric",), "ids", 100, {"warps": 8}),
        ("tiles", _HALF, _ROWS, "odd", 80, {"BM": 64, "warps": 4}),
        ("tiles", _HALF, _ROWS, "odd", 100, {"BM": 64, "warps": 4}),
        ("tiles", _HALF, _SIGMOID, "ids", 100, {"BN": 32}),
        ("persistent", _HALF, _ROWS, "ids", 100, {"BN": 32}),
        ("persistent", _HALF, _ROWS, "limits", 100, {"BN": 32}),
    ),
}
CHANGES: dict[Version, dict[tuple[str, torch.dtype, str, str, int], dict[str, int]]] = {
    version: {
        (schedule, dtype, kind, masks, capability): changes
        for schedule, dtypes, kinds, masks, capability, changes in rows
        for dtype in dtypes
        for kind in kinds
    }
    for version, rows in _CHANGED.items()
}


def version_of(text: str) -> Version:
    """(major, minor) of "3.7.1", or of a build between versions such as "3.7.0+git1b2c3d4"."""
    found = re.match(r"(\d+)\.(\d+)", text)
    if found is None:
        raise ValueError(f"triton: found version {text!r}, expected numbers such as 3.7.1")
    return int(found[1]), int(found[2])


@cache
def installed() -> Version:
    import triton

    return version_of(triton.__version__)


def schedules(version: Version) -> tuple[str, ...]:
    """What ``version`` compiles, () where it is older than all that was tried."""
    return SCHEDULES[known(version)] if version >= min(SCHEDULES) else ()


def known(version: Version) -> Version:
    """The version of the table that ``version`` is taken for."""
    return max((tried for tried in SCHEDULES if tried <= version), default=min(SCHEDULES))


def by_version(schedule: str) -> Callable[[Chooser], Chooser]:
    """Give a schedule's configurations the changes of the Triton that is installed."""

    def decorate(choose: Chooser) -> Chooser:
        @wraps(choose)
        def chosen(dtype: torch.dtype, kind: str, masks: str, capability: int) -> object:
            found = choose(dtype, kind, masks, capability)
            changes = CHANGES.get(known(installed()), {}).get(
                (schedule, dtype, kind, masks, capability // 10 * 10)
            )
            return replace(found, **changes) if found is not None and changes else found  # type: ignore[type-var]

        return cast(Chooser, chosen)

    return decorate


def why_not(version: Version) -> str | None:
    """What stands in the way of any kernel; None: nothing."""
    first = ".".join(map(str, min(SCHEDULES)))
    return (
        None
        if schedules(version)
        else f"triton {version[0]}.{version[1]} is older than {first}, the first that the kernels were compiled with"
    )
