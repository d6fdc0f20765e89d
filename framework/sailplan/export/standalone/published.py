"""Trained published models as a module of sentence-transformers, where its own modules do not say
all: texts, pictures and sound, of one model or of several, templates with text after the item's,
other poolings."""

# A template: what it lacks or overrides comes together when `export.bundle` writes it.
# mypy: disable-error-code="arg-type, attr-defined, operator, override, union-attr, assignment"
from __future__ import annotations

import json
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from PIL import Image
from sentence_transformers.models import InputModule
from torch import Tensor, nn

from sailplan.data.processor import ViewRow
from sailplan.export.standalone.items import BITS, KEYS, by_modality
from sailplan.export.standalone.media import pixels, samples_of
from sailplan.model.encoders.transformers.config import PromptTemplate
from sailplan.model.encoders.transformers.files import open_processor
from sailplan.model.encoders.transformers.module import mean_of_units
from sailplan.model.encoders.transformers.processor import PRESENT, ROWS, NoTokens
from sailplan.model.encoders.transformers.prompts import PublishedTokenizer

SETTINGS, PROJECTION = "sailplan_encoder.json", "projection.safetensors"
NAMES = {modality: key for key, modality in KEYS.items()}
TransformersConfig = SimpleNamespace


class Sounds:
    """Recordings as features: cut into chunks, each through the model's feature extractor."""

    def __init__(self, extractor: object, settings: SimpleNamespace) -> None:
        self.extractor, self.chunks = extractor, settings.audio_chunks
        self.rate = int(extractor.sampling_rate)
        self.length = round(settings.audio_chunk_seconds * self.rate)

    def features(self, sound: object) -> Tensor:
        return self._extracted(self._cut(samples_of(sound, self.rate), None))

    def whole(self, sound: object) -> Tensor:
        return torch.from_numpy(np.concatenate(self._cut(samples_of(sound, self.rate), None)))


class Rows:
    """Rows of named tensors. settings: the inputs' sizes; text: of the model that reads."""

    def __init__(
        self,
        settings: SimpleNamespace,
        text: SimpleNamespace,
        tokenizer: object,
        pictures: object,
        extractor: object,
    ) -> None:
        self.settings, self.max_tokens, self._picture_processor = (
            text,
            settings.max_tokens,
            pictures,
        )
        self._recordings = Sounds(extractor, settings) if extractor is not None else None
        self.tokenizer = (
            PublishedTokenizer(tokenizer, text, settings.max_tokens)
            if tokenizer is not None
            else NoTokens()
        )


class Sequences:
    """Rows of a model that reads pictures and sound within its text."""

    def __init__(
        self, settings: SimpleNamespace, text: SimpleNamespace, tokenizer: object, extractor: object
    ) -> None:
        self.settings = text
        self.tokenizer = PublishedTokenizer(tokenizer, text, settings.max_tokens)
        self._published = open_processor(text)
        self._prompts: dict[tuple[str, int, int], PromptTemplate] = {}
        if extractor is not None:
            self._recordings = Sounds(extractor, settings)
            self.audio_rate = self._recordings.rate

    def batch(
        self, rows: list[dict[str, object]], images: list[list[Tensor]], prompt: str
    ) -> dict[str, Tensor]:
        """Return the model's tensors; images: those of each row, uint8 [3, height, width]."""
        shown = []
        for row, pictures in zip(rows, images, strict=True):
            sound = row.get("audio")
            heard = None if sound is None else self._recordings.whole(sound)[None]
            shown.append(ViewRow(text=row.get("text") or "", images=tuple(pictures), audio=heard))
        found = self._sequences(shown, len(shown), prompt)
        found[ROWS] |= torch.tensor([list(row) == ["text"] for row in rows])
        return found


class PublishedTower(nn.Module):
    """One published model and its projection."""

    def __init__(
        self, settings: SimpleNamespace, model: nn.Module, projection: nn.Module | None
    ) -> None:
        super().__init__()
        self.settings, self.model, self.projection = settings, model, projection
        self.compute_dtype = None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


