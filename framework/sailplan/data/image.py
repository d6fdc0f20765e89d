"""Images: Pillow decodes, torch resizes; augmentation is drawn here and done where the pixels
are used.

An image stays uint8 from here to the device (a quarter of the memory, of the copies and of the
bytes that travel). A row's augmentation is a handful of numbers from the row's random source, which
travel beside its pixels (model.pixels).
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

# What Pillow knows by its first bytes; left out are formats that any bytes might be (TGA), and
# those that another program draws (EPS).
FORMATS = (
    "WEBP",
    "PNG",
    "JPEG",
    "GIF",
    "TIFF",
    "BMP",
    "AVIF",
    "JPEG2000",
    "PPM",
    "ICO",
    "ICNS",
    "DIB",
    "PCX",
    "PSD",
    "QOI",
    "SGI",
    "DDS",
)
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)  # of draw_augmentation


def squared(pixels: Tensor, size: int) -> Tensor:
    """uint8 [3, height, width] -> [3, size, size]: the whole picture squeezed to a square,
    antialiased bilinear.
    """
    return resized(pixels, size, size)


def in_ratio(pixels: Tensor, patch: int, most: int) -> Tensor:
    """The same, but nearly in the picture's own ratio: uint8 [3, rows * patch, columns * patch]
    of `patch_grid`.
    """
    rows, columns = patch_grid(pixels.size(1), pixels.size(2), patch, most)
    return resized(pixels, rows * patch, columns * patch)


def patch_grid(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """Rows and columns of patches for a picture of so many pixels: SigLIP2 naflex's rule.

    Both sides times the largest scale, up to 100, at which they are, rounded up to whole patches,
    at most `most` patches; the scale is looked for by bisection, to 1e-5.
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
        pixels = functional.interpolate(
            pixels[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False
        )[0]
    return pixels.contiguous()


def pixels_of(content: bytes) -> Tensor:
    """Return a picture as a viewer shows it, uint8 [3, height, width]; of an animation the first
    frame.

    Turned upright as its orientation tag says; transparent parts white; 16 bits a value scaled to
    8; other numbers (a depth map's) from their lowest to their highest. Raises ValueError with a
    reason for what cannot be shown.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as picture:
            picture.load()
            return rgb(picture)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"image cannot be decoded: {len(content)} bytes of no known picture format"
        ) from error
    except Exception as error:  # the decoders of rarer formats raise what they like
        raise ValueError(f"image cannot be decoded: {error or type(error).__name__}") from error


def rgb(picture: Image.Image) -> Tensor:
    """Return uint8 [3, height, width] of an open picture, as `pixels_of` does."""
    return torch.from_numpy(np.array(_as_rgb(_upright(picture)))).permute(2, 0, 1)


@lru_cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # a Pillow may be built with fewer


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a broken tag says nothing about the pixels
        return picture


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        picture = _eight_bits(picture)
    if picture.has_transparency_data:
        layered = picture.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 or 32 bits, or of floating numbers, as LA: 8 bits, and what its
    transparent value hides.
    """
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    low, high = float(values.min()), float(values.max())
    if picture.mode != "F" and low >= 0 and high <= 0xFFFF:
        grey = values / 257.0 if high > 0xFF or picture.mode != "I" else values
    elif picture.mode == "F" and low >= 0 and high <= 1:
        grey = values * 255.0
    elif picture.mode == "F" and low >= 0 and high <= 0xFF:
        grey = values
    else:
        grey = (values - low) * (255.0 / max(high - low, 1e-300))
    hidden = picture.info.get("transparency")
    seen = (
        np.full(values.shape, 255)
        if not isinstance(hidden, int)
        else np.where(values == hidden, 0, 255)
    )
    return Image.fromarray(np.stack([grey.round(), seen], axis=-1).astype(np.uint8), "LA")


def draw_augmentation(source: random.Random, strength: float) -> tuple[float, ...]:
    """The numbers of one row's augmentation at a strength 0..1: output-to-input affine map (6),
    contrast, colour shift (3).

    At strength 1: area 0.55 to 1.25 of the picture, shifts up to 15 %, flip with probability 0.5,
    rotation up to 15 degrees, aspect ratio up to 1.15, contrast +-0.3, brightness +-0.3 and +-0.15
    per colour (of the range 2).
    """
    u = [source.random() * 2 - 1 for _ in range(12)]
    zoom = math.exp(
        strength * (0.11 * u[0] + (0.0 if u[0] > 0 else 0.19 * u[0]))
    )  # side of the crop, 1 = the picture
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
    return (
        *affine,
        1.0 + 0.3 * strength * u[5],
        *(brightness + 0.15 * strength * u[place] for place in (7, 8, 9)),
    )


def augmentation_table(augmentations: Sequence[tuple[float, ...] | None]) -> Tensor | None:
    """float32 [b, 10]: the numbers of each row, of one without the ones that change nothing;
    None where no row has any.
    """
    if all(numbers is None for numbers in augmentations):
        return None
    return torch.tensor(
        [IDENTITY if numbers is None else numbers for numbers in augmentations], dtype=torch.float32
    )


def to_patches(rows: Sequence[Sequence[Tensor]], patch: int, most: int) -> tuple[Tensor, Tensor]:
    """Rows of pictures, each uint8 [3, rows * patch, columns * patch] of its own -> uint8 [b, f,
    most, patch * patch * 3] and
    the grids int64 [b, f, 2]; zeros where there is no patch or picture."""
    frames = max((len(row) for row in rows if row), default=1)
    patches = torch.zeros(len(rows), frames, most, 3 * patch**2, dtype=torch.uint8)
    sizes = torch.zeros(len(rows), frames, 2, dtype=torch.int64)
    for row, pictures in enumerate(rows):
        for frame, picture in enumerate(pictures):
            cut = picture.unflatten(2, (-1, patch)).unflatten(
                1, (-1, patch)
            )  # [3, rows, patch, columns, patch]
            sizes[row, frame] = torch.tensor([cut.size(1), cut.size(3)])
            patches[row, frame, : cut.size(1) * cut.size(3)] = (
                cut.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
            )
    return patches, sizes
