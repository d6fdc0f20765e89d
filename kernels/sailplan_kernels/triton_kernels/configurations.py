"""The one table of launch configurations: the engine launches what ahead-of-time compilation has accepted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

KINDS = ("plain", "moments", "columns", "sigmoid", "sigmoid moments")  # of a tile: rows alone, rows and columns, pairwise sigmoid
# few: one tag, no limits; all: TAGS tags and limits (unused ones never match); odd: all, with lengths that are not in whole STEPs.
MASKS = ("few", "all", "odd")
TAGS = 3  # at most, see infonce/masks.py
STEP = 16  # prefixes and dimensions in whole steps are loaded in wide words; others work, slower
RESCALE_WARPS = 8
INTERPRETED = 0  # the capability of no device: Triton's interpreter
INTERPRETER_PROGRAMS = 3  # of a persistent launch there: fewer than tiles, so that programs do go from tile to tile


@dataclass(frozen=True)
class Configuration:
    """Tile of BM rows and BN columns, BK dimensions a step, GROUP tiles of rows before the next column."""

    BM: int
    BN: int
    BK: int
    GROUP: int
    warps: int  # as asked for; specialisation adds its own
    stages: int
    schedule: str = "tiles"  # one program a tile; "persistent", "persistent prefixes": programs that go from tile to tile, see there
    SPECIALISED: bool = False
    FLATTEN: bool = False
    DESCRIPTOR_STORE: bool = False


def switches(kind: str, masks: str) -> dict[str, int | bool]:
    """The compile-time switches that statistics and gradient share. The number of prefixes is none: their loop runs at run time."""
    return {
        "STEP": 1 if masks == "odd" else STEP,
        "TAGS": 1 if masks == "few" else TAGS,
        "LIMITS": masks != "few",
        "COLUMNS": kind == "columns",
        "SIGMOID": kind.startswith("sigmoid"),
    }


def configuration(dtype: torch.dtype, kind: str, masks: str, capability: int) -> Configuration:
    """Of one program a tile. ``capability``: 80, 90, 100. Statistics and gradient of one tile share it: the same sums in the same order."""
    if capability == INTERPRETED:
        return Configuration(32, 32, 32, 2, 4, 1)
    if dtype == torch.float32 and (kind, masks, capability) == ("sigmoid moments", "all", 90):
        return Configuration(64, 32, 32, 8, 4, 2)  # fewer columns and more registers a thread, else it spills
    if dtype == torch.float32:  # exact float32 products run outside the matrix units: registers limit the tile
        if kind == "columns":
            return Configuration(64, 32, 32, 8, 4 if masks == "few" else 8, 2)
        return Configuration(64, 64, 16 if kind == "sigmoid moments" and masks == "all" else 32, 8, 8, 2)
    if capability // 10 == 10:  # a thread reads one row of the accumulator, and twice the columns
        return Configuration(128, 64 if kind == "plain" and masks == "few" else 32, 32 if masks == "odd" else 64, 8, 8, 3)
    if masks == "odd" or (kind in ("columns", "sigmoid moments") and masks == "all"):  # vectors over columns fill the registers: wider tiles spill
        return Configuration(128, 32, 32 if capability == 80 and masks == "odd" else 64, 8, 8, 3)
    if kind == "plain" and masks == "few" and capability == 90:
        return Configuration(128, 128, 64, 8, 8, 3)
    return Configuration(128, 64, 64, 8, 8, 3)


def persistent_configuration(dtype: torch.dtype, kind: str, masks: str, capability: int) -> Configuration | None:
    """Of one prefix, in programs that go from tile to tile; None: there is no such kernel."""
    if dtype == torch.float32 or masks == "odd" or kind == "sigmoid moments":  # which one prefix never asks for
        return None
    if capability == INTERPRETED:
        return Configuration(32, 32, 32, 2, 4, 1, "persistent", DESCRIPTOR_STORE=masks == "all")
    if capability // 10 == 9:
        if kind in ("plain", "sigmoid"):
            BN = 256 if (kind, masks) == ("plain", "few") else 128
            return Configuration(128, BN, 64, 8, 4, 3, "persistent", SPECIALISED=True)
        BM, BN = (256, 64) if masks == "all" else (128, 128)
        return Configuration(BM, BN, 64, 8, 8, 3, "persistent", DESCRIPTOR_STORE=True)
    if capability // 10 == 10:
        BN = 256 if (kind, masks) == ("plain", "few") else 32 if masks == "all" and kind != "columns" else 64
        return Configuration(128, BN, 64, 8, 8, 3, "persistent", SPECIALISED=True, FLATTEN=True, DESCRIPTOR_STORE=True)
    return None


def persistent_prefixes_configuration(dtype: torch.dtype, kind: str, masks: str, capability: int) -> Configuration | None:
    """Of several prefixes, all but the longest in whole BKs; None: there is no such kernel."""
    if dtype == torch.float32 or masks == "odd" or kind in ("plain", "sigmoid"):  # several prefixes ask for moments
        return None
    if capability == INTERPRETED:
        return Configuration(32, 32, 32, 2, 4, 1, "persistent prefixes")
    if capability // 10 == 9:
        return Configuration(128, 128 if (kind, masks) == ("moments", "few") else 64, 64, 8, 8, 3, "persistent prefixes")
    if capability // 10 == 10:
        BM, BN = (128, 32) if kind == "columns" else (64, 64) if (kind, masks) == ("sigmoid moments", "all") else (128, 64)
        return Configuration(BM, BN, 64, 8, 8, 3, "persistent prefixes")
    return None


TABLES = {"tiles": configuration, "persistent": persistent_configuration, "persistent prefixes": persistent_prefixes_configuration}
