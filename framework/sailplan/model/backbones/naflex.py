"""SigLIP2's image tower in its files for images of any size (model_type siglip2, "naflex"; arXiv
2502.14786).

A picture keeps its sides' ratio: it comes as the patches of its own grid, row by row, filled up to
the same number for all (`data.image_patches`). The square grid of learned positions is resized to
each picture's grid, antialiased bilinear; what was filled up is left out. Blocks, norms and names
are SigLIP's, without the attention-pooling head.

Shape legend: n pictures in all, p patches a picture, filled up ones included, g side of the square
grid of positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sailplan.config.schema import ModelConfig, VisionConfig
from sailplan.model.attention import Sequences
from sailplan.model.backbones import siglip
from sailplan.model.backbones.weight_map import WeightMap
from sailplan.model.blocks import Blocks, initial_deviation

MODEL_TYPES = ("siglip2", "siglip2_vision_model")


def resize_weights(place: Tensor, length: Tensor, grid: int) -> Tensor:
    """How much each of `grid` points counts at place 0, 1, ...

    of a line of them resized to `length`: [...] to float32 [..., grid].

    Antialiased bilinear, without aligned corners: triangles around (place + 1/2) grid / length, as
    wide as the step where it is more than one point, normalised to a sum of one (torch's
    interpolate with antialias=True).
    """
    step = grid / length.float()[..., None]
    distance = torch.arange(grid, device=place.device) + 0.5 - (place[..., None] + 0.5) * step
    weights = (1 - distance.abs() / step.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


class NaflexVisionEncoder(nn.Module):
    """Patches [n, p, 3 * patch * patch] in [-1, 1] of grids sizes int64 [n, 2] to tokens of
    those that are no filling, each picture alone.
    """

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = self.width = config.encoder.hidden
        self.grid = config.position_grid
        self.embedding = nn.Linear(3 * config.patch**2, hidden)
        self.positions = nn.Parameter(torch.empty(config.position_grid**2, hidden))
        nn.init.normal_(self.positions, std=initial_deviation(hidden))
        self.to(dtype)
        self.blocks = Blocks(config.encoder, dtype)

    def forward(self, patches: Tensor, sizes: Tensor, own: Tensor, rows: Sequences) -> Tensor:
        """own: int64 [k], which of the n * p patches are a picture's own, in the order of
        `rows`. Returns [k, h].
        """
        tokens = self.embedding(patches.flatten(0, 1).index_select(0, own).to(self.positions.dtype))
        return self.blocks(
            tokens
            + self.positions_of(
                own % patches.size(1), sizes.index_select(0, own // patches.size(1))
            ),
            rows,
        )

    def positions_of(self, place: Tensor, sizes: Tensor) -> Tensor:
        """place int64 [k] of patches in grids of sizes int64 [k, 2]: the learned positions
        there, [k, h].
        """
        down, across = sizes.clamp(min=1).unbind(-1)
        rows, columns = (
            resize_weights(at, length, self.grid)
            for at, length in ((place // across, down), (place % across, across))
        )
        return (rows[:, :, None] * columns[:, None, :]).flatten(1).to(
            self.positions.dtype
        ) @ self.positions


def weight_map(config: ModelConfig) -> WeightMap:
    return siglip.weight_map(config)


def unsupported(found: dict[str, Any]) -> str | None:
    return None


def expected(config: ModelConfig, found: dict[str, Any]) -> dict[str, tuple[str, object, object]]:
    """config.json's key -> (our key, our value, the value there); a key that is not there has
    SigLIP2 base's value.
    """
    vision = config.vision
    same = siglip.expected(config, found)
    del same["image_size / patch_size"]
    number = found.get("vision_config", found).get("num_patches", 256)
    return same | {
        "num_patches": ("model.vision.position_grid squared", vision.position_grid**2, number)
    }
