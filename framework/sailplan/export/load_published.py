"""Published models, and folders of them that an export wrote, as an encoder with its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sailplan.config.fields import JsonObject
from sailplan.config.schema import Config, DataConfig
from sailplan.errors import ConfigurationError
from sailplan.export.published_settings import OWN, settings_in, settings_of
from sailplan.model.encoders.transformers.config import TransformersConfig
from sailplan.model.encoders.transformers.files import open_config, published_model
from sailplan.model.encoders.transformers.module import TransformersEncoder, vector_size
from sailplan.model.encoders.two_towers import TwoTowersConfig
from sailplan.model.encoders.two_towers.module import TwoTowers

Opened = tuple[Config, nn.Module, dict[str, str]]  # and the prompts by name
INPUTS = ("max_tokens", "frames", "audio_chunks", "audio_chunk_seconds")  # keys of `data`


def open_published(place: str, settings: Mapping[str, object]) -> Opened:
    """Return the encoder in float32 on the CPU. place: a folder, or a model id of the hub.

    Raises ConfigurationError for settings that a published model does not have.
    """
    own = Path(place) / OWN
    values = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
    if "towers" in values:
        if settings:
            raise ConfigurationError(
                f"load({place}): found {', '.join(settings)} beside a model of sailplan's, expected "
                "none; they are in the folder"
            )
        return _towers(Path(place), values)
    known = settings_in(Path(place)) | dict(settings)
    inputs = {name: known.pop(name) for name in INPUTS if name in known}
    projection: Tensor | None = known.pop("projection_weight", None)
    model = _settings(place, known)
    weights = published_model(model)
    model.embedding = vector_size(weights) if projection is None else len(projection)
    model.prefixes, model.projection = [model.embedding], projection is not None
    model.validate("model")
    encoder = TransformersEncoder(model, weights)
    _project(encoder, projection)
    if inputs.get("max_tokens") is None:
        longest = getattr(open_config(model).get_text_config(), "max_position_embeddings", 512)
        inputs["max_tokens"] = min(int(longest), 512)
    config = Config(model=model, data=DataConfig(**inputs))
    prompts = _prompts(own.parent) if values else {name: name for name in model.prompts}
    return config, encoder, prompts


def _towers(folder: Path, values: JsonObject) -> Opened:
    found = {name: settings_of(own, folder / name) for name, own in values["towers"].items()}
    projections = {name: own.pop("projection_weight") for name, own in found.items()}
    model = TwoTowersConfig(embedding=values["embedding"], prefixes=[values["embedding"]])
    for name, own in found.items():
        own.pop("modalities")
        setattr(model, name, _settings(str(folder / name), own))
    model.validate("model")
    models = {name: published_model(model.tower(name)) for name in model.towers}
    encoder = TwoTowers(model, models)
    for name, projection in projections.items():
        _project(encoder.towers[name], projection)
    data = DataConfig(**{name: values[name] for name in INPUTS})
    return Config(model=model, data=data), encoder, _prompts(folder)


def _prompts(folder: Path) -> dict[str, str]:
    """Return the prompts of an exported folder by the names of its views."""
    file = folder / "config_sentence_transformers.json"
    found: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))["prompts"]
    return found


def _settings(place: str, known: JsonObject) -> TransformersConfig:
    try:
        return TransformersConfig(source=place, **known)
    except TypeError as error:
        raise ConfigurationError(
            f"load({place}): {error}; expected settings of a published model, such as pooling"
        ) from error


def _project(encoder: nn.Module, weight: Tensor | None) -> None:
    held = encoder.get_submodule("projection") if weight is not None else None
    if isinstance(held, nn.Linear) and weight is not None:
        with torch.no_grad():
            held.weight.copy_(weight)
