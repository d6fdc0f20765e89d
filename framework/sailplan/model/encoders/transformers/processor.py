"""Rows as a published model's tensors: texts through its tokenizer, pictures through its own
processor, recordings through its own feature extractor.

Shape legend: b rows, t tokens, f pictures a row, c chunks of sound a row.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sailplan.config.schema import Config, ViewConfig
from sailplan.data.config import MODALITIES
from sailplan.data.processor import Processor, ViewRow
from sailplan.data.record import NamedInputs
from sailplan.model.encoders.transformers.config import TransformersConfig
from sailplan.model.encoders.transformers.files import (
    open_feature_extractor,
    open_image_processor,
    open_tokenizer,
)
from sailplan.model.encoders.transformers.prompts import PublishedTokenizer
from sailplan.model.encoders.transformers.recordings import Recordings

PRESENT = {
    modality: f"{modality}_present" for modality in MODALITIES
}  # ours, beside the model's own tensors: what a row has
ROWS = "rows"  # ours too: which rows of `sequences` show anything, bool [b]
RECORDINGS, LENGTHS = "audio_features", "audio_lengths"  # ours: models name them differently


class NoTokens:
    """The tokenizer of a model that reads no text."""

    digest = "no_texts"
    masked, pad = False, 0

    def counts(self, texts: Sequence[str]) -> list[int]:
        return [0] * len(texts)

    def overhead(self, prompt: str) -> int:
        return 0

    def texts(self, texts: Sequence[str], prompt: str) -> list[list[int]]:
        return [[] for _ in texts]


class TransformersProcessor(Processor):
    """Tensors named as the model's forward names them."""

    tokenizer: PublishedTokenizer | NoTokens  # type: ignore[assignment]

    def __init__(
        self,
        settings: TransformersConfig,
        config: Config,
        *,
        pictures: TransformersConfig | None = None,
        recordings: TransformersConfig | None = None,
    ) -> None:
        """pictures, recordings: of other models, which see and hear them.

        Raises ConfigurationError where a model's files cannot be had.
        """
        self.settings, self.data = settings, config.data
        self.max_tokens, self.frames = config.data.max_tokens, config.data.frames
        self.tokenizer = (
            PublishedTokenizer(open_tokenizer(settings), settings, self.max_tokens)
            if "text" in settings.modalities
            else NoTokens()
        )
        seeing, hearing = pictures or settings, recordings or settings
        self._picture_processor = (
            open_image_processor(seeing) if "vision" in seeing.modalities else None
        )
        self._recordings = (
            Recordings(open_feature_extractor(hearing), config.data)
            if "audio" in hearing.modalities
            else None
        )
        self.chunks = config.data.audio_chunks
        if self._recordings is not None:
            self.audio_rate = self._recordings.rate

    def picture(self, pixels: Tensor) -> Tensor:
        """Return float32 [3, height, width], as the model's picture processor makes it."""
        assert self._picture_processor is not None, (
            "check_run allows no view of pictures without it"
        )
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        return torch.as_tensor(
            np.asarray(self._picture_processor(images=picture)["pixel_values"][0]),
            dtype=torch.float32,
        )

    def sound(
        self, item_id: str, content: bytes, source: random.Random | None, strength: float
    ) -> Tensor:
        """Return float32 [c, ...], as the model's feature extractor makes them."""
        assert self._recordings is not None, "check_run allows no view of sound without it"
        return self._recordings.features(item_id, content, source, self.decoded)

    def overhead(self, view: ViewConfig) -> int:
        return self.tokenizer.overhead(view.prompt) if "text" in view.modalities else 0

    def tokens(self, rows: Sequence[ViewRow], view: ViewConfig) -> list[list[int]]:
        """Return the ids of whole rows, prompt and special tokens included."""
        return (
            self.tokenizer.texts([row.text for row in rows], view.prompt)
            if "text" in view.modalities
            else [[] for _ in rows]
        )

    def cost(self, row: ViewRow, tokens: int, view: ViewConfig) -> int:
        return super().cost(row, tokens - self.overhead(view), view)

    def batch(
        self, rows: Sequence[ViewRow], tokens: Sequence[list[int]], view: ViewConfig
    ) -> NamedInputs:
        named: dict[str, Tensor] = {}
        if "text" in view.modalities:
            named |= self._texts(tokens)
            if len(view.modalities) > 1:
                named[PRESENT["text"]] = torch.tensor([bool(row.text) for row in rows])
        if "vision" in view.modalities:
            named |= self._stacked(rows)
        if self._recordings is not None and "audio" in view.modalities:
            named |= self._heard([row.audio for row in rows])
        return NamedInputs(tuple(view.modalities), named)

    def largest(self, modalities: Sequence[str], rows: int) -> NamedInputs:
        named: dict[str, Tensor] = {}
        if "text" in modalities:
            named["input_ids"] = torch.zeros(
                rows, self.max_tokens, dtype=torch.int64
            )  # every token is there: no mask
            if len(modalities) > 1:
                named[PRESENT["text"]] = torch.ones(rows, dtype=torch.bool)
        if "vision" in modalities:
            named["pixel_values"] = torch.zeros(rows, self.frames, *self._picture_shape)
            named[PRESENT["vision"]] = torch.ones(rows, self.frames, dtype=torch.bool)
        if self._recordings is not None and "audio" in modalities:
            whole = torch.ones(self.chunks, *self._recordings.shape)
            named |= self._heard([whole] * rows)
        return NamedInputs(tuple(modalities), named)

    @cached_property
    def _picture_shape(self) -> tuple[int, ...]:
        """Shape of every picture: what the processor makes of a white one."""
        assert self._picture_processor is not None
        white = Image.fromarray(np.full((64, 64, 3), 255, dtype=np.uint8))
        return tuple(np.asarray(self._picture_processor(images=white)["pixel_values"][0]).shape)

    def _stacked(self, rows: Sequence[ViewRow]) -> dict[str, Tensor]:
        """pixel_values float32 [b, f, 3, height, width] and which of them are there, bool [b,
        f].
        """
        frames = max((len(row.images) for row in rows), default=0) or 1
        pixels = torch.zeros(len(rows), frames, *self._picture_shape)
        present = torch.zeros(len(rows), frames, dtype=torch.bool)
        for place, row in enumerate(rows):
            for frame, picture in enumerate(row.images):
                pixels[place, frame] = picture
            present[place, : len(row.images)] = True
        return {"pixel_values": pixels, PRESENT["vision"]: present}

    def _heard(self, recordings: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Features float32 [b, c, ...], which chunks are there, and where the extractor has a
        mask of samples how many of a chunk's are not padding.
        """
        assert self._recordings is not None
        features, present = self._recordings.stacked(recordings)
        named = {RECORDINGS: features, PRESENT["audio"]: present}
        if self._recordings.masked:
            named[LENGTHS] = self._recordings.lengths(features)
        return named

    def _texts(self, tokens: Sequence[list[int]]) -> dict[str, Tensor]:
        """input_ids and attention_mask int64 [b, t]; a row without a token has one, as attention
        needs something to look at.
        """
        width = (
            max(1, max(map(len, tokens), default=1))
            if self.settings.padding == "longest"
            else self.max_tokens
        )
        ids = torch.full((len(tokens), width), self.tokenizer.pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, own in enumerate(tokens):
            ids[row, : len(own)] = torch.tensor(own, dtype=torch.int64)
            mask[row, : max(1, len(own))] = 1
        return (
            {"input_ids": ids, "attention_mask": mask}
            if self.tokenizer.masked
            else {"input_ids": ids}
        )
