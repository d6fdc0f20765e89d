"""Rows of a model that reads pictures and sound as positions of its text's sequence, through its own
processor: Qwen's vision-language models, LLaVA, PaliGemma, models that listen, and their like.

A row is one text with a mark for each picture and recording: template, marks, the item's text. The
published processor makes the marks as many positions as the model wants. A row that is too long loses
tokens of its own text, never of its media.

Shape legend: b rows, t positions, s samples of sound.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sailplan.config.fields import JsonObject
from sailplan.config.schema import Config, ViewConfig
from sailplan.data.cache import ByteCache
from sailplan.data.processor import ViewRow
from sailplan.data.record import NamedInputs
from sailplan.errors import ConfigurationError
from sailplan.model.encoders.transformers.config import PromptTemplate, TransformersConfig
from sailplan.model.encoders.transformers.files import WORDS, open_processor
from sailplan.model.encoders.transformers.processor import ROWS, TransformersProcessor
from sailplan.model.encoders.transformers.prompts import PublishedTokenizer

LARGEST_SIDE = 2048  # pixels: of pictures that are as large as any that is reckoned with


class SequenceProcessor(TransformersProcessor):
    """Tensors named as the model's forward names them, and ROWS.

    They have one row more where no row has a picture, or a recording, that the view could show:
    every rank runs the same parts of the model.
    """

    tokenizer: PublishedTokenizer

    def __init__(self, settings: TransformersConfig, config: Config) -> None:
        """Raise ConfigurationError for a model without texts, and recordings that the extractor
        would cut.
        """
        if "text" not in settings.modalities:
            raise ConfigurationError(
                f"model.modalities={list(settings.modalities)}: expected text too, as "
                f"{settings.source} reads the others within its text; add text"
            )
        super().__init__(settings, config)
        self._published = open_processor(settings)
        self._lengths: ByteCache[int] = ByteCache(1 << 20)
        self._prompts: dict[tuple[str, int, int], PromptTemplate] = {}
        if self._recordings is not None:
            self._recordings.check_whole()

    def picture(self, pixels: Tensor) -> Tensor:
        """Return the picture as it is, uint8 [3, height, width]: the processor sees it with its
        text.
        """
        return pixels

    def sound(
        self, item_id: str, content: bytes, source: random.Random | None, strength: float
    ) -> Tensor:
        """Return float32 [1, s]."""
        assert self._recordings is not None, "check_run allows no view of sound without it"
        return torch.from_numpy(self._recordings.whole(item_id, content, source))[None]

    def overhead(self, view: ViewConfig) -> int:
        return self.tokenizer.overhead(view.prompt)

    def tokens(self, rows: Sequence[ViewRow], view: ViewConfig) -> list[list[int]]:
        """Return as many zeros as a row has positions: the ids come with the media, in `batch`."""
        if list(view.modalities) == ["text"]:
            return super().tokens(rows, view)
        texts = self.tokenizer.texts([row.text for row in rows], view.prompt)
        return [
            [0] * (len(ids) + self._media_tokens(row)) for row, ids in zip(rows, texts, strict=True)
        ]

    def batch(
        self, rows: Sequence[ViewRow], tokens: Sequence[list[int]], view: ViewConfig
    ) -> NamedInputs:
        if list(view.modalities) == ["text"]:
            return super().batch(rows, tokens, view)
        every = list(rows)
        pictures = any(row.images for row in rows) or "vision" not in view.modalities
        sounds = any(row.audio is not None for row in rows) or "audio" not in view.modalities
        if not rows or not pictures or not sounds:
            every.append(self._filler(view.modalities))
        return NamedInputs(tuple(view.modalities), self._sequences(every, len(rows), view.prompt))

    def largest(self, modalities: Sequence[str], rows: int) -> NamedInputs:
        if list(modalities) == ["text"]:
            return super().largest(modalities, rows)
        row = self._filler(modalities, LARGEST_SIDE, self.frames)
        named = self._sequences([row] * rows, rows, "")
        spare = self.max_tokens - self.tokenizer.overhead("")
        for name, value in list(named.items()):
            if name != ROWS and value.ndim == 2 and value.shape == named["attention_mask"].shape:
                named[name] = torch.cat([value, value[:, -1:].expand(-1, spare)], 1)
        return NamedInputs(tuple(modalities), named)

    # ---------------------------------------------------------------- parts
    def _filler(self, modalities: Sequence[str], side: int = 64, pictures: int = 1) -> ViewRow:
        """Return a row of white pictures and silence."""
        row = ViewRow()
        if "vision" in modalities:
            row.images = (torch.full((3, side, side), 255, dtype=torch.uint8),) * pictures
        if "audio" in modalities:
            assert self._recordings is not None
            row.audio = torch.zeros(1, self._recordings.length * self.chunks)
        return row

    def _sequences(self, rows: Sequence[ViewRow], count: int, prompt: str) -> dict[str, Tensor]:
        """Return the model's tensors of all rows, and ROWS of the first `count`."""
        given: JsonObject = {
            "text": [self._written(row, prompt) for row in rows],
            "add_special_tokens": self.settings.special_tokens,
        }
        images = [
            [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in row.images] for row in rows
        ]
        if any(images):
            given["images"] = images
        sounds = [np.asarray(row.audio[0]) for row in rows if row.audio is not None]
        if sounds:
            given |= {"audio": sounds, "sampling_rate": self.audio_rate}
        made = self._published(**given, padding=True, return_tensors="pt")
        shown = [bool(row.text or row.images or row.audio is not None) for row in rows[:count]]
        return {ROWS: torch.tensor(shown, dtype=torch.bool), **made}

    def _written(self, row: ViewRow, prompt: str) -> str:
        template = self._around(prompt, len(row.images), int(row.audio is not None))
        text = self.tokenizer.fitting(row.text, prompt)
        return template.before + template.middle + text + template.after

    def _around(self, prompt: str, pictures: int, sounds: int) -> PromptTemplate:
        """Return what stands round a text beside so many pictures and recordings."""
        key = (prompt, pictures, sounds)
        if key not in self._prompts:
            found = self.tokenizer.named(prompt)
            if self.settings.chat_template:
                kinds = [*[{"type": "image"}] * pictures, *[{"type": "audio"}] * sounds]
                self._prompts[key] = self.tokenizer.in_chat(found, kinds, self._published)
            else:
                marks = self._mark("vision") * pictures + self._mark("audio") * sounds
                self._prompts[key] = PromptTemplate(found.before + marks, found.middle, found.after)
        return self._prompts[key]

    def _mark(self, modality: str) -> str:
        if modality not in self.settings.modalities:
            return ""
        own = getattr(self._published, f"{WORDS[modality]}_token", None)
        mark = self.settings.media_marks.get(modality, own)
        if mark is None:
            raise ConfigurationError(
                f"model.media_marks has no {modality}, and {self.settings.source} names no such "
                f"token: expected what stands for one in a text; set model.media_marks.{modality}, "
                "or model.chat_template=true"
            )
        return str(mark)

    def _media_tokens(self, row: ViewRow) -> int:
        """Return the positions that media take: they depend on sizes alone."""
        sizes = [tuple(one.shape[1:]) for one in row.images]
        key = repr((sizes, 0 if row.audio is None else row.audio.size(1)))
        known = self._lengths.get(key)
        if known is None:
            alone = ViewRow(images=row.images, audio=row.audio)
            width = int(self._sequences([alone], 1, "")["input_ids"].size(1))
            known = max(0, width - self.tokenizer.overhead(""))
            self._lengths.put(key, known, 200 + len(key))
        return known
