"""A published model's files: its configuration, its weights and its tokenizer, opened by
transformers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import PushToHubMixin, cached_file

from sailplan.config.fields import JsonObject
from sailplan.errors import ConfigurationError
from sailplan.model.encoders.transformers.alone import (
    encoder_alone,
    encoder_of,
    without_draws,
)
from sailplan.model.encoders.transformers.config import TransformersConfig

T = TypeVar("T")
logger = logging.getLogger("sailplan.model")
AUTO, SOURCE = "auto", "model.source"
INPUTS = "preprocessor_config.json"
VIDEOS = "video_preprocessor_config.json"
WORDS = {"vision": "image", "audio": "audio"}  # what processors and chat templates call them
MOST_MISSING = (
    0.1  # of a model's parameters: a head that the files lack may be drawn, a model may not
)

transformers.utils.logging.disable_progress_bar()


def open_config(
    settings: TransformersConfig, *, key: str = SOURCE
) -> transformers.PreTrainedConfig:
    """Return the model's configuration with `options` applied.

    Raises ConfigurationError naming `key`.
    """
    config = _opened(
        settings,
        "config.json",
        lambda: transformers.AutoConfig.from_pretrained(
            settings.source, revision=settings.revision
        ),
        key,
    )
    _change(config, settings.options, "model.options")
    return without_draws(config)


def open_tokenizer(settings: TransformersConfig) -> transformers.PreTrainedTokenizerBase:
    """Return the model's tokenizer."""
    return _opened(
        settings,
        "tokenizer",
        lambda: transformers.AutoTokenizer.from_pretrained(
            settings.source, revision=settings.revision
        ),
    )


def open_image_processor(settings: TransformersConfig) -> transformers.BaseImageProcessor:
    """Return the model's picture processor: the one of its files that works with Pillow, so that
    pixels are the same everywhere.
    """

    def read() -> transformers.BaseImageProcessor:
        name = settings.image_processor
        if name is None:
            values, _ = transformers.BaseImageProcessor.get_image_processor_dict(
                settings.source, revision=settings.revision
            )
            name = (
                str(values["image_processor_type"]).removesuffix("Fast").removesuffix("Pil") + "Pil"
            )
        return getattr(transformers, name).from_pretrained(
            settings.source, revision=settings.revision, **settings.image_processor_options
        )

    return _opened(settings, "picture processor (model.image_processor)", read)


def open_feature_extractor(settings: TransformersConfig) -> transformers.SequenceFeatureExtractor:
    """Return the model's feature extractor: what it makes of a recording."""
    return _opened(
        settings,
        "feature extractor",
        lambda: transformers.AutoFeatureExtractor.from_pretrained(
            settings.source, revision=settings.revision
        ),
    )


def reads_media_as_text(settings: TransformersConfig) -> bool:
    """Return whether pictures or sound are positions of the model's text: it has tokens for them."""
    names = [f"{word}_token_{kind}" for word in WORDS.values() for kind in ("id", "index")]
    config = open_config(settings)
    return any(getattr(config, name, None) is not None for name in names)


class NoVideos(transformers.BaseVideoProcessor, PushToHubMixin):
    """Stands where a processor wants one for videos, which need torchvision: frames are pictures."""

    def __init__(self) -> None:
        pass

    def to_dict(self) -> JsonObject:
        return {}


def open_processor(settings: TransformersConfig) -> Any:
    """Return the processor of a model that reads media as positions of its text."""

    def read() -> Any:
        kind = open_config(settings).model_type
        name = PROCESSOR_MAPPING_NAMES[kind]
        processor = getattr(transformers, name)
        made = {
            "tokenizer": lambda: open_tokenizer(settings),
            "image_processor": lambda: open_image_processor(settings),
            "feature_extractor": lambda: open_feature_extractor(settings),
            "video_processor": NoVideos,
        }
        values, _ = processor.get_processor_dict(settings.source, revision=settings.revision)
        parts = [made[part]() for part in processor.get_attributes()]
        return processor.from_args_and_dict(parts, values)

    return _opened(settings, "processor", read)


