"""Any picture encoder of transformers in the omni tower, behind one adapter: what its config.json
describes, its hidden states as tokens, without its pooling.

It draws no random numbers and keeps its statistics, in training too: no dropout, batch norms as
published. So a row does not depend on its neighbours, and a repeated layer finds what it had.
Tensor-parallel ranks hold it whole.

Shape legend: n pictures, p patches a picture, t hidden states a picture, h hidden.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from sailplan.config.fields import JsonObject
from sailplan.config.schema import VisionConfig
from sailplan.errors import ConfigurationError
from sailplan.model.encoders.transformers.alone import (
    encoder_alone,
    keep_statistics,
    without_draws,
)
from sailplan.model.protocol import repeated_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

RESIZES = "interpolate_pos_encoding"  # of models that fit their positions to the picture if asked
WIDTHS = ("hidden_size", "hidden_dim")  # in config.json; the last: of convolutional models


def published_config(key: str, settings: JsonObject) -> PreTrainedConfig:
    """Return transformers' configuration of a config.json's content.

    Raises ConfigurationError, naming `key`, where it describes no model of transformers.
    """
    import transformers  # seconds, so only where it is wanted

    try:
        return without_draws(transformers.AutoConfig.for_model(**settings))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigurationError(
            f"{key}: transformers knows no such model ({reason}); expected what stands in its "
            "config.json, model_type first"
        ) from error


def drawn_encoder(key: str, settings: JsonObject) -> PreTrainedModel:
    """Return the encoder with drawn weights in float32, or on the meta device.

    Raises ConfigurationError, naming `key`, for a model that needs more than pictures or sound.
    """
    import transformers

    config = published_config(key, settings)
    try:
        made = encoder_alone(transformers.AutoModel.from_config(config, dtype=torch.float32))
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigurationError(
            f"{key}: transformers builds no model of {settings.get('model_type')} ({reason}); "
            "expected sizes that fit each other"
        ) from error
    model = cast("PreTrainedModel", made)
    parameters = inspect.signature(model.forward).parameters.values()
    wanted = [
        each.name
        for each in parameters
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    if set(wanted) - {model.main_input_name}:
        raise ConfigurationError(
            f"{key}: {type(model).__name__} wants {', '.join(wanted)}: expected an encoder of "
            "pictures or of features of sound, which wants these alone; choose another"
        )
    return model


def work(key: str, settings: JsonObject) -> int:
    """Return the multiplications of one position in the matrices of the encoder's layers."""
    with torch.device("meta"):
        layers = repeated_layers(drawn_encoder(key, settings))
    matrices = {
        parameter for layer in layers for parameter in layer.parameters() if parameter.ndim > 1
    }
    return sum(parameter.numel() for parameter in matrices)


class PublishedPart(nn.Module):
    """An encoder of transformers. width: h."""

    def __init__(self, key: str, settings: JsonObject, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = drawn_encoder(key, settings)
        nn.Module.to(self.model, dtype)
        keep_statistics(self.model)
        config = self.model.config
        sizes = (getattr(config, name, None) for name in WIDTHS)
        self.width = int(next((size for size in sizes if size), None) or config.hidden_sizes[-1])

    def train(self, mode: bool = True) -> PublishedPart:
        """Stay as in evaluation, whatever `mode` is: nothing is drawn."""
        return super().train(False)

    def states(self, media: Tensor, **options: bool) -> Tensor:
        """Return hidden states [n, t, h]; of a convolutional model its grid, row by row."""
        first = next(self.model.parameters())
        hidden: Tensor = self.model(media.to(first.dtype), **options).last_hidden_state
        return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


class PublishedVisionEncoder(PublishedPart):
    """Frames [n, 3, height, width] in [-1, 1] to tokens [n, p, h], each frame alone."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__("model.vision.published", config.published, dtype)
        self.patch = config.patch
        half = [0.5] * 3
        processor = config.processor
        plain = processor.get("do_normalize") is False
        self.mean, self.deviation = (
            half if plain else list(processor.get(name) or half)
            for name in ("image_mean", "image_std")
        )
        resizes = RESIZES in inspect.signature(self.model.forward).parameters
        self.options = {RESIZES: True} if resizes else {}

    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError where the model does not have a token for each patch of the image.

        What stands before the patches (a class token, registers) is left out.
        """
        down, across = images.size(-2) // self.patch, images.size(-1) // self.patch
        if images.size(-1) % self.patch or images.size(-2) % self.patch:
            raise ValueError(
                f"image of {tuple(images.shape[-2:])} pixels: both sides must be multiples of "
                f"model.vision.patch={self.patch}"
            )
        hidden = self.states(self.normalised(images), **self.options)
        before = hidden.size(1) - down * across
        if before < 0:
            raise ValueError(
                f"{hidden.size(1)} tokens of an image of {tuple(images.shape[-2:])} pixels: "
                f"expected {down * across}, one for each square of model.vision.patch={self.patch}"
            )
        return hidden[:, before:]

    def normalised(self, images: Tensor) -> Tensor:
        """Return pixels from [-1, 1] to the model's mean and deviation (of values in 0..1)."""
        if self.mean == self.deviation == [0.5] * 3:
            return images
        channels = [
            channel * (0.5 / deviation) + (0.5 - mean) / deviation
            for channel, mean, deviation in zip(
                images.unbind(1), self.mean, self.deviation, strict=True
            )
        ]
        return torch.stack(channels, 1)
