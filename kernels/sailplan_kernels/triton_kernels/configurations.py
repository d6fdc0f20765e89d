"""The one table of launch configurations: the engine launches what ahead-of-time compilation has accepted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

KINDS = ("plain", "moments", "columns", "sigmoid", "sigmoid moments")  # of a tile: rows alone, rows and columns, pairwise sigmoid
# few: one tag, no limits; all: TAGS tags and limits (unused ones never match); odd: all, with lengths that are not in whole STEPs.
MASKS = ("few", "all", "odd")
TAGS = 3  # at most, see infonce/masks.py
STEP = 16  # prefixes and dimensions in whole steps are loaded in wide words; others work, slower


@dataclass(frozen=True)
class Configuration:
    """Tile of BM rows and BN columns, BK dimensions a step, GROUP tiles of rows before the next column."""

    BM: int
    BN: int
    BK: int
    GROUP: int
    warps: int
    stages: int


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
    """``capability``: 80, 90, 100. Statistics and gradient of one tile share it: the same sums in the same order."""
    if dtype == torch.float32 and (kind, masks, capability) == ("sigmoid moments", "all", 90):
        return Configuration(64, 32, 32, 8, 4, 2)  # fewer columns and more registers a thread, else it spills
    if dtype == torch.float32:  # exact float32 products run outside the matrix units: registers limit the tile
        if kind == "columns":
            return Configuration(64, 32, 32, 8, 4 if masks == "few" else 8, 2)
        return Configuration(64, 64, 16 if kind == "sigmoid moments" and masks == "all" else 32, 8, 8, 2)
    if capability == 100:  # a thread reads one row of the accumulator, and twice the columns
        return Configuration(128, 64 if kind == "plain" and masks == "few" else 32, 32 if masks == "odd" else 64, 8, 8, 3)
    if masks == "odd" or (kind in ("columns", "sigmoid moments") and masks == "all"):  # vectors over columns fill the registers: wider tiles spill
        return Configuration(128, 32, 32 if capability == 80 and masks == "odd" else 64, 8, 8, 3)
    if kind == "plain" and masks == "few" and capability == 90:
        return Configuration(128, 128, 64, 8, 8, 3)
    return Configuration(128, 64, 64, 8, 8, 3)


INTERPRETER = Configuration(32, 32, 32, 2, 4, 1)
