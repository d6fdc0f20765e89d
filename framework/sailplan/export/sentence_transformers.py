"""One folder that other programs open: `AutoModel`, `AutoProcessor` and `SentenceTransformer`,
with a run's own vectors.

    model.safetensors, config.json         the encoder alone, low-rank updates merged; of two_towers
    text/, vision/, audio/                 such a folder for each
    tokenizer.json, tokenizer_config.json  and what else the processor needs
    modules.json, config_sentence_transformers.json   the steps from an item to a vector of length
    1, and the prompts by name
    README.md                              the model card
    adapter/                               of a published model with LoRA where nothing else was
    trained: the updates in peft's format
    *_sailplan.py                          of the omni tower: its code, which needs torch and
    transformers alone

`modules.json` is written last: a folder without it is not complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from sailplan.checkpoint.exported import ExportedFolder, is_exported
from sailplan.config.schema import Config, EncoderConfig, ModelConfig
from sailplan.errors import ConfigurationError
from sailplan.export.model_card import model_card
from sailplan.export.omni_folder import write_omni
from sailplan.export.prompts import Written
from sailplan.export.transformers_folder import (
    write_adapter,
    write_towers,
    write_transformers,
)
from sailplan.export.weights import ENCODER, check_model, exported_model, read_whole
from sailplan.model.component import EncoderComponent
from sailplan.model.encoders.transformers.config import TransformersConfig
from sailplan.model.encoders.two_towers import TwoTowersConfig
from sailplan.runtime.files import write_whole

MODULES = "modules.json"
Writer = Callable[[Config, Any, dict[str, Tensor], Path], Written]
WRITERS: dict[type[EncoderConfig], Writer] = {
    ModelConfig: write_omni,
    TransformersConfig: write_transformers,
    TwoTowersConfig: write_towers,
}


def export_sentence_transformers(
    checkpoint: Path, out: Path, *, config: Config, run: Path | None = None
) -> Path:
    """Write the folder `out` from a checkpoint or an exported folder; return it.

    One process, no group, no training data.

    run: the run's folder, whose newest evaluation the model card quotes. Raises ConfigurationError
    for an incomplete source, one of another model, a missing tokenizer, and an encoder that has no
    such form.
    """
    model, weights, raw = encoder_weights(checkpoint, config)
    writer = WRITERS.get(type(model))
    if writer is None:
        raise ConfigurationError(
            f"--to sentence-transformers: model.encoder={model.encoder} has no such form; expected "
            "omni, transformers or two_towers"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / MODULES).unlink(missing_ok=True)
    modules, prompts = writer(config, model, weights, out)
    if (
        isinstance(config.model, TransformersConfig)
        and config.model.lora.rank
        and raw is not weights
    ):
        write_adapter(config, raw, out / "adapter")
    settings = {
        "model_type": "SentenceTransformer",
        "prompts": prompts,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write_whole(
        out / "config_sentence_transformers.json",
        json.dumps(settings, ensure_ascii=False, indent=2),
    )
    write_whole(
        out / "README.md",
        model_card(
            config,
            checkpoint.name,
            run,
            remote_code=any("_sailplan" in one["type"] for one in modules),
        ),
    )
    for module in modules:
        (out / module["path"]).mkdir(exist_ok=True)
    write_whole(
        out / MODULES,
        json.dumps(
            [{"idx": number, "name": str(number)} | one for number, one in enumerate(modules)],
            indent=2,
        ),
    )
    _open_to_others(out)
    return out


def encoder_weights(
    checkpoint: Path, config: Config
) -> tuple[EncoderConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Return the settings of the encoder that stands alone, its whole tensors, and these as they
    were saved, low-rank updates apart.
    """
    if is_exported(checkpoint):
        opened = ExportedFolder(checkpoint)
        weights = {
            name.removeprefix(ENCODER): opened.read(name)
            for name in opened.entries
            if name.startswith(ENCODER)
        }
        return exported_model(checkpoint), weights, weights
    whole = read_whole(checkpoint)
    check_model(checkpoint, whole, config)
    component: EncoderComponent = config.model.component()
    raw = {
        name.removeprefix(ENCODER): value
        for name, value in whole.items()
        if name.startswith(ENCODER)
    }
    model, weights = component.exported(raw)
    return model, weights, raw


def _open_to_others(folder: Path) -> None:
    """Give files the mode of the process's umask; some writers go through temporary files that
    are the user's alone.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
