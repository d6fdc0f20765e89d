"""Pictures that keep their sides' ratio: the grids, resizing and patches of SigLIP2's published
front end.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)

from sailplan.config.schema import DataConfig, DatasetConfig, ViewConfig
from sailplan.data import image
from sailplan.data.packing import OmniInputs
from sailplan.data.record import Item
from sailplan.data.views import ViewDecoder
from sailplan.model.pixels import normalise

SIDES = (
    (480, 640),
    (640, 480),
    (1, 1),
    (16, 16),
    (37, 2000),
    (2000, 3),
    (33, 47),
    (1024, 1024),
    (225, 224),
    (100, 1700),
    (5, 9),
)


@pytest.mark.parametrize(("patch", "most"), [(16, 256), (16, 64), (14, 100), (4, 7)])
def test_sides_are_those_of_transformers(patch: int, most: int) -> None:
    for height, width in SIDES:
        rows, columns = image.patch_grid(height, width, patch, most)
        assert (rows * patch, columns * patch) == get_image_size_for_max_num_patches(
            height, width, patch, most
        )
        assert 0 < rows * columns <= most


def pictures() -> list[Image.Image]:
    """Smooth colours with sharp edges, of sides that grow and shrink."""
    found = []
    for height, width in ((48, 64), (61, 20), (9, 7), (30, 300)):
        down, across = np.mgrid[0:height, 0:width]
        colours = [
            128 + 127 * np.sin(down / 5),
            255 * across / width,
            200.0 * ((down // 8 + across // 8) % 2),
        ]
        found.append(Image.fromarray(np.stack(colours, -1).astype(np.uint8)))
    return found


def encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def front_end(shards: Path, **options: Any) -> tuple[OmniInputs, ViewDecoder, ViewConfig]:
    decoder = ViewDecoder(
        DataConfig(
            tokenizer=str(shards / "tokenizer.json"),
            image_patches=64,
            image_patch=8,
            frames=2,
            **options,
        )
    )
    view = ViewConfig(modalities=["vision"])
    one, two, three, four = (encoded(picture) for picture in pictures())
    items = [
        Item(id="a", images=(one, two)),
        Item(id="b", images=(three,)),
        Item(id="c"),
        Item(id="d", images=(four,)),
    ]
    rows = [decoder.row(item, view, DatasetConfig()) for item in items]
    return decoder.batch(rows, decoder.tokens(rows, view), view), decoder, view


def test_the_front_end_is_that_of_transformers(shards: Path) -> None:
    inputs, _, _ = front_end(shards)
    wanted = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=64)(
        pictures(), return_tensors="pt"
    )
    assert (
        inputs.images is not None
        and inputs.image_sizes is not None
        and inputs.image_mask is not None
    )
    assert inputs.image_mask.tolist() == [
        [True, True],
        [True, False],
        [False, False],
        [True, False],
    ]
    assert torch.equal(
        inputs.image_sizes[inputs.image_mask], torch.as_tensor(wanted["spatial_shapes"])
    )
    found = inputs.images[inputs.image_mask]
    own = torch.arange(64) < inputs.image_sizes[inputs.image_mask].prod(1, keepdim=True)
    assert torch.equal(own.int(), wanted["pixel_attention_mask"].int())
    # Two resizers of whole numbers, 255 for the range of 2, round differently.
    assert found.dtype == torch.uint8
    assert (normalise(found) - wanted["pixel_values"])[own].abs().max() <= 2.01 / 127.5
    assert (
        not found[~own].any()
        and not inputs.images[~inputs.image_mask].any()
        and normalise(found)[own].std() > 0.4
    )


def test_augmentation_is_the_rows_own(shards: Path) -> None:
    plain, decoder, view = front_end(shards)
    picture = encoded(pictures()[3])
    rows = [
        decoder.row(
            Item(id="d", images=(picture,)), view, DatasetConfig(image_augmentation=0.8), seed=seed
        )
        for seed in (1, 1, 2)
    ]
    changed = decoder.batch(rows, decoder.tokens(rows, view), view)
    pixels = normalise(changed.images, changed.image_augmentation, changed.image_sizes)
    assert (
        torch.equal(pixels[0], pixels[1])
        and not torch.equal(pixels[0], pixels[2])
        and pixels.abs().max() <= 1
    )
    assert torch.equal(changed.image_sizes[:, 0], plain.image_sizes[3, :1].expand(3, -1))
