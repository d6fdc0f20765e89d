"""The omni tower as a Hugging Face folder with its own code: configuration, model, processor,
tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import transformers
from torch import Tensor

from sailplan.config.fields import JsonObject
from sailplan.config.schema import Config, ModelConfig
from sailplan.errors import ConfigurationError
from sailplan.export.bundle import OMNI, bundle
from sailplan.export.prompts import Written, named_views, own_modules
from sailplan.export.weights import ENCODER, INPUT_KEYS, save_weights
from sailplan.runtime.files import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CODE = {
    "AutoConfig": "configuration_sailplan.SailplanConfig",
    "AutoModel": "modeling_sailplan.SailplanModel",
    "AutoProcessor": "processing_sailplan.SailplanProcessor",
}
SPECIAL = {  # what the usual special tokens are called, most usual first
    "pad_token": ("<pad>", "[PAD]", "<|endoftext|>"),
    "unk_token": ("<unk>", "[UNK]"),
    "bos_token": ("<s>", "<|im_start|>"),
    "eos_token": ("</s>", "<|im_end|>", "<|endoftext|>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("<mask>", "[MASK]"),
}


def write_omni(
    config: Config, model: ModelConfig, weights: Mapping[str, Tensor], out: Path
) -> Written:
    """Write the folder's model and processor; return its sentence-transformers modules and
    prompts.
    """
    tokenizer_of(Path(config.data.tokenizer)).save_pretrained(out)
    for name in OMNI:
        write_whole(out / f"{name}_sailplan.py", bundle(name))
    settings = asdict(model) | {"weights": None, "lora": None}
    described = {
        "model_type": "sailplan_omni",
        "architectures": ["SailplanModel"],
        "auto_map": CODE,
        "dtype": str(
            next(value.dtype for value in weights.values() if value.is_floating_point())
        ).removeprefix("torch."),
        "settings": settings,
        "prefixes": list(model.prefixes),
    }
    write_whole(out / "config.json", json.dumps(described, ensure_ascii=False, indent=2))
    inputs = {key: getattr(config.data, key) for key in INPUT_KEYS}
    inputs["picture_processor"] = model.vision.processor
    processor = {
        "processor_class": "SailplanProcessor",
        "auto_map": {"AutoProcessor": CODE["AutoProcessor"]},
        "inputs": inputs,
    }
    write_whole(out / "processor_config.json", json.dumps(processor, indent=2))
    save_weights({ENCODER + name: value for name, value in weights.items()}, out)
    return own_modules("sentence_sailplan.SailplanEncoder"), {
        name: view.prompt for name, view in named_views(config).items()
    }


def tokenizer_of(file: Path) -> PreTrainedTokenizerBase:
    """Return a run's tokenizer.json as one of transformers, with special tokens by name.

    They are those that a tokenizer_config.json beside it names, else the usual ones among its added
    tokens.
    """
    if not file.is_file():
        raise ConfigurationError(
            f"data.tokenizer={file}: no such file; an export needs the tokenizer that the run was "
            "trained with"
        )
    named: JsonObject = {}
    beside = file.with_name("tokenizer_config.json")
    if beside.is_file():
        found = json.loads(beside.read_text(encoding="utf-8"))
        named = {
            name: value["content"] if isinstance(value, dict) else value
            for name in SPECIAL
            if (value := found.get(name)) is not None
        }
    else:
        content = json.loads(file.read_text(encoding="utf-8"))
        added = {token["content"] for token in content.get("added_tokens") or []} | set(
            content["model"].get("vocab") or {}
        )
        for name, usual in SPECIAL.items():
            token = next((each for each in usual if each in added), None)
            if token is not None:
                named[name] = token
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file), clean_up_tokenization_spaces=False, **named
    )
