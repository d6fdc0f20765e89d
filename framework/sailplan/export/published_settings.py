"""What a folder of sentence-transformers says of its model: pooling, projection, prompts,
length.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from sailplan.config.fields import JsonObject
from sailplan.errors import ConfigurationError
from sailplan.model.encoders.transformers.config import PromptTemplate

MODULES, OWN = "modules.json", "sailplan_encoder.json"
POOLINGS = {
    "cls_token": "cls",
    "mean_tokens": "mean",
    "max_tokens": "max",
    "lasttoken": "last_token",
    "weightedmean_tokens": "weighted_mean",
}


def settings_of(values: JsonObject, folder: Path) -> JsonObject:
    """Return the settings of a model that an export describes, whose projection lies in `folder`."""
    found = {
        name: value
        for name, value in values.items()
        if name not in ("source", "embedding", "projection", "media_as_text")
    }
    found["prompts"] = {
        name: PromptTemplate(**template) for name, template in values["prompts"].items()
    }
    if (folder / "projection.safetensors").is_file():
        found["projection_weight"] = load_file(folder / "projection.safetensors")["weight"]
    return found


def settings_in(folder: Path) -> JsonObject:
    """Return the settings that a folder of sentence-transformers holds, an exported one's own
    file first.
    """
    own = folder / OWN
    if own.is_file():
        return settings_of(json.loads(own.read_text(encoding="utf-8")), folder)
    found: JsonObject = {}
    if not (folder / MODULES).is_file():
        return found
    for module in json.loads((folder / MODULES).read_text(encoding="utf-8")):
        kind, path = str(module["type"]).rsplit(".", 1)[-1], folder / module["path"]
        if kind == "Pooling":
            values = json.loads((path / "config.json").read_text(encoding="utf-8"))
            mode = values.get("pooling_mode") or next(
                (name for name in POOLINGS if values.get(f"pooling_mode_{name}")), "mean_tokens"
            )
            found["pooling"] = POOLINGS.get(
                mode, {"lasttoken": "last_token", "weightedmean": "weighted_mean"}.get(mode, mode)
            )
        elif kind == "Dense":
            found["projection_weight"] = load_file(path / "model.safetensors")["linear.weight"]
        elif kind not in ("Transformer", "Normalize"):
            raise ConfigurationError(
                f"{folder}: {MODULES} has {module['type']}: expected Transformer, Pooling, Dense "
                "and Normalize; load it with its own library"
            )
    if (folder / "sentence_bert_config.json").is_file():
        found["max_tokens"] = json.loads(
            (folder / "sentence_bert_config.json").read_text(encoding="utf-8")
        ).get("max_seq_length")
    if (folder / "config_sentence_transformers.json").is_file():
        prompts = (
            json.loads(
                (folder / "config_sentence_transformers.json").read_text(encoding="utf-8")
            ).get("prompts")
            or {}
        )
        found["prompts"] = {name: PromptTemplate(before=text) for name, text in prompts.items()}
    return found
