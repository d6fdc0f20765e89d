"""Pictures and video frames in, a few latent tokens out.

A frame becomes a grid of patch tokens, through strided convolutions (learns fast from scratch) or
one linear patch embedding (as in a ViT), plus a learned position; blocks then look at each frame
alone. The perceiver joins the tokens of all frames of an item with a few learned latents, lets all
attend to all, and keeps the latents only: the tower sees the same small number of visual tokens for
one frame or fifty.

Shape legend: n frames in all, b rows, f frames a row, p patches a frame, h hidden.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sailplan.config.schema import VisionConfig
from sailplan.model.attention import Sequences
from sailplan.model.blocks import Blocks, initial_deviation

POSITION_GRID = (
    16  # learned positions lie on a 16 x 16 grid and are interpolated to the image's own grid
)


def convolutional_stem(
    inputs: int, width: int, output: int, halvings: int, dimensions: int
) -> nn.Sequential:
    """Strided 3-wide convolutions, each halving every axis and doubling the width, with norm and
    ReLU between.

    The last one ends at `output` channels with a norm and no ReLU. Zero halvings: one convolution
    of stride 1.
    """
    convolution = nn.Conv2d if dimensions == 2 else nn.Conv1d
    layers: list[nn.Module] = []
    steps = max(halvings, 1)
    for step in range(steps):
        last = step == steps - 1
        channels = output if last else min(width * 2**step, output)
        layer = convolution(inputs, channels, 3, stride=2 if halvings else 1, padding=1, bias=False)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if last else "relu")
        layers += [layer, nn.GroupNorm(1, channels)]
        if not last:
            layers.append(nn.ReLU())
        inputs = channels
    return nn.Sequential(*layers)


class PatchStem(nn.Module):
    """One linear embedding of each square patch, then a norm."""

    def __init__(self, patch: int, output: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, output, patch, stride=patch, bias=False)
        nn.init.normal_(self.project.weight, std=1 / math.sqrt(3 * patch * patch))
        self.norm = nn.GroupNorm(1, output)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.project(images))


class VisionEncoder(nn.Module):
    """Frames [n, 3, height, width] to tokens [n, p, h], each frame alone."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = self.width = config.encoder.hidden
        self.patch = config.patch
        if config.stem == "convolutional":
            self.stem: nn.Module = convolutional_stem(
                3, config.stem_width, hidden, int(math.log2(config.patch)), 2
            )
        else:
            self.stem = PatchStem(config.patch, hidden)
        self.positions = nn.Parameter(torch.empty(hidden, POSITION_GRID, POSITION_GRID))
        nn.init.normal_(self.positions, std=0.1)
        self.to(dtype)
        self.blocks = Blocks(config.encoder, dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError where the image's sides are not multiples of the patch."""
        if images.size(-1) % self.patch or images.size(-2) % self.patch:
            raise ValueError(
                f"image of {tuple(images.shape[-2:])} pixels: both sides must be multiples of "
                f"model.vision.patch={self.patch}"
            )
        grid = self.stem(images.to(self.positions.dtype))
        positions = F.interpolate(
            self.positions[None], size=grid.shape[-2:], mode="bilinear", align_corners=False
        )
        return self.blocks((grid + positions).flatten(2).transpose(1, 2))


def frame_positions(frames: int, hidden: int, like: Tensor) -> Tensor:
    """Sine and cosine of the frame's number, [frames, hidden] (Vaswani et al., 2017): any number
    of frames.
    """
    rates = 10000 ** (-torch.arange(0, hidden, 2, device=like.device) / hidden)
    angles = torch.outer(torch.arange(frames, device=like.device), rates)
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :hidden].to(like.dtype)


class PackedRows(NamedTuple):
    """Which tokens each row of the perceiver reads, where rows lack some (`data.packing`)."""

    frame: Tensor  # int64: the number, within its row, of each picture or token that is handed over
    source: Tensor  # int64: the packed positions in cat(latents of all rows, tokens)
    latents: Tensor  # int64: the latents in the pack, row by row
    rows: Sequences


class Perceiver(nn.Module):
    """Learned latents that read the visual tokens of all frames of an item, in the tower's
    width.
    """

    def __init__(self, config: VisionConfig, width: int, output: int, dtype: torch.dtype) -> None:
        """width: of the visual tokens."""
        super().__init__()
        hidden = config.perceiver.hidden
        self.latents = nn.Parameter(torch.empty(config.latents, hidden))
        self.input = nn.Linear(width, hidden, bias=False)
        self.frame_gain = nn.Parameter(torch.full((hidden,), 0.1))
        self.output = nn.Linear(hidden, output, bias=False)
        nn.init.normal_(self.latents, std=0.1)
        nn.init.normal_(self.input.weight, std=1 / math.sqrt(width))
        nn.init.normal_(self.output.weight, std=initial_deviation(hidden))
        self.to(dtype)
        self.blocks = Blocks(config.perceiver, dtype)

    def forward(
        self, tokens: Tensor, rows: int, frames: int, packed: PackedRows | None = None
    ) -> Tensor:
        """tokens [n, p, h] of the n = rows * frames pictures, or with `packed` those of present
        ones, [n, p, h] or [k, h].

        Returns [rows, latents, tower hidden]; absent frames and patches have no influence.
        """
        visual = self.input(tokens)
        numbered = frame_positions(frames, self.latents.size(1), self.latents) * self.frame_gain
        latents = self.latents.expand(rows, -1, -1)
        if packed is None:
            visual = visual.unflatten(0, (rows, frames)) + numbered[:, None]
            hidden = self.blocks(torch.cat([latents, visual.flatten(1, 2)], 1))
            return self.output(hidden[:, : latents.size(1)])
        numbered = numbered.index_select(0, packed.frame)
        visual = visual + (numbered[:, None] if visual.dim() == 3 else numbered)
        joint = torch.cat([latents.flatten(0, 1), visual.flatten(0, -2)]).index_select(
            0, packed.source
        )
        hidden = self.blocks(joint, packed.rows)
        return self.output(hidden.index_select(0, packed.latents)).unflatten(0, (rows, -1))
