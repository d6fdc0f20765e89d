"""One folder that stands alone: the model's whole weights, its shape, how its inputs were made,
and the tokenizer.

A checkpoint holds whole tensors whatever the layout it was saved at, so one process reads it
without any process group. Prompts are part of the model: a view's vector is only right with the
prompt it was trained with.

    model.safetensors   encoder.*, objectives.*, temperatures.*; the encoder's names are
    OmniEncoder's at tensor-parallel size 1 model.json          model: the encoder's settings;
    views: data set -> view -> modalities, fields, prompt; data: sizes of the inputs tokenizer.json
    of a published model: all files of its configuration and tokenizer
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from sailplan.checkpoint.exported import DESCRIPTION, WEIGHTS, is_exported
from sailplan.checkpoint.loading import WholeCheckpoint
from sailplan.checkpoint.seal import is_complete
from sailplan.config.components import fill
from sailplan.config.encoders import chosen
from sailplan.config.fields import JsonObject
from sailplan.config.schema import Config, EncoderConfig
from sailplan.errors import ConfigurationError
from sailplan.model.component import EncoderComponent
from sailplan.model.count import build_on_meta
from sailplan.model.protocol import Encoder
from sailplan.runtime.files import write_whole

INPUT_KEYS = (
    *("max_tokens", "image_size", "image_patches", "image_patch", "frames"),
    *("audio_rate", "audio_chunk_seconds", "audio_chunks", "mel_bins", "spectrogram"),
)
ENCODER = "encoder."  # what the names of the encoder's tensors begin with


def read_whole(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of the model in a checkpoint, whole, on the CPU, by name.

    Raises ConfigurationError for an incomplete one.
    """
    if not is_complete(checkpoint):
        raise ConfigurationError(
            f"{checkpoint}: not a complete checkpoint; expected a folder "
            "runs/NAME/checkpoints/step-XXXXXXXX"
        )
    return WholeCheckpoint(checkpoint).read_all()


def export_weights(checkpoint: Path, out: Path, *, config: Config) -> Path:
    """Writes the folder `out` from a checkpoint of a run with this configuration; returns it.

    One process, without any group.

    model.json is written last. Raises ConfigurationError for an incomplete checkpoint, one of
    another model, or a missing tokenizer.
    """
    whole = read_whole(checkpoint)
    check_model(checkpoint, whole, config)
    component: EncoderComponent = config.model.component()
    model, encoder = component.exported(
        {
            name.removeprefix(ENCODER): value
            for name, value in whole.items()
            if name.startswith(ENCODER)
        }
    )
    weights = {name: value for name, value in whole.items() if not name.startswith(ENCODER)} | {
        ENCODER + name: value for name, value in encoder.items()
    }
    begin(out, lambda: component.write_files(config, encoder, out))
    return finish(out, weights, describe(config, checkpoint.name) | {"model": asdict(model)})


def begin(out: Path, write_files: Callable[[], None]) -> None:
    """Make the folder `out` with the processor's files; an older export in it then counts as
    incomplete.

    Where a file is missing, write_files raises ConfigurationError before it changes anything.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_files()
    (out / DESCRIPTION).unlink(missing_ok=True)


def finish(out: Path, weights: Mapping[str, Tensor], description: Mapping[str, object]) -> Path:
    """Write weights and, last, model.json into the folder; returns it."""
    save_weights(weights, out)
    write_whole(out / DESCRIPTION, json.dumps(description, ensure_ascii=False, indent=1))
    return out


def check_model(checkpoint: Path, whole: dict[str, Tensor], config: Config) -> None:
    """Raises ConfigurationError where the checkpoint's encoder is not the configured one."""
    state = build_on_meta(config.model).state_dict()
    wanted = {
        f"encoder.{name}": list(value.shape)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    found = {
        name: list(value.shape) for name, value in whole.items() if name.startswith("encoder.")
    }
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ConfigurationError(
                f"checkpoint {checkpoint}: {name} has the shape {found.get(name, 'of nothing')}, "
                "the configured model expects "
                f"{wanted.get(name, 'no such tensor')}; give the run folder that the checkpoint "
                "belongs to"
            )


def save_weights(weights: Mapping[str, Tensor], out: Path) -> None:
    """Write whole tensors to model.safetensors of the folder."""
    save_file(
        {name: value.contiguous() for name, value in weights.items()},
        out / WEIGHTS,
        metadata={"format": "pt"},
    )


def describe(config: Config, checkpoint: str) -> JsonObject:
    """The content of model.json. checkpoint: name of what the weights come from."""
    return {
        "model": asdict(config.model),
        "views": {
            name: {view: asdict(found) for view, found in dataset.views.items()}
            for name, dataset in config.data.sets.items()
        },
        "data": {key: getattr(config.data, key) for key in INPUT_KEYS},
        "similarity": "cosine of the fused vectors, of the whole or of a prefix",
        "run": config.name,
        "checkpoint": checkpoint,
    }


def load_exported(folder: Path) -> tuple[Encoder, JsonObject]:
    """Return (encoder in evaluation mode on the CPU, content of model.json).

    Raises ConfigurationError for a folder that is no export.

    To be called within `sailplan.runtime.process.started` (a single process will do):
    megatron-core's layers ask for their process group when they are built.
    """
    if not is_exported(folder):
        raise ConfigurationError(
            f"{folder}: no {DESCRIPTION}; expected a folder that `sailplan export` has completed"
        )
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    weights = {
        name.removeprefix(ENCODER): value
        for name, value in load_file(folder / WEIGHTS).items()
        if name.startswith(ENCODER)
    }
    component: EncoderComponent = exported_model(folder).component()
    encoder = component.module(
        next(value.dtype for value in weights.values() if value.is_floating_point())
    )
    encoder.load_state_dict(weights, strict=True)
    return encoder.eval(), description


def exported_model(folder: Path) -> EncoderConfig:
    """Return the settings of an exported folder's model."""
    settings, values = chosen(
        json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["model"]
    )
    component: EncoderComponent = fill(settings, values).component()
    found: EncoderConfig = component.placed(folder)
    return found