class PublishedEncoder(InputModule):
    """Items to `sentence_embedding` [b, D]. towers: modality -> the model that encodes it."""

    def __init__(
        self, settings: SimpleNamespace, towers: dict[str, PublishedTower], rows: Any
    ) -> None:
        super().__init__()
        self.settings = settings
        self.rows = rows  # Rows or Sequences
        self.towers = nn.ModuleDict(towers)
        self.tokenizer = None

    @property
    def modalities(self) -> list[object]:
        keys = [NAMES[modality] for modality in self.settings.modalities]
        mixed = [each for size in range(2, len(keys) + 1) for each in permutations(keys, size)]
        return [*keys, *mixed, *(["message"] if mixed else [])]  # the last: unlike items in a batch

    @property
    def max_seq_length(self) -> int:
        return int(self.settings.max_tokens)

    def get_embedding_dimension(self) -> int:
        return int(self.settings.embedding)

    def preprocess(
        self, inputs: list[object], prompt: str | None = None, **_: object
    ) -> dict[str, Tensor]:
        rows = [by_modality(item) for item in inputs]
        shown = [sum(BITS[name] for name in row) for row in rows]
        for row in rows:
            if not set(row) <= set(self.settings.modalities):
                raise ValueError(
                    f"an item shows {', '.join(row)}: expected some of "
                    f"{', '.join(self.settings.modalities)}"
                )
        found: dict[str, Tensor] = {"modalities": torch.tensor(shown)}
        if isinstance(self.rows, Sequences):
            images = [self._pictures(row.get("vision")) for row in rows]
            return found | self.rows.batch(rows, images, prompt or "")
        if any("text" in row for row in rows):
            found |= self.rows._texts(
                self.rows.tokenizer.texts([row.get("text") or "" for row in rows], prompt or "")
            )
            found[PRESENT["text"]] = torch.tensor(
                [bool(row.get("text")) or list(row) == ["text"] for row in rows]
            )
        if any("vision" in row for row in rows):
            found |= self.rows._stacked(
                [ViewRow(images=tuple(self._frames(row.get("vision")))) for row in rows]
            )
        if any("audio" in row for row in rows):
            sounds = [row.get("audio") for row in rows]
            found |= self.rows._heard(
                [
                    None if sound is None else self.rows._recordings.features(sound)
                    for sound in sounds
                ]
            )
        return found

    def _pictures(self, shown: object) -> list[Tensor]:
        """Return uint8 [3, height, width] of each picture, at most the trained number."""
        several = (
            list(shown) if isinstance(shown, (list, tuple)) else [] if shown is None else [shown]
        )
        return [pixels(picture) for picture in several[: self.settings.frames]]

    def _frames(self, shown: object) -> list[Tensor]:
        images = [
            Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in self._pictures(shown)
        ]
        return [
            torch.as_tensor(
                np.asarray(self.rows._picture_processor(images=one)["pixel_values"][0]),
                dtype=torch.float32,
            )
            for one in images
        ]

    def forward(self, features: dict[str, Tensor], **_: object) -> dict[str, Tensor]:
        if ROWS in features:
            given = {
                name: value
                for name, value in features.items()
                if isinstance(value, Tensor) and name != "modalities"
            }
            vectors = self.towers["text"]._sequences(given)
            return features | {"sentence_embedding": vectors}
        bits = features["modalities"].tolist()
        device = features["modalities"].device
        fused = torch.zeros(len(bits), self.settings.embedding, device=device)
        for kind in sorted(set(bits)):
            rows = torch.tensor(
                [row for row, shown in enumerate(bits) if shown == kind], device=device
            )
            named = {
                name: value.index_select(0, rows)
                for name, value in features.items()
                if isinstance(value, Tensor)
            }
            vectors = [self.towers[name].encode(name, named) for name in BITS if kind & BITS[name]]
            fused = fused.index_copy(0, rows, mean_of_units(vectors).to(fused.dtype))
        return features | {"sentence_embedding": fused}

    def save(self, output_path: str, *_: object, **__: object) -> None:
        raise NotImplementedError("export it again with sailplan")

    @classmethod
    def load(cls, model_name_or_path: str, **options: object) -> PublishedEncoder:
        names = ("token", "revision", "cache_folder", "local_files_only")
        where = {name: options[name] for name in names if options.get(name) is not None}
        taken = {
            "cache_dir" if name == "cache_folder" else name: value for name, value in where.items()
        }
        file = cls.load_file_path(model_name_or_path, SETTINGS, **where)
        with open(str(file), encoding="utf-8") as opened:
            settings = SimpleNamespace(**json.load(opened))
        # Folder of a model, "" the whole one -> its settings.
        models = {
            folder: SimpleNamespace(**values)
            for folder, values in getattr(settings, "towers", {"": vars(settings)}).items()
        }
        towers: dict[str, PublishedTower] = {}
        opened_for: dict[str, object] = {"text": None, "vision": None, "audio": None}
        reads: SimpleNamespace | None = None
        for folder, own in models.items():
            own.prompts = {
                name: PromptTemplate(**template) for name, template in own.prompts.items()
            }
            reads = own if "text" in own.modalities else reads or own
            at = taken | {"subfolder": folder}
            model = transformers.AutoModel.from_pretrained(
                model_name_or_path, **at, **(options.get("model_kwargs") or {})
            )
            if getattr(model.config, "is_encoder_decoder", False) and not hasattr(
                model, "get_text_features"
            ):
                model = model.get_encoder()
            projection = None
            if own.projection:
                held = cls.load_file_path(model_name_or_path, PROJECTION, subfolder=folder, **where)
                weight = safetensors.torch.load_file(str(held))["weight"]
                projection = nn.Linear(weight.size(1), weight.size(0), bias=False)
                projection.weight.data = weight
            tower = PublishedTower(own, model.eval(), projection)
            for modality in own.modalities:
                towers[modality] = tower
                named = {
                    "text": "AutoTokenizer",
                    "vision": own.image_processor,
                    "audio": "AutoFeatureExtractor",
                }[modality]
                opened_for[modality] = getattr(transformers, named).from_pretrained(
                    model_name_or_path, **at
                )
        rows: Rows | Sequences
        if reads.media_as_text:
            reads.source, reads.revision = model_name_or_path, taken.get("revision")
            reads.options, reads.image_processor_options = {}, {}
            rows = Sequences(settings, reads, opened_for["text"], opened_for["audio"])
        else:
            rows = Rows(settings, reads, *opened_for.values())
        return cls(settings, towers, rows)