def save_files(settings: TransformersConfig, out: Path) -> None:
    """Write the configuration and what makes a model's inputs, as AutoConfig and AutoProcessor read
    them.
    """
    config = open_config(settings)
    config.dtype = torch.float32
    config.save_pretrained(out)
    opened = {
        "text": open_tokenizer,
        "vision": open_image_processor,
        "audio": open_feature_extractor,
    }
    both: JsonObject = {}
    for modality in settings.modalities:
        opened[modality](settings).save_pretrained(out)
        if modality != "text":  # pictures' and sound's have one file: neither may replace the other
            both = _joined(both, json.loads((out / INPUTS).read_text(encoding="utf-8")), settings)
            (out / INPUTS).write_text(json.dumps(both, indent=2), encoding="utf-8")
    if list(settings.modalities) == ["text"] or not reads_media_as_text(settings):
        return
    processor = open_processor(settings)
    values = json.loads(processor.to_json_string())
    values.pop("video_processor", None)
    (out / "processor_config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    if processor.chat_template is not None:
        (out / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")
    held = cached_file(
        settings.source,
        VIDEOS,
        revision=settings.revision,
        _raise_exceptions_for_missing_entries=False,
    )
    if held is not None:
        (out / VIDEOS).write_bytes(Path(held).read_bytes())


def _joined(known: JsonObject, more: JsonObject, settings: TransformersConfig) -> JsonObject:
    """Return both files' entries as one file's. Raises ConfigurationError where they differ."""
    shared = {name for name in known.keys() & more.keys() if known[name] != more[name]}
    unlike = sorted(shared - {"processor_class"})
    if unlike:
        raise ConfigurationError(
            f"model.source={settings.source}: its picture processor and its feature extractor want "
            f"{unlike[0]} {known[unlike[0]]} and {more[unlike[0]]}: expected equal ones, as they "
            f"share {INPUTS}; export one modality, or use two_towers"
        )
    return known | more


def drawn_model(settings: TransformersConfig) -> nn.Module:
    """Return the model with drawn weights in float32, or on the meta device."""
    config, attention = open_config(settings), _attention(settings)
    return encoder_alone(
        _opened(
            settings,
            "model",
            lambda: transformers.AutoModel.from_config(
                config, attn_implementation=attention, dtype=torch.float32
            ),
        )
    )


def published_model(
    settings: TransformersConfig,
    *,
    config: transformers.PreTrainedConfig | None = None,
    key: str = SOURCE,
) -> Any:
    """Return the model with its weights in float32.

    config: instead of the folder's, such as that of one of its towers. key: names the folder in
    messages. Raises ConfigurationError where the files have not what most of the model needs.
    """
    model, found = _opened(
        settings,
        "weights",
        lambda: transformers.AutoModel.from_pretrained(
            settings.source,
            revision=settings.revision,
            config=open_config(settings) if config is None else config,
            attn_implementation=_attention(settings),
            dtype=torch.float32,
            output_loading_info=True,
        ),
        key,
    )
    encodes = {id(parameter) for parameter in encoder_of(model).parameters()}
    sizes = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if id(parameter) in encodes
    }
    missing = sorted(set(found["missing_keys"]) & sizes.keys())
    if sum(sizes[name] for name in missing) > MOST_MISSING * sum(sizes.values()):
        raise ConfigurationError(
            f"{key}={settings.source}: its weights lack {len(missing)} of {len(sizes)} "
            f"tensors, such as {missing[0]}; "
            "expected those of its config.json"
        )
    if missing:
        logger.warning(
            "%s: the files lack %s, which start from the seed", settings.source, ", ".join(missing)
        )
    return encoder_alone(model)


def names_in_file(settings: TransformersConfig) -> dict[str, str]:
    """Return, of an encoder-decoder, the encoder's tensors by name -> their names in the file that
    AutoModel reads; of other models nothing.
    """
    with torch.device("meta"):
        whole = transformers.AutoModel.from_config(open_config(settings), dtype=torch.float32)
    encoder = encoder_of(whole)
    if encoder is whole:
        return {}
    held = {id(tensor): name for name, tensor in reversed(_tensors(whole))}  # the first name stays
    return {name: held[id(tensor)] for name, tensor in _tensors(encoder)}


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def _attention(settings: TransformersConfig) -> str | None:
    return None if settings.attention == AUTO else settings.attention


def _change(config: object, options: JsonObject, path: str) -> None:
    for name, value in options.items():
        inner = getattr(config, name, None)
        if isinstance(value, dict) and isinstance(inner, transformers.PreTrainedConfig):
            _change(inner, value, f"{path}.{name}")
        else:
            setattr(config, name, value)


def _opened(settings: TransformersConfig, what: str, read: Callable[[], T], key: str = SOURCE) -> T:
    if not Path(settings.source).is_dir() and (
        settings.source.startswith((".", "/", "~")) or settings.source.count("/") > 1
    ):
        raise ConfigurationError(
            f"{key}={settings.source}: no such folder; expected one that transformers' "
            "AutoModel opens, or a model id of the hub; "
            "fetch the files first (`make weights` does it for the examples of the repository)"
        )
    try:
        return read()
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        at = (
            settings.source
            if Path(settings.source).is_dir()
            else f"{settings.source} (no such folder here, so an id of the hub)"
        )
        reason = " ".join(str(error).split())[:200]
        raise ConfigurationError(
            f"{key}={at}: its {what} cannot be opened ({reason}); expected a folder that "
            "transformers' AutoModel opens"
        ) from error
