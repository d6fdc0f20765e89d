"""Items (text, pictures, sound, or dicts of them) as the tensors of the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from sailplan.data.audio import FUSED, SPECTROGRAMS, chunks, fused
from sailplan.data.image import patch_grid, resized, to_patches
from sailplan.data.text import clean
from sailplan.export.standalone.items import BITS, by_modality
from sailplan.export.standalone.media import pixels, samples_of
from sailplan.model.encoders.omni.pictures import PictureProcessor, open_processor_of, sized


@lru_cache
def opened(settings: str) -> PictureProcessor | None:
    """Return the picture processor of settings written as JSON."""
    return open_processor_of(json.loads(settings))


class SailplanProcessor(ProcessorMixin):
    """inputs: how texts are cut, pictures sized and sound turned into spectrograms, as in
    training.
    """

    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        inputs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        **options: object,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.inputs = dict(inputs or {})

    @property
    def max_tokens(self) -> int:
        return int(self.inputs["max_tokens"])

    def __call__(
        self,
        text: object = None,
        images: object = None,
        audio: object = None,
        prompt: str = "",
        **_: object,
    ) -> BatchFeature:
        """Return the tensors of rows; each given argument is a list with an entry (or None) a
        row, or one row's.
        """
        given = {
            name: value
            for name, value in (("text", text), ("image", images), ("audio", audio))
            if value is not None
        }
        if not given:
            raise ValueError("found neither text, images nor audio: expected at least one of them")
        several = {name: value for name, value in given.items() if isinstance(value, (list, tuple))}
        single = len(several) < len(given)
        columns = {
            name: [value] if single else list(several[name]) for name, value in given.items()
        }
        return self.items(
            [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
            prompt=prompt,
        )

    def items(self, items: Sequence[object], prompt: str = "") -> BatchFeature:
        """Return the tensors of items, each a text, a picture, sound, or a dict with some of
        text, image and audio.

        A dict's keys say what the row shows; a value may be None. Paths of pictures and sound are
        read. prompt: what stands before the text, also of items without text.
        """
        rows = [by_modality(item) for item in items]
        shown = [sum(BITS[name] for name in row) for row in rows]
        found = self._texts([row.get("text") or "" for row in rows], prompt)
        found["modalities"] = torch.tensor(shown)
        if any("vision" in row for row in rows):
            found |= self._pictures([self._frames(row.get("vision")) for row in rows])
        if any("audio" in row for row in rows):
            found |= self._sounds(
                [self._mel(row["audio"]) if row.get("audio") is not None else None for row in rows]
            )
        return BatchFeature(found)

    # ---------------------------------------------------------------- parts
    def _texts(self, texts: Sequence[str], prompt: str) -> dict[str, Tensor]:
        head = self._ids([clean(prompt)])[0] if prompt else []
        room = self.max_tokens - len(head)
        if room < 4:
            raise ValueError(
                f"the prompt {prompt!r} takes {len(head)} of {self.max_tokens} tokens: shorten it"
            )
        own = [ids[:room] for ids in self._ids([clean(text) for text in texts])]
        length = max(1, len(head) + max(map(len, own), default=0))
        ids, mask, text = (torch.zeros(len(texts), length, dtype=torch.int64) for _ in range(3))
        for row, tokens in enumerate(own):
            stop = len(head) + len(tokens)
            ids[row, :stop] = torch.tensor([*head, *tokens], dtype=torch.int64)
            mask[row, :stop] = 1
            text[row, len(head) : stop] = 1
        return {"input_ids": ids, "attention_mask": mask, "text_mask": text}

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [
            list(ids)
            for ids in self.tokenizer(
                texts, add_special_tokens=False, padding=False, truncation=False
            )["input_ids"]
        ]

    def _frames(self, pictures: object) -> list[Tensor]:
        """uint8 [3, height, width] of each picture, at most the trained number."""
        several = (
            list(pictures)
            if isinstance(pictures, (list, tuple))
            else []
            if pictures is None
            else [pictures]
        )
        return [self._sized(pixels(picture)) for picture in several[: self.inputs["frames"]]]

    def _sized(self, picture: Tensor) -> Tensor:
        published = opened(json.dumps(self.inputs.get("picture_processor") or {}))
        if published is not None:
            return sized(published, picture)
        patch, most, size = (
            self.inputs["image_patch"],
            self.inputs["image_patches"],
            self.inputs["image_size"],
        )
        if most is None:
            return resized(picture, size, size)
        down, across = patch_grid(picture.size(1), picture.size(2), patch, most)
        return resized(picture, down * patch, across * patch)

    def _pictures(self, rows: list[list[Tensor]]) -> dict[str, Tensor]:
        if self.inputs["image_patches"] is not None:
            patches, sizes = to_patches(
                rows, self.inputs["image_patch"], self.inputs["image_patches"]
            )
            return {"pixel_values": patches, "pixel_mask": sizes.prod(-1) > 0, "pixel_sizes": sizes}
        size, frames = self.inputs["image_size"], max((len(row) for row in rows if row), default=1)
        stacked = torch.zeros(len(rows), frames, 3, size, size, dtype=torch.uint8)
        mask = torch.zeros(len(rows), frames, dtype=torch.bool)
        for place, row in enumerate(rows):
            for frame, picture in enumerate(row):
                stacked[place, frame] = picture
            mask[place, : len(row)] = True
        return {"pixel_values": stacked, "pixel_mask": mask}

    def _mel(self, sound: Any) -> Tensor:
        """float16 spectrograms [c, frames, bins]."""
        front, rate, bins = (
            SPECTROGRAMS[self.inputs["spectrogram"]],
            self.inputs["audio_rate"],
            self.inputs["mel_bins"],
        )
        samples, length = samples_of(sound, rate), round(self.inputs["audio_chunk_seconds"] * rate)
        if front.whole:
            waves = (
                chunks(samples, length, 1, repeat=front.repeat)
                if len(samples) < length
                else samples[None]
            )
            frames = front.frames(self.inputs["audio_chunk_seconds"], rate)
            return fused(front.make(waves, rate=rate, bins=bins)[0].half(), frames)
        waves = chunks(samples, length, self.inputs["audio_chunks"], repeat=front.repeat)
        return front.make(waves, rate=rate, bins=bins).half()

    def _sounds(self, rows: list[Tensor | None]) -> dict[str, Tensor]:
        front = SPECTROGRAMS[self.inputs["spectrogram"]]
        most = (
            FUSED if front.whole else max((len(row) for row in rows if row is not None), default=1)
        )
        frames = front.frames(self.inputs["audio_chunk_seconds"], self.inputs["audio_rate"])
        mels = torch.zeros(len(rows), most, frames, self.inputs["mel_bins"], dtype=torch.float16)
        mask = torch.zeros(len(rows), most, dtype=torch.bool)
        for place, row in enumerate(rows):
            if row is not None:
                mels[place, : len(row)] = row
                mask[place, : len(row)] = True
        return {"audio_values": mels, "audio_mask": mask}
