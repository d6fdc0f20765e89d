"""Images: Pillow decodes, torch resizes; augmentation is drawn here and done where the pixels are used.

An image stays uint8 from here to the device (a quarter of the memory, of the copies and of the bytes that travel). A row's
augmentation is a handful of numbers from the row's random source, which travel beside its pixels (model.pixels).
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

FORMATS = ("WEBP", "PNG", "JPEG")
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)  # of draw_augmentation


def decode(content: bytes, size: int) -> Tensor:
    """Encoded bytes (JPEG, PNG, WebP) -> uint8 [3, size, size]; transparent parts become white.

    The whole picture is squeezed to a square, antialiased bilinear. Raises ValueError with a reason for broken bytes.
    """
    return resized(pixels_of(content), size, size)


def decode_in_ratio(content: bytes, patch: int, most: int) -> Tensor:
    """The same, but nearly in the picture's own ratio: uint8 [3, rows * patch, columns * patch] of `patch_grid`."""
    pixels = pixels_of(content)
    rows, columns = patch_grid(pixels.size(1), pixels.size(2), patch, most)
    return resized(pixels, rows * patch, columns * patch)


def patch_grid(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """Rows and columns of patches for a picture of so many pixels: SigLIP2 naflex's rule.

    Both sides times the largest scale, up to 100, at which they are, rounded up to whole patches, at most `most` patches; the scale
    is looked for by bisection, to 1e-5.
    """

    def at(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / patch)), max(1, math.ceil(width * scale / patch))

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(at(middle)) <= most else (low, middle)
    return at(low)


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return uint8 [3, height, width], antialiased bilinear."""
    if pixels.shape[1:] != (height, width):
        pixels = functional.interpolate(pixels[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    return pixels.contiguous()


def pixels_of(content: bytes) -> Tensor:
    """uint8 [3, height, width]."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            picture.load()
            return rgb(picture)
    except UnidentifiedImageError as error:
        raise ValueError(f"image cannot be decoded: {len(content)} bytes that are no {', '.join(FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image cannot be decoded: {error}") from error


def rgb(picture: Image.Image) -> Tensor:
    """Return uint8 [3, height, width] of a picture; transparent parts become white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        picture = Image.alpha_composite(white, layered)
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def draw_augmentation(source: random.Random, strength: float) -> tuple[float, ...]:
    """The numbers of one row's augmentation at a strength 0..1: output-to-input affine map (6), contrast, colour shift (3).

    At strength 1: area 0.55 to 1.25 of the picture, shifts up to 15 %, flip with probability 0.5, rotation up to 15
    degrees, aspect ratio up to 1.15, contrast +-0.3, brightness +-0.3 and +-0.15 per colour (of the range 2).
    """
    u = [source.random() * 2 - 1 for _ in range(12)]
    zoom = math.exp(strength * (0.11 * u[0] + (0.0 if u[0] > 0 else 0.19 * u[0])))  # side of the crop, 1 = the picture
    aspect = math.exp(0.07 * strength * u[1])
    angle = math.radians(15.0) * strength * u[2]
    flip = -1.0 if source.random() < 0.5 * strength else 1.0
    cosine, sine = math.cos(angle), math.sin(angle)
    affine = (
        flip * zoom * aspect * cosine,
        -zoom * sine,
        0.3 * strength * u[3],
        flip * zoom * sine,
        zoom / aspect * cosine,
        0.3 * strength * u[4],
    )
    brightness = 0.3 * strength * u[6]
    return (*affine, 1.0 + 0.3 * strength * u[5], *(brightness + 0.15 * strength * u[place] for place in (7, 8, 9)))


def augmentation_table(augmentations: Sequence[tuple[float, ...] | None]) -> Tensor | None:
    """float32 [b, 10]: the numbers of each row, of one without the ones that change nothing; None where no row has any."""
    if all(numbers is None for numbers in augmentations):
        return None
    return torch.tensor([IDENTITY if numbers is None else numbers for numbers in augmentations], dtype=torch.float32)


def to_patches(rows: Sequence[Sequence[Tensor]], patch: int, most: int) -> tuple[Tensor, Tensor]:
    """Rows of pictures, each uint8 [3, rows * patch, columns * patch] of its own -> uint8 [b, f, most, patch * patch * 3] and
    the grids int64 [b, f, 2]; zeros where there is no patch or picture."""
    frames = max((len(row) for row in rows if row), default=1)
    patches = torch.zeros(len(rows), frames, most, 3 * patch**2, dtype=torch.uint8)
    sizes = torch.zeros(len(rows), frames, 2, dtype=torch.int64)
    for row, pictures in enumerate(rows):
        for frame, picture in enumerate(pictures):
            cut = picture.unflatten(2, (-1, patch)).unflatten(1, (-1, patch))  # [3, rows, patch, columns, patch]
            sizes[row, frame] = torch.tensor([cut.size(1), cut.size(3)])
            patches[row, frame, : cut.size(1) * cut.size(3)] = cut.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
    return patches, sizes
