"""A trained published model as a module of sentence-transformers, where its own modules do not
say all: texts and pictures
of a model with a tower for each, templates with text after the item's, other poolings."""

# A template: what it lacks or overrides comes together when `export.bundle` writes it.
# mypy: disable-error-code="arg-type, attr-defined, override"
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
from sailplan.export.standalone.media import pixels
from sailplan.model.encoders.transformers.config import PromptTemplate
from sailplan.model.encoders.transformers.module import mean_of_units
from sailplan.model.encoders.transformers.processor import PRESENT, NoTokens
from sailplan.model.encoders.transformers.prompts import PublishedTokenizer

SETTINGS, PROJECTION = "sailplan_encoder.json", "projection.safetensors"
NAMES = {modality: key for key, modality in KEYS.items()}
TransformersConfig = SimpleNamespace


class Rows:
    """Rows of named tensors."""

    def __init__(self, settings: Any, tokenizer: Any, pictures: Any) -> None:
        self.settings, self.max_tokens, self._picture_processor = (
            settings,
            settings.max_tokens,
            pictures,
        )
        self.tokenizer = (
            PublishedTokenizer(tokenizer, settings, settings.max_tokens)
            if tokenizer is not None
            else NoTokens()
        )


class PublishedEncoder(InputModule):
    """Items to `sentence_embedding` [b, D]."""

    def __init__(
        self,
        settings: Any,
        model: nn.Module,
        tokenizer: Any,
        pictures: Any,
        projection: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.model, self.projection = settings, model, projection
        self.rows = Rows(settings, tokenizer, pictures)
        self.tokenizer = tokenizer
        self.compute_dtype = None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def modalities(self) -> list[Any]:
        keys = [NAMES[modality] for modality in self.settings.modalities]
        return [
            *keys,
            *permutations(keys, 2),
            *(["message"] if len(keys) > 1 else []),
        ]  # the last: unlike items in a batch

    @property
    def max_seq_length(self) -> int:
        return int(self.settings.max_tokens)

    def get_embedding_dimension(self) -> int:
        return int(self.settings.embedding)

    def preprocess(self, inputs: list[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        rows = [by_modality(item) for item in inputs]
        shown = [sum(BITS[name] for name in row) for row in rows]
        for row in rows:
            if not set(row) <= set(self.settings.modalities):
                raise ValueError(
                    f"an item shows {', '.join(row)}: expected some of "
                    f"{', '.join(self.settings.modalities)}"
                )
        found: dict[str, Any] = {"modalities": torch.tensor(shown)}
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
        return found

    def _frames(self, shown: Any) -> list[Tensor]:
        several = (
            list(shown) if isinstance(shown, (list, tuple)) else [] if shown is None else [shown]
        )
        images = [
            Image.fromarray(pixels(picture).permute(1, 2, 0).numpy())
            for picture in several[: self.settings.frames]
        ]
        return [
            torch.as_tensor(
                np.asarray(self.rows._picture_processor(images=one)["pixel_values"][0]),
                dtype=torch.float32,
            )
            for one in images
        ]

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
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
            vectors = [self.encode(name, named) for name in BITS if kind & BITS[name]]
            fused = fused.index_copy(0, rows, mean_of_units(vectors).to(fused.dtype))
        return features | {"sentence_embedding": fused}

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        raise NotImplementedError("export it again with sailplan")

    @classmethod
    def load(cls, model_name_or_path: str, **options: Any) -> PublishedEncoder:
        taken = {
            name: options[name]
            for name in ("token", "revision", "local_files_only")
            if options.get(name) is not None
        }
        if options.get("cache_folder"):
            taken["cache_dir"] = options["cache_folder"]
        where = {
            key: options[key]
            for key in ("token", "revision", "cache_folder", "local_files_only")
            if key in options
        }
        file = cls.load_file_path(model_name_or_path, SETTINGS, **where)
        with open(str(file), encoding="utf-8") as opened:
            values = json.load(opened)
        settings = SimpleNamespace(**values)
        settings.prompts = {
            name: PromptTemplate(**template) for name, template in values["prompts"].items()
        }
        model = transformers.AutoModel.from_pretrained(
            model_name_or_path, **taken, **(options.get("model_kwargs") or {})
        )
        tokenizer = (
            transformers.AutoTokenizer.from_pretrained(model_name_or_path, **taken)
            if "text" in settings.modalities
            else None
        )
        pictures = None
        if "vision" in settings.modalities:
            pictures = getattr(transformers, settings.image_processor).from_pretrained(
                model_name_or_path, **taken
            )
        projection = None
        if settings.projection:
            held = cls.load_file_path(model_name_or_path, PROJECTION, **where)
            weight = safetensors.torch.load_file(str(held))["weight"]
            projection = nn.Linear(weight.size(1), weight.size(0), bias=False)
            projection.weight.data = weight
        return cls(settings, model.eval(), tokenizer, pictures, projection)
