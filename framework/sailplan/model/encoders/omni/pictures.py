"""Pictures as a published model's own processor cuts and sizes them, still bytes: what it does to
their values the encoder does on its device, after the run's augmentation.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sailplan.config.fields import JsonObject
from sailplan.errors import ConfigurationError

TYPE = "image_processor_type"


class PictureProcessor(Protocol):
    """transformers' picture processor."""

    def __call__(self, images: Image.Image) -> dict[str, list[object]]: ...


def open_processor_of(settings: JsonObject) -> PictureProcessor | None:
    """Return the processor of a preprocessor_config.json's content, the one that works with
    Pillow, so that pixels are the same everywhere; None where it names no class.

    Raises ConfigurationError for one that transformers has not.
    """
    if TYPE not in settings:
        return None
    import transformers  # seconds, so only where it is wanted

    name = str(settings[TYPE]).removesuffix("Fast").removesuffix("Pil") + "Pil"
    try:
        made = getattr(transformers, name)
        processor: PictureProcessor = made.from_dict(
            {**settings, "do_rescale": False, "do_normalize": False}
        )
        return processor
    except (AttributeError, TypeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigurationError(
            f"model.vision.processor.{TYPE}={settings[TYPE]}: {name} cannot be had ({reason}); "
            "expected a class of transformers that works with Pillow; without it pictures are "
            "squeezed to squares"
        ) from error


def sized(processor: PictureProcessor, pixels: Tensor) -> Tensor:
    """Return the picture uint8 [3, height, width] as the processor cuts and sizes it, the same."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return torch.as_tensor(np.asarray(processor(images=picture)["pixel_values"][0]))


def check_sides(processor: PictureProcessor, side: int) -> None:
    """Raise ConfigurationError where it does not make bytes of side x side pixels."""
    found = sized(processor, torch.full((3, 48, 64), 255, dtype=torch.uint8))
    if found.dtype != torch.uint8 or tuple(found.shape) != (3, side, side):
        kind = f"{tuple(found.shape[1:])} {str(found.dtype).removeprefix('torch.')}"
        raise ConfigurationError(
            f"data.image_size={side}: the pictures of model.vision.processor "
            f"({type(processor).__name__}) are {kind}, expected squares of bytes of that size; set "
            f"data.image_size={found.shape[-1]}, or size and crop_size of the processor"
        )
