"""Pixels as the loader sends them, uint8 with a few numbers a row, to what the image towers
read: float32 in [-1, 1].

Crop, zoom, flip and rotation of a row's augmentation (data.image.draw_augmentation) are one affine
map sampled once, with white outside the picture, followed by contrast, brightness and colour. The
map is written out element by element, so a row's pixels do not depend on which rows share its
micro-batch. All of it runs where the pixels are: they travel as bytes.

Shape legend: b rows, f frames, p patches a picture, s side of a patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

ROWS_AT_ONCE = 16  # on a CPU: small enough for its cache, three times faster than all at once


@torch.no_grad()
def normalise(
    images: Tensor, augmentation: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """Return pixels in [-1, 1], float32, in the shape of `images`, augmented where there is a
    table.

    images: uint8 [b, f, 3, height, width], or with `sizes` (int64 [b, f, 2], patches down and
    across) pictures as patches [b, f, p, 3 s^2], each patch its rows, columns and colours. Images
    of a floating dtype are taken as they are, and are returned. augmentation: float32 [b, 10], all
    frames of a row alike; None: none.
    """
    if images.is_floating_point():
        return images
    pixels = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    at_once = ROWS_AT_ONCE if images.device.type == "cpu" else max(1, len(images))
    for start in range(0, len(images), at_once):
        part = slice(start, start + at_once)
        plain = images[part].to(torch.float32).div_(127.5).sub_(1.0)
        if augmentation is not None:
            table = augmentation[part].to(torch.float32)
            plain = (
                _augment(plain, table)
                if sizes is None
                else _augment_patches(plain, table, sizes[part])
            )
        pixels[part] = plain
    return pixels


def _augment(pixels: Tensor, numbers: Tensor) -> Tensor:
    """float32 [b, f, 3, height, width] warped and recoloured; numbers float32 [b, 10]."""
    rows, frames, _, height, width = pixels.shape
    numbers = numbers.repeat_interleave(frames, dim=0, output_size=rows * frames)[:, :, None, None]
    vertical = ((torch.arange(height, device=pixels.device) * 2 + 1) / height - 1)[:, None]
    horizontal = ((torch.arange(width, device=pixels.device) * 2 + 1) / width - 1)[None, :]
    a, b, c, d, e, f = (numbers[:, place] for place in range(6))
    grid = torch.stack(
        [a * horizontal + b * vertical + c, d * horizontal + e * vertical + f], dim=-1
    )
    # shifted so that white is 0, which is what sampling outside the picture gives
    warped = functional.grid_sample(
        pixels.flatten(0, 1) - 1.0, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    ).add_(1.0)
    return (
        warped.mul_(numbers[:, 6:7])
        .add_(numbers[:, 7:10])
        .clamp_(-1.0, 1.0)
        .view(rows, frames, 3, height, width)
    )


def _augment_patches(pixels: Tensor, numbers: Tensor, sizes: Tensor) -> Tensor:
    """The same of pictures as patches float32 [b, f, p, 3 s^2], each in its own grid; patches
    that are filled up get any finite number.
    """
    rows, frames, patches, elements = pixels.shape
    side = math.isqrt(elements // 3)
    down, across = (
        length[..., None, None, None] for length in sizes.clamp(min=1).unbind(-1)
    )  # [b, f, 1, 1, 1]
    height, width = down * side, across * side
    place = torch.arange(patches, device=pixels.device)[:, None, None]
    inside = torch.arange(side, device=pixels.device)
    vertical = ((place // across * side + inside[:, None]) * 2 + 1) / height - 1  # [b, f, p, s, 1]
    horizontal = ((place % across * side + inside) * 2 + 1) / width - 1  # [b, f, p, 1, s]
    a, b, c, d, e, f = (numbers[:, place, None, None, None, None] for place in range(6))
    column = (
        (a * horizontal + b * vertical + c + 1) * width - 1
    ) / 2  # of the sampled point, in pixels
    line = ((d * horizontal + e * vertical + f + 1) * height - 1) / 2
    white = pixels.reshape(rows, frames, -1, 3) - 1.0
    warped = torch.ones_like(white)
    for top in (line.floor(), line.floor() + 1):
        for left in (column.floor(), column.floor() + 1):
            weight = (1 - (line - top).abs()) * (1 - (column - left).abs())
            weight = weight * ((top >= 0) & (top < height) & (left >= 0) & (left < width))
            at, beside = (
                x.clamp(min=0).minimum(most - 1).long()
                for x, most in ((top, height), (left, width))
            )
            index = (
                (at // side * across + beside // side) * side + at % side
            ) * side + beside % side
            neighbours = white.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, 3))
            warped += weight.flatten(2)[..., None] * neighbours
    numbers = numbers[:, None, None]
    return (
        warped.mul_(numbers[..., 6:7])
        .add_(numbers[..., 7:10])
        .clamp_(-1.0, 1.0)
        .reshape(pixels.shape)
    )
