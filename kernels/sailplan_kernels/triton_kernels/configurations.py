"""The one table of launch configurations: the engine launches what ahead-of-time compilation has accepted."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Configuration:
    """Tile of BM rows and BN columns, BK dimensions a step, GROUP tiles of rows before the next column."""

    BM: int
    BN: int
    BK: int
    GROUP: int
    warps: int
    stages: int


def configuration(dtype: torch.dtype, columns: bool, prefixes: int, capability: int) -> Configuration:
    """``capability``: 80, 90, 100. Statistics and gradient of one tile share it: the same sums in the same order."""
    if dtype == torch.float32:  # exact float32 products run outside the matrix units: registers limit the tile
        return Configuration(64, 64, 32, 8, 8, 2)
    if columns or prefixes > 1:  # the sums stay in registers beside what is made of them: wider tiles spill
        return Configuration(128, 64, 64, 8, 8, 3)
    return Configuration(128, 128, 64, 8, 8, 3)


INTERPRETER = Configuration(32, 32, 32, 2, 4, 1)
