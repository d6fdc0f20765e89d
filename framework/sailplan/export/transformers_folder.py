"""Trained published models as a folder of sentence-transformers: its own modules where these say
all, else one of ours.

The model's files are of the published format either way, so that `AutoModel` opens the folder
without any code in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from sailplan.config.fields import JsonObject
from sailplan.config.schema import Config
from sailplan.export.bundle import PUBLISHED, bundle
from sailplan.export.prompts import Written, named_views, own_modules
from sailplan.export.weights import save_weights
from sailplan.model.encoders.transformers.config import PromptTemplate, TransformersConfig
from sailplan.model.encoders.transformers.files import (
    drawn_model,
    names_in_file,
    open_config,
    open_image_processor,
    open_tokenizer,
    reads_media_as_text,
    save_files,
)
from sailplan.model.encoders.transformers.module import FEATURES, LORA
from sailplan.model.encoders.transformers.prompts import PublishedTokenizer
from sailplan.model.encoders.two_towers import TwoTowersConfig
from sailplan.runtime.files import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MODEL = "model."
# Ours -> theirs, as every version of sentence-transformers reads them.
POOLINGS = {
    "mean": "mean_tokens",
    "cls": "cls_token",
    "last_token": "lasttoken",
    "max": "max_tokens",
    "weighted_mean": "weightedmean_tokens",
}
SETTINGS, PROJECTION = "sailplan_encoder.json", "projection.safetensors"
KEPT = (
    *("embedding", "modalities", "pooling", "projection", "special_tokens", "padding", "prompts"),
    *("chat_template", "image_processor", "media_marks"),
)
INPUTS = ("max_tokens", "frames", "audio_chunks", "audio_chunk_seconds")  # keys of `data`


def write_transformers(
    config: Config, model: TransformersConfig, weights: Mapping[str, Tensor], out: Path
) -> Written:
    """Write the folder's model and processor; return its sentence-transformers modules and
    prompts.
    """
    tokenizer = write_model(model, weights, out)
    if tokenizer is not None and stock(config, model, tokenizer):
        prompts = {
            name: template.before + template.middle
            for name, template in templates(config, model, tokenizer).items()
        }
        size = int(open_config(model).get_text_config().hidden_size)
        return _stock_modules(config, model, weights.get("projection.weight"), size, out), prompts
    write_projection(weights, out)
    return write_code(config, model_settings(model) | {"source": "this folder"}, out)


def write_towers(
    config: Config, model: TwoTowersConfig, weights: Mapping[str, Tensor], out: Path
) -> Written:
    """Write a folder of the published format for each tower, and what joins them."""
    described = {}
    for name in model.towers:
        begins, tower = f"towers.{name}.", model.tower(name)
        own = {
            key.removeprefix(begins): value
            for key, value in weights.items()
            if key.startswith(begins)
        }
        (out / name).mkdir(exist_ok=True)
        write_model(tower, own, out / name)
        write_projection(own, out / name)
        described[name] = model_settings(tower)
    settings = {
        "embedding": model.embedding,
        "modalities": list(model.towers),
        "towers": described,
    }
    return write_code(config, settings, out)


def write_model(
    model: TransformersConfig, weights: Mapping[str, Tensor], out: Path
) -> PreTrainedTokenizerBase | None:
    """Write what AutoModel and AutoProcessor open; return the tokenizer, None of a model that reads
    no text.

    Of an encoder-decoder the decoder is left out: AutoModel draws one, and its `get_encoder()` is
    the run's.
    """
    save_files(model, out)
    names = names_in_file(model)
    own = {
        name.removeprefix(MODEL): value for name, value in weights.items() if name.startswith(MODEL)
    }
    save_weights({names.get(name, name): value for name, value in own.items()}, out)
    return open_tokenizer(model) if "text" in model.modalities else None


def model_settings(model: TransformersConfig) -> JsonObject:
    """Return what the code in a folder reads of one model's settings."""
    settings = {name: value for name, value in asdict(model).items() if name in KEPT}
    if "vision" in model.modalities:
        settings["image_processor"] = type(open_image_processor(model)).__name__
    settings["media_as_text"] = model.modalities != ["text"] and reads_media_as_text(model)
    return settings


