"""Risks: pictures that a published encoder of the omni tower was not trained on, or that leave the
host as numbers four times as large as bytes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from sailplan.config.fields import JsonObject
from sailplan.config.schema import VisionConfig
from sailplan.errors import ConfigurationError
from sailplan.model.encoders.omni.pictures import check_sides, open_processor_of, sized
from sailplan.model.encoders.omni.published import PublishedVisionEncoder
from sailplan.model.pixels import normalise
from sailplan.model.testing import published_pictures

CROPS: JsonObject = {"size": {"shortest_edge": 16}, "crop_size": {"height": 12, "width": 12}}
PROCESSORS: dict[str, JsonObject] = {
    "CLIPImageProcessor": CROPS,
    "BitImageProcessorFast": CROPS,  # DINOv2's
    "SiglipImageProcessorPil": {"size": {"height": 12, "width": 12}},
    "ViTImageProcessor": {"size": {"height": 12, "width": 12}},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_encoder_gets_what_the_published_processor_makes(name: str) -> None:
    """Bytes from the host, values on the device: together the processor's own."""
    pil = name.removesuffix("Fast").removesuffix("Pil") + "Pil"
    published = getattr(transformers, pil).from_dict(PROCESSORS[name])
    settings = published.to_dict() | {"image_processor_type": name}
    processor = open_processor_of(settings)
    assert processor is not None
    check_sides(processor, 12)
    picture = np.random.default_rng(1).integers(0, 256, (40, 28, 3), dtype=np.uint8)
    bytes_of = sized(processor, torch.from_numpy(picture).permute(2, 0, 1))
    assert bytes_of.dtype == torch.uint8
    encoder = PublishedVisionEncoder(
        VisionConfig(
            patch=4,
            backbone="published",
            published=published_pictures("clip_vision_model"),
            processor=settings,
        ),
        torch.float32,
    )
    found = encoder.normalised(normalise(bytes_of[None, None])[0])[0]
    wanted = published(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_without_a_processor_pictures_are_the_runs_own_squares() -> None:
    assert open_processor_of({"image_mean": [0.5] * 3}) is None


def test_pictures_of_another_size_and_unknown_classes_are_one_line() -> None:
    processor = open_processor_of(CROPS | {"image_processor_type": "CLIPImageProcessor"})
    assert processor is not None
    with pytest.raises(ConfigurationError, match=r"data\.image_size=64: .* \(12, 12\) uint8"):
        check_sides(processor, 64)
    with pytest.raises(ConfigurationError, match=r"NoneSuchPil cannot be had"):
        open_processor_of({"image_processor_type": "NoneSuch"})
    scaled = open_processor_of({"image_processor_type": "EfficientNetImageProcessor"})
    assert scaled is not None
    with pytest.raises(ConfigurationError, match=r"float32, expected squares of bytes"):
        check_sides(scaled, 346)
