"""Risks: pixels that depend on who shares the micro-batch, a row without an augmentation that
gets one, patches that are
augmented otherwise than squares, and an encoder that reads bytes otherwise than numbers."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from sailplan.data import image
from sailplan.data.testing import png
from sailplan.model.pixels import normalise
from sailplan.model.testing import PUBLISHED, join_layout, published_config, published_inputs
from sailplan.model.tower import OmniEncoder
from sailplan_kernels.testing import run_ranks


def test_rows_are_augmented_alike_whatever_shares_their_micro_batch() -> None:
    pictures = torch.stack(
        [image.squared(image.pixels_of(png(number, 32)), 32) for number in range(40)]
    )[:, None]
    table = image.augmentation_table(
        [
            image.draw_augmentation(random.Random(seed), 0.8) if seed % 3 else None
            for seed in range(40)
        ]
    )
    assert table is not None
    together = normalise(pictures, table)
    alone = torch.cat(
        [normalise(pictures[row : row + 1], table[row : row + 1]) for row in range(40)]
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    plain = normalise(pictures)
    assert plain.min() >= -1 and plain.max() <= 1 and together.abs().max() <= 1
    torch.testing.assert_close(together[::3], plain[::3], rtol=0, atol=2e-5)
    assert not torch.allclose(together[1], plain[1], atol=1e-2)


def test_augmentation_of_strength_zero_changes_nothing_and_full_strength_keeps_the_picture_in_view() -> (
    None
):
    picture = torch.full((1, 1, 3, 32, 32), 255, dtype=torch.uint8)
    picture[..., 8:24, 8:24] = 40

    def augmented(seed: int, strength: float) -> torch.Tensor:
        return normalise(
            picture, torch.tensor([image.draw_augmentation(random.Random(seed), strength)])
        )

    assert torch.allclose(normalise(picture), augmented(1, 0.0), atol=1e-5)
    for seed in range(30):
        dark = (augmented(seed, 1.0)[0, 0].mean(0) < 0.1).float().mean()
        assert 0.1 < dark < 0.65, (
            "a quarter of the picture is dark; crop and zoom change its share, never lose it"
        )


def test_patches_are_augmented_as_the_picture_that_they_make() -> None:
    generator, side, most = torch.Generator().manual_seed(0), 4, 30
    grids = [[(3, 5), (6, 4)], [(1, 1)], [(5, 6), (2, 7)]]
    pictures = [
        [
            torch.randint(
                0, 256, (3, down * side, across * side), generator=generator, dtype=torch.uint8
            )
            for down, across in row
        ]
        for row in grids
    ]
    numbers = torch.tensor([image.draw_augmentation(random.Random(seed), 1.0) for seed in range(3)])
    patches, sizes = image.to_patches(pictures, side, most)
    found = normalise(patches, numbers, sizes)
    for row, frames in enumerate(pictures):
        for frame, picture in enumerate(frames):
            whole = normalise(picture[None, None], numbers[row : row + 1])
            down, across = grids[row][frame]
            cut = (
                whole[0, 0]
                .unflatten(2, (across, side))
                .unflatten(1, (down, side))
                .permute(1, 3, 2, 4, 0)
                .flatten(2)
                .flatten(0, 1)
            )
            torch.testing.assert_close(found[row, frame, : down * across], cut, rtol=0, atol=1e-4)
    assert found.isfinite().all()


def _bytes_and_numbers(rank: int, world_size: int, kind: str) -> tuple[bool, bool]:
    join_layout(1)
    encoder = OmniEncoder(published_config(kind), dtype=torch.float64, seed=1).eval()
    inputs = published_inputs(kind, 3)
    assert inputs.images is not None and inputs.audio is not None
    raw = torch.randint(
        0, 256, inputs.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    table = torch.tensor([image.draw_augmentation(random.Random(seed), 1.0) for seed in range(3)])
    sound = inputs.audio.half()
    sent = dataclasses.replace(inputs, images=raw, image_augmentation=table, audio=sound)
    made = dataclasses.replace(
        inputs, images=normalise(raw, table, inputs.image_sizes), audio=sound.double()
    )
    with torch.no_grad():
        first, second, other = (
            encoder(each).fused
            for each in (sent, made, dataclasses.replace(sent, image_augmentation=None))
        )
    return torch.equal(first, second), torch.allclose(first, other, atol=1e-3)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_an_encoder_reads_bytes_as_the_numbers_that_they_are(kind: str) -> None:
    """Pixels with their augmentation, and spectrograms of 16 bits."""
    assert run_ranks(_bytes_and_numbers, 1, kind) == [(True, False)]
