"""The one table of launch configurations: the engine launches what ahead-of-time compilation has
accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sailplan_kernels.triton_kernels.versions import by_version

# Of a tile: rows alone, without and with moments; rows and columns, each at temperatures of its
# own, or all at one ("symmetric": the recipe's loss); pairwise sigmoid.
KINDS = ("plain", "moments", "columns", "symmetric", "sigmoid", "sigmoid moments")
# ids: no limits; limits; odd: with limits, and lengths that are not in whole STEPs. Tags are looked
# at in all, as many as there are.
MASKS = ("ids", "limits", "odd")
STEP = 16  # prefixes and dimensions in whole steps are loaded in wide words; others work, slower
RESCALE_WARPS = 8
INTERPRETED = 0  # the capability of no device: Triton's interpreter
INTERPRETER_PROGRAMS = (
    3  # of a persistent launch there: fewer than tiles, so that programs do go from tile to tile
)


@dataclass(frozen=True)
class Configuration:
    """Tile of BM rows and BN columns, BK dimensions a step, GROUP tiles of rows before the next
    column.
    """

    BM: int
    BN: int
    BK: int
    GROUP: int
    warps: int
    stages: int
    schedule: str = "tiles"  # one program a tile; "persistent": programs that go from tile to tile


def switches(kind: str, masks: str) -> dict[str, int | bool]:
    """The compile-time switches that statistics and gradient share.

    The numbers of prefixes and tags are none: their loops run at run time.
    """
    return {
        "STEP": 1 if masks == "odd" else STEP,
        "LIMITS": masks != "ids",
        "COLUMNS": kind in ("columns", "symmetric"),
        "SHARED": kind == "symmetric",
        "SIGMOID": kind.startswith("sigmoid"),
    }


def asked_for(kind: str, masks: str) -> bool:
    """Whether the losses make such tiles: limits are InfoNCE's, and one temperature without
    limits has kernels of its own.
    """
    return masks == "ids" or (
        kind != "symmetric" and (masks == "odd" or not kind.startswith("sigmoid"))
    )


@by_version("tiles")
def configuration(dtype: torch.dtype, kind: str, masks: str, capability: int) -> Configuration:
    """Of one program a tile. ``capability``: 80, 90, 100.

    Statistics and gradient of one tile share it: the same sums in the same order.
    """
    if capability == INTERPRETED:
        return Configuration(32, 32, 32, 2, 4, 1)
    if (
        dtype == torch.float32
    ):  # exact float32 products run outside the matrix units: registers limit the tile
        narrow = (masks == "odd" and kind.startswith("sigmoid")) or (
            masks != "odd" and kind == "columns"
        )  # which 8 warps spill
        return Configuration(
            64, 32, 16 if (kind, masks) == ("columns", "limits") else 32, 8, 4 if narrow else 8, 2
        )
    if masks == "odd":  # addresses of single words fill the registers
        return Configuration(128, 32, 32, 8, 8, 3)
    return Configuration(128, 64, 64, 8, 8, 3)


@by_version("persistent")
def persistent_configuration(
    dtype: torch.dtype, kind: str, masks: str, capability: int
) -> Configuration | None:
    """Of programs that go from tile to tile; None: there is no such kernel."""
    if dtype == torch.float32 or masks == "odd":
        return None
    if capability == INTERPRETED:
        return Configuration(32, 32, 32, 2, 4, 1, "persistent")
    if capability // 10 == 9:
        return Configuration(
            128, 128 if kind in ("plain", "moments", "symmetric") else 64, 64, 8, 8, 3, "persistent"
        )
    if capability // 10 == 10 and not kind.startswith("sigmoid"):  # whose statistics spill
        if kind in (
            "plain",
            "moments",
        ):  # with 8 warps the assembler takes 128 registers and spills
            return Configuration(64, 64, 64, 8, 4, 3, "persistent")
        return Configuration(128, 64, 64, 8, 8, 3, "persistent")
    return None


TABLES = {
    "tiles": configuration,
    "persistent": persistent_configuration,
}  # as by the Triton that is installed
