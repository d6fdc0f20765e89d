"""A trained or published model as one object that encodes: no run, no process group, no training
data.

The omni tower runs as the plain PyTorch code of an exported folder (`export.bundle`), so nothing of
megatron-core is imported; any other encoder runs as its component builds it. Items go through the
encoder's own processor, as in an evaluation.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from sailplan.checkpoint.exported import DESCRIPTION, is_exported
from sailplan.config.components import fill
from sailplan.config.fields import JsonView
from sailplan.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    EncoderConfig,
    ModelConfig,
    ViewConfig,
)
from sailplan.data.config import Modality
from sailplan.data.processor import Processor
from sailplan.data.record import Item
from sailplan.data.text import clean
from sailplan.errors import ConfigurationError
from sailplan.export.bundle import OMNI, bundle
from sailplan.export.prompts import named_views
from sailplan.export.standalone.items import by_modality
from sailplan.model.encoders.omni.processor import OmniProcessor

Rows = tuple[tuple[str, ...], list[int]]  # modalities, and the rows that have them
Vectors = NDArray[np.float32]
ENCODER = "encoder."
FIELD = "text"


class Model:
    """An encoder with its processor, on one device.

    dimension: D of a whole vector; prefixes: sizes at which it may be cut; prompts: what stands
    before a text, by name.
    """

    def __init__(
        self, config: Config, encoder: nn.Module, prompts: Mapping[str, str], device: torch.device
    ) -> None:
        self.config, self.prompts, self.device = config, dict(prompts), device
        self.origin = ""  # where it was loaded from
        self.dimension, self.prefixes = int(config.model.embedding), list(config.model.prefixes)
        self.encoder = encoder.to(device).eval()
        self.processor: Processor = (
            OmniProcessor(config)
            if isinstance(config.model, ModelConfig)
            else config.model.component().processor(config)
        )

    def encode(
        self,
        items: object,
        *,
        view: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        dimension: int | None = None,
        normalize: bool = True,
        progress: bool = False,
    ) -> Vectors:
        """Return float32 [n, D] of n items in their order, or [D] of a single one.

        An item is a text, a picture (path, Pillow, bytes as uint8 [height, width, 3]), sound (path,
        float32 samples [s] at the model's rate, {"array", "sampling_rate"}), or a dict with some of
        text, image and audio; image may be a list of pictures. view: a name in `prompts`; prompt:
        the text of one. dimension: cut to so many, before the vector is normalised to length 1.

        Raises ConfigurationError for an unknown view or dimension, ValueError for what is no item
        or cannot be decoded.
        """
        single = not isinstance(items, (list, tuple))
        every = [
            by_modality(item) for item in (items if isinstance(items, (list, tuple)) else [items])
        ]
        said = self._prompt(view, prompt)
        size = self.dimension if dimension is None else dimension
        if not 1 <= size <= self.dimension:
            raise ConfigurationError(
                f"dimension={dimension}: expected 1 to {self.dimension}; the model was trained to "
                f"be cut to {self.prefixes}"
            )
        result = np.zeros((len(every), size), dtype=np.float32)
        groups: dict[tuple[str, ...], list[int]] = {}
        for row, item in enumerate(every):
            groups.setdefault(tuple(item), []).append(row)
        batches: list[Rows] = []
        for kind, rows in groups.items():
            rows.sort(key=lambda row: len(every[row].get("text") or ""))
            batches += [
                (kind, rows[start : start + batch_size])
                for start in range(0, len(rows), batch_size)
            ]
        for kind, rows in _shown(batches, progress):
            vectors = self._encoded([every[row] for row in rows], kind, said)[:, :size]
            result[rows] = (
                (nn.functional.normalize(vectors, dim=-1) if normalize else vectors).cpu().numpy()
            )
        return result[0] if single else result

    def similarity(self, left: Vectors, right: Vectors) -> Vectors:
        """Return the cosines float32 [n, m] of vectors [n, D] and [m, D]."""
        first, second = (
            each / np.maximum(np.linalg.norm(each, axis=-1, keepdims=True), 1e-12)
            for each in (left, right)
        )
        cosines: Vectors = first @ second.T
        return cosines

    def _prompt(self, view: str | None, prompt: str | None) -> str:
        if view is None:
            return prompt or ""
        if view not in self.prompts:
            raise ConfigurationError(
                f"view={view}: expected one of "
                f"{', '.join(self.prompts) or 'none, as the model has none'}"
            )
        return self.prompts[view]

    def _encoded(self, items: Sequence[JsonView], kind: tuple[str, ...], prompt: str) -> Tensor:
        modalities: list[Modality] = list(kind)  # type: ignore[arg-type]
        view = ViewConfig(modalities=modalities, fields=[FIELD], prompt=prompt)
        rows = []
        for number, item in enumerate(items):
            pictures = item.get("vision")
            several = (
                []
                if pictures is None
                else pictures
                if isinstance(pictures, (list, tuple))
                else [pictures]
            )
            sound = (
                None
                if item.get("audio") is None
                else _audio_bytes(item["audio"], self.processor.audio_rate)
            )
            held = Item(
                str(number), images=tuple(_picture_bytes(each) for each in several), audio=sound
            )
            rows.append(
                self.processor.row(
                    held, view, DatasetConfig(), text=self._text(item.get("text") or "")
                )
            )
        inputs = self.processor.batch(rows, self.processor.tokens(rows, view), view)
        if hasattr(inputs, "packing"):
            inputs = replace(inputs, packing=None)  # type: ignore[call-arg]  # the plain code packs for itself
        with torch.inference_mode():
            found: Tensor = self.encoder(inputs.to(self.device)).fused.float()
        return found

    def _text(self, text: str) -> str:
        return (
            clean(text) if isinstance(self.config.model, ModelConfig) else text
        )  # as data sets give it; published models: to the letter


def load(
    path: str | Path, *, device: str | torch.device | None = None, **settings: object
) -> Model:
    """Return the model of a run folder, a checkpoint, an exported folder, or a published model's
    folder or hub id.

    device: None: the GPU where there is one. settings: of
    `model.encoders.transformers.TransformersConfig`, such as pooling="cls", for a published model
    alone; what a folder of sentence-transformers says is taken from there.

    Raises ConfigurationError for a place that is none of these, and for settings that the model
    does not have.
    """
    place = Path(path)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _opened(str(path), place, chosen, settings)
    model.origin = model.origin or (str(place.resolve()) if place.exists() else str(path))
    return model


def _opened(path: str, place: Path, chosen: torch.device, settings: Mapping[str, object]) -> Model:
    run = (
        next(
            (
                folder
                for folder in (place, *place.parents[1:2])
                if (folder / "config.yaml").is_file()
            ),
            None,
        )
        if place.is_dir()
        else None
    )
    saved = is_exported(place) or (place / "config.json").is_file()
    if not saved and run is not None:
        return _of_run(place, run, chosen)
    if settings and saved and (is_exported(place) or _model_type(place) == "sailplan_omni"):
        raise ConfigurationError(
            f"load({path}): found {', '.join(settings)} beside a model of sailplan's, expected "
            "none; they are in the folder"
        )
    if is_exported(place):
        return _of_export(place, chosen)
    if saved and _model_type(place) == "sailplan_omni":
        return _of_omni_folder(place, chosen)
    from sailplan.export.load_published import open_published

    return Model(*open_published(path, settings), chosen)


def _of_run(place: Path, run: Path, device: torch.device) -> Model:
    from sailplan.checkpoint.store import latest
    from sailplan.export.sentence_transformers import encoder_weights
    from sailplan.train.run_folder import RunFolder

    folder = RunFolder(run)
    config = folder.load_config()
    checkpoint = latest(folder.checkpoints) if place == run else place
    if checkpoint is None:
        raise ConfigurationError(f"{folder.checkpoints}: no complete checkpoint; train first")
    model, weights, _ = encoder_weights(checkpoint, config)
    found = _with(config, model, weights, device)
    found.origin = str(
        checkpoint.resolve()
    )  # the newest now: shards of a run that is trained on do not mix
    return found


def _of_export(folder: Path, device: torch.device) -> Model:
    from sailplan.export.sentence_transformers import encoder_weights
    from sailplan.export.weights import exported_model

    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    data = fill(DataConfig, description["data"] | {"tokenizer": str(folder / "tokenizer.json")})
    data.sets = {
        name: fill(DatasetConfig, {"views": views}) for name, views in description["views"].items()
    }
    config = Config(model=exported_model(folder), data=data)
    model, weights, _ = encoder_weights(folder, config)
    return _with(config, model, weights, device)


def _of_omni_folder(folder: Path, device: torch.device) -> Model:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]
    inputs = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["inputs"]
    inputs.pop("picture_processor", None)  # the model's settings have it, too
    prompts = json.loads(
        (folder / "config_sentence_transformers.json").read_text(encoding="utf-8")
    )["prompts"]
    model = fill(
        ModelConfig, {name: value for name, value in settings.items() if value is not None}
    )
    config = Config(
        model=model, data=fill(DataConfig, inputs | {"tokenizer": str(folder / "tokenizer.json")})
    )
    weights = {
        name.removeprefix(ENCODER): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    return Model(config, _module(model, weights), prompts, device)


def _with(
    config: Config, model: EncoderConfig, weights: dict[str, Tensor], device: torch.device
) -> Model:
    prompts = {name: view.prompt for name, view in named_views(config).items()}
    return Model(replace(config, model=model), _module(model, weights), prompts, device)


def _module(model: EncoderConfig, weights: Mapping[str, Tensor]) -> nn.Module:
    dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
    if isinstance(model, ModelConfig):
        code = plain_code()
        module: nn.Module = code.OmniTower(code.Settings.of(asdict(model)), dtype)
    else:
        module = model.component().module(dtype)
    module.load_state_dict(weights, strict=True)
    return module


@cache
def plain_code() -> ModuleType:
    """Return the module that an exported omni folder has as modeling_sailplan.py."""
    package = ModuleType("sailplan_exported")
    package.__path__ = []
    sys.modules[package.__name__] = package
    for name in OMNI[:2]:
        module = ModuleType(f"{package.__name__}.{name}_sailplan")
        sys.modules[module.__name__] = module
        exec(compile(bundle(name), f"{name}_sailplan.py", "exec"), module.__dict__)
    return module


def _model_type(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))


def _picture_bytes(picture: object) -> bytes:
    """Return a picture's encoded bytes; what is not encoded yet becomes PNG, which loses
    nothing.
    """
    if isinstance(picture, (str, Path)):
        return Path(picture).read_bytes()
    if isinstance(picture, bytes):
        return picture
    from PIL import Image

    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture))).save(
        file, "PNG"
    )
    return file.getvalue()


def _audio_bytes(sound: object, rate: int) -> bytes:
    """Return encoded sound; samples become WAV in float32, which loses nothing."""
    if isinstance(sound, (str, Path)):
        return Path(sound).read_bytes()
    if isinstance(sound, bytes):
        return sound
    import soundfile

    samples, found = (
        (sound["array"], int(sound["sampling_rate"]))
        if isinstance(sound, Mapping)
        else (sound, rate)
    )
    values = np.asarray(samples, dtype=np.float32)
    file = io.BytesIO()
    soundfile.write(
        file,
        values.T if values.ndim == 2 and values.shape[0] < values.shape[1] else values,
        found,
        format="WAV",
        subtype="FLOAT",
    )
    return file.getvalue()


def _shown(batches: list[Rows], progress: bool) -> Iterable[Rows]:
    if not progress:
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc="batches")