def write_projection(weights: Mapping[str, Tensor], out: Path) -> None:
    """Write the trained projection, where there is one."""
    if "projection.weight" in weights:
        save_file({"weight": weights["projection.weight"].contiguous()}, out / PROJECTION)


def write_code(config: Config, settings: JsonObject, out: Path) -> Written:
    """Write the code of a folder and what it reads; return its modules and prompts."""
    inputs = {name: getattr(config.data, name) for name in INPUTS}
    write_whole(out / SETTINGS, json.dumps({**settings, **inputs}, ensure_ascii=False, indent=2))
    for name in PUBLISHED:
        write_whole(out / f"{name}_sailplan.py", bundle(name))
    return own_modules("published_sailplan.PublishedEncoder"), {
        name: view.prompt for name, view in named_views(config).items()
    }


def write_adapter(config: Config, weights: Mapping[str, Tensor], out: Path) -> None:
    """Write the low-rank updates in peft's format, to be put beside model.source; nothing where
    the model itself was trained too.
    """
    beside = {"lora", "projection", "objectives", "temperatures"}
    if any(not set(config.stages[name].trainable) <= beside for name in config.order):
        return
    import peft

    lora = config.model.lora
    factors = {
        name.removeprefix(MODEL): value.contiguous()
        for name, value in weights.items()
        if LORA in name and name.startswith(MODEL)
    }
    modules = sorted({name.split(f".{LORA}")[0] for name in factors})
    base = (
        str(Path(config.model.source).resolve())
        if Path(config.model.source).is_dir()
        else config.model.source
    )
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules,
        inference_mode=True,
    )
    settings.base_model_name_or_path = base
    settings.save_pretrained(str(out))
    named = {
        f"base_model.model.{name.replace('.default.', '.')}": value
        for name, value in factors.items()
    }
    save_file(named, out / "adapter_model.safetensors", metadata={"format": "pt"})


def stock(config: Config, model: TransformersConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether sentence-transformers' own modules give the run's vectors: a text model, prompts
    that stand before the text alone.
    """
    if (
        model.modalities != ["text"]
        or model.pooling not in POOLINGS
        or not model.special_tokens
        or model.padding != "longest"
    ):
        return False
    with torch.device("meta"):
        towers = hasattr(drawn_model(model), FEATURES["text"])
    if (
        towers
        or names_in_file(model)
        or tokenizer.padding_side != "right"
        or "attention_mask" not in tokenizer.model_input_names
    ):
        return False
    return all(not template.after for template in templates(config, model, tokenizer).values())


def templates(
    config: Config, model: TransformersConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, PromptTemplate]:
    """Return what stands round the text of each named view."""
    published = PublishedTokenizer(tokenizer, model, config.data.max_tokens)
    return {name: published.template(view.prompt) for name, view in named_views(config).items()}


def _stock_modules(
    config: Config, model: TransformersConfig, projection: Tensor | None, size: int, out: Path
) -> list[dict[str, str]]:
    write_whole(
        out / "sentence_bert_config.json",
        json.dumps({"max_seq_length": config.data.max_tokens, "do_lower_case": False}, indent=2),
    )
    pooling: JsonObject = {"word_embedding_dimension": size, "include_prompt": True}
    pooling |= {
        f"pooling_mode_{theirs}": ours == model.pooling for ours, theirs in POOLINGS.items()
    }
    modules: list[tuple[str, JsonObject]] = [("Transformer", {}), ("Pooling", pooling)]
    if projection is not None:
        dense = {
            "in_features": projection.size(1),
            "out_features": projection.size(0),
            "bias": False,
        }
        modules.append(
            ("Dense", dense | {"activation_function": "torch.nn.modules.linear.Identity"})
        )
    modules.append(("Normalize", {}))
    found = []
    for number, (name, settings) in enumerate(modules):
        folder = f"{number}_{name}" if number else ""
        if settings:
            write_whole(out / folder / "config.json", json.dumps(settings, indent=2))
        if name == "Dense":
            assert projection is not None
            save_file(
                {"linear.weight": projection.contiguous()}, out / folder / "model.safetensors"
            )
        found.append({"path": folder, "type": f"sentence_transformers.models.{name}"})
    return found
