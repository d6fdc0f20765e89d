"""Files of the published encoders in an omni tower: what a folder says where the configuration
does not, whether its weights fit, and the weights themselves.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sailplan.config.fields import JsonObject
from sailplan.config.schema import ModelConfig
from sailplan.errors import ConfigurationError
from sailplan.model.backbones.folder import PROCESSOR, PublishedFolder, resolve
from sailplan.model.backbones.load import published_parts, tensors_of
from sailplan.model.encoders.omni.published import (
    PublishedPart,
    PublishedVisionEncoder,
    drawn_encoder,
    published_config,
)
from sailplan.model.lora import is_lora

if TYPE_CHECKING:
    from sailplan.model.encoders.transformers.config import TransformersConfig

PARTS = ("vision",)  # that can be published
PUBLISHED, SIDE = "published", 224  # pixels, of models that name none
MOST_MISSING = 0.1  # of an encoder's tensors, that files may name otherwise
# What a file says of itself beside the model's shape
ASIDE = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


def adapted_parts(config: ModelConfig) -> list[str]:
    """Return the parts that are transformers' own."""
    return [part for part in PARTS if getattr(config, part).backbone == PUBLISHED]


def resolved(config: ModelConfig) -> ModelConfig:
    """Return the settings with the missing `published` and `processor` taken from the folders that
    `weights` names.

    Raises ConfigurationError where neither says what the encoder is.
    """
    for part in adapted_parts(config):
        settings, place = getattr(config, part), published_parts(config).get(part)
        said, processor = settings.published, settings.processor
        if place is not None and not (said and processor):
            folder = resolve(f"model.weights.{part}", place)
            said = said or _described(folder, part)
            processor = processor or _json(folder / PROCESSOR)
        if not said:
            raise ConfigurationError(
                f"model.{part}.published is empty, and model.weights.{part} null: expected what "
                "stands in the encoder's config.json, or a folder that has one"
            )
        config = replace(config, **{part: replace(settings, published=said, processor=processor)})
    return config


def standing_alone(config: ModelConfig) -> ModelConfig:
    """Return resolved settings that need no folder any more."""
    gone = dict.fromkeys(adapted_parts(config))
    return replace(config, weights=replace(config.weights, **gone))


def check_tokens(config: ModelConfig) -> None:
    """Raise ConfigurationError where a (resolved) picture encoder has not one token for each
    square of `vision.patch`, and less than as many before these; computes nothing.
    """
    if PARTS[0] not in adapted_parts(config):
        return
    with torch.device("meta"):
        encoder = PublishedVisionEncoder(config.vision, torch.float32)
        side = getattr(encoder.model.config, "image_size", None) or SIDE
        side = side if isinstance(side, int) else side[0]
        across = max(1, side // encoder.patch)
        picture = torch.zeros(1, 3, across * encoder.patch, across * encoder.patch)
        try:
            found = encoder.states(picture, **encoder.options).size(1)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"model.vision.published: {type(encoder.model).__name__} takes no picture of "
                f"{tuple(picture.shape[-2:])} pixels ({' '.join(str(error).split())[:200]}); "
                "expected sides of a multiple of model.vision.patch; choose another encoder"
            ) from error
    if not 0 <= found - across**2 < across**2:
        raise ConfigurationError(
            f"model.vision.patch is {encoder.patch}, but {type(encoder.model).__name__} has "
            f"{found} tokens of a picture of {picture.size(-1)} pixels: expected the side of the "
            "square that becomes one token; set model.vision.patch"
        )


def check_folders(config: ModelConfig) -> None:
    """Raise ConfigurationError where a folder holds another model than the (resolved) settings
    describe; reads headers only.
    """
    for part in adapted_parts(config):
        place = published_parts(config).get(part)
        if place is None:
            continue
        key = f"model.{part}.published"
        folder = PublishedFolder(f"model.weights.{part}", place)
        found = _described(folder.path, part)
        for name, value in getattr(config, part).published.items():
            if name in found and name not in ASIDE and found[name] != value:
                raise ConfigurationError(
                    f"{key}.{name} is {value}, but {folder.path}/config.json has {found[name]}: "
                    f"expected equal; leave {key} out to take all of it from there"
                )
        with torch.device("meta"):
            model = drawn_encoder(key, getattr(config, part).published)
        _check_tensors(folder, model.state_dict())


def load_published(config: ModelConfig, part: str, module: PublishedPart) -> None:
    """Fill the encoder from its folder, in its own dtype; low-rank updates stay.

    Raises ConfigurationError where the files have not what most of it needs.
    """
    from sailplan.model.encoders.transformers.files import published_model

    key, place = f"model.weights.{part}", published_parts(config)[part]
    shape = published_config(f"model.{part}.published", getattr(config, part).published)
    source = _source(str(resolve(key, place)))
    found = tensors_of(published_model(source, config=shape, key=key))
    with torch.no_grad():
        for name, tensor in tensors_of(module.model).items():
            if not is_lora(f".{name}"):
                tensor.copy_(found[name])


def _source(place: str) -> TransformersConfig:
    from sailplan.model.encoders.transformers.config import TransformersConfig

    return TransformersConfig(source=place)


def _described(folder: Path, part: str) -> JsonObject:
    """Return a config.json's content, with transformers' defaults; of a model of several towers
    the part's.
    """
    from sailplan.model.encoders.transformers.files import open_config

    whole = open_config(_source(str(folder)), key=f"model.weights.{part}")
    said: JsonObject = getattr(whole, f"{part}_config", whole).to_dict()
    return {name: value for name, value in said.items() if value is not None}


def _json(path: Path) -> JsonObject:
    if not path.is_file():
        return {}
    try:
        found: JsonObject = json.loads(path.read_text(encoding="utf-8"))
        return found
    except ValueError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({type(error).__name__}); expected JSON; download the folder "
            "again"
        ) from error


def _check_tensors(folder: PublishedFolder, wanted: dict[str, Tensor]) -> None:
    """Raise ConfigurationError for shapes of another size, or too many tensors that are not
    there. Files may have any prefix before the model's names.
    """
    missing = []
    for name, tensor in wanted.items():
        shapes = [
            shape
            for theirs, shape in folder.shapes.items()
            if theirs == name or theirs.endswith(f".{name}")
        ]
        if not shapes:
            missing.append(name)
        elif tuple(tensor.shape) not in shapes:
            raise ConfigurationError(
                f"{folder.key}={folder.path}: {name} has the shape {shapes[0]}; expected "
                f"{tuple(tensor.shape)} for the configured model"
            )
    if len(missing) > MOST_MISSING * len(wanted):
        raise ConfigurationError(
            f"{folder.key}={folder.path}: its weights lack {len(missing)} of {len(wanted)} "
            f"tensors, such as {missing[0]}; expected those of its config.json"
        )
