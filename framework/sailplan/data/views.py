"""One item shown in one view: decode what the view asks for, nothing else; then stack rows into encoder inputs.

The same two calls serve training (with the row's seed: augmentation, language and field choice) and evaluation
(without): `row` decodes one item, `inputs` stacks rows of a view into one micro-batch. Pictures stay uint8, and spectrograms
float16, up to the device.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.config.schema import DataConfig, DatasetConfig, ViewConfig
from sailplan.data import audio, image
from sailplan.data.cache import ByteCache
from sailplan.data.reader import BadSample
from sailplan.data.record import EncoderInputs, Item
from sailplan.data.text import Tokenizer, compose
from sailplan.runtime.seeds import derive

DECODED_BYTES = 128 << 20  # pictures and spectrograms kept between epochs, per process
_DECODERS: dict[object, ViewDecoder] = {}


@dataclass(slots=True)
class ViewRow:
    """An item decoded for a view. f frames and c chunks as the item has them, at most the configured numbers."""

    id: int = -1  # the same document, or for text-only views the same text; -1: not valid
    text: str = ""
    images: tuple[Tensor, ...] = ()  # f of uint8 [3, size, size], or with data.image_patches of [3, height, width], each its own
    augmentation: tuple[float, ...] | None = None
    audio: Tensor | None = None  # float16 [c, frames, mels]; of data.spectrogram=clap_fusion c is 4 for a sound longer than a chunk, else 1

    @property
    def valid(self) -> bool:
        """False where the item has none of the view's modalities, or there is no item."""
        return self.id >= 0


class ViewDecoder:
    """Decoding for a run's data configuration; keeps decoded media of at most 128 MB."""

    def __init__(self, config: DataConfig) -> None:
        """Raises ConfigurationError when the tokenizer cannot be read."""
        self.config = config
        self.spectrogram = audio.SPECTROGRAMS[config.spectrogram]
        self.tokenizer = Tokenizer(config.tokenizer, config.max_tokens)
        self._decoded: ByteCache[Tensor] = ByteCache(DECODED_BYTES)

    def row(self, item: Item | None, view: ViewConfig, dataset: DatasetConfig, seed: int | None = None, text: str | None = None) -> ViewRow:
        """Decode an item for a view.

        seed: draws the row's language, fields and augmentation; None: evaluation, nothing is drawn. text: taken
        instead of the item's fields. Raises BadSample for media that cannot be decoded.
        """
        if item is None:
            return ViewRow()
        source = random.Random(seed) if seed is not None else None
        row = ViewRow()
        if "text" in view.modalities:
            row.text = compose(item.fields, view, dataset, seed) if text is None else text
        strength = dataset.image_augmentation if source is not None else 0.0
        if "vision" in view.modalities and item.images:
            row.images = tuple(self._image(item.id, content) for content in item.images[: self.config.frames])
            if source is not None and strength > 0:
                row.augmentation = image.draw_augmentation(source, strength)
        if "audio" in view.modalities and item.audio is not None:
            row.audio = self._audio(item.id, item.audio, source, strength)
        if row.text or row.images or row.audio is not None:
            text_only = list(view.modalities) == ["text"]
            row.id = derive("text", row.text.casefold()) if text_only else derive("document", item.id)
        return row

    def tokens(self, rows: Sequence[ViewRow], view: ViewConfig) -> list[list[int]]:
        """Token ids of each row's own text (without the prompt), cut to max_tokens."""
        return self.tokenizer.texts([row.text for row in rows], view.prompt)

    def inputs(self, rows: Sequence[ViewRow], tokens: Sequence[list[int]], view: ViewConfig) -> EncoderInputs:
        """Stack rows (with their `tokens`) into one micro-batch; shapes as in EncoderInputs."""
        prompt = self.tokenizer.prompt(view.prompt)
        length = max(1, len(prompt) + max((len(ids) for ids in tokens), default=0))
        ids = np.zeros((len(rows), length), dtype=np.int64)
        ids[:, : len(prompt)] = prompt
        places, sizes = np.arange(length)[None], np.array([len(prompt) + len(own) for own in tokens], dtype=np.int64)[:, None]
        for row, own in enumerate(tokens):
            ids[row, len(prompt) : len(prompt) + len(own)] = own
        mask = places < sizes
        result = EncoderInputs(
            modalities=tuple(view.modalities),
            token_ids=torch.from_numpy(ids),
            token_mask=torch.from_numpy(mask),
            text_mask=torch.from_numpy(mask & (places >= len(prompt))),
        )
        if "vision" in view.modalities:
            result.images, result.image_mask, result.image_sizes = self._stack_images(rows)
            result.image_augmentation = image.augmentation_table([row.augmentation for row in rows])
        if "audio" in view.modalities:
            result.audio, result.audio_mask = self._stack_audio(rows)
        return result

    # ---------------------------------------------------------------- parts
    def _image(self, item_id: str, content: bytes) -> Tensor:
        known = self._decoded.get(content)
        if known is None:
            try:
                if self.config.image_patches is not None and self.config.image_patch is not None:
                    known = image.decode_in_ratio(content, self.config.image_patch, self.config.image_patches)
                else:
                    known = image.decode(content, self.config.image_size)
            except ValueError as error:
                raise BadSample(item_id, str(error)) from error
            self._decoded.put(content, known, known.nbytes + len(content))
        return known

    def _audio(self, item_id: str, content: bytes, source: random.Random | None, strength: float) -> Tensor:
        """float16 log-mel [c, frames, mels]. Kept decoded: the spectrogram, or of a recording longer than its chunks,
        which starts elsewhere each time, the samples."""
        length = round(self.config.audio_chunk_seconds * self.config.audio_rate)
        if self.spectrogram.whole:
            pictures = audio.fused(self._whole(item_id, content, length), self._frames, source)
            return pictures if source is None or strength <= 0 else audio.augment(pictures.float(), source, strength, self.spectrogram).half()
        mel = self._decoded.get(content)
        if mel is None or mel.dtype != torch.float16:
            samples = mel.numpy() if mel is not None else self._samples(item_id, content)
            waves = audio.chunks(samples, length, self.config.audio_chunks, source, repeat=self.spectrogram.repeat)
            mel = self.spectrogram.make(waves, rate=self.config.audio_rate, bins=self.config.mel_bins).half()
            kept = mel if len(samples) <= length * self.config.audio_chunks else torch.from_numpy(samples)
            self._decoded.put(content, kept, kept.nbytes + len(content))
        if source is None or strength <= 0:
            return mel
        return audio.augment(mel.float(), source, strength, self.spectrogram).half()

    def _whole(self, item_id: str, content: bytes, length: int) -> Tensor:
        """float16 spectrogram [all frames, mels] of a recording, of at least `length` samples."""
        known = self._decoded.get(content)
        if known is None:
            samples = self._samples(item_id, content)
            waves = audio.chunks(samples, length, 1, repeat=self.spectrogram.repeat) if len(samples) < length else samples[None]
            known = self.spectrogram.make(waves, rate=self.config.audio_rate, bins=self.config.mel_bins)[0].half()
            self._decoded.put(content, known, known.nbytes + len(content))
        return known

    @property
    def _frames(self) -> int:
        return self.spectrogram.frames(self.config.audio_chunk_seconds, self.config.audio_rate)

    def _samples(self, item_id: str, content: bytes) -> NDArray[np.float32]:
        try:
            return audio.decode(content, self.config.audio_rate)
        except ValueError as error:
            raise BadSample(item_id, str(error)) from error

    def _stack_images(self, rows: Sequence[ViewRow]) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.config.image_patches is not None and self.config.image_patch is not None:
            patches, sizes = image.to_patches([row.images for row in rows], self.config.image_patch, self.config.image_patches)
            return patches, sizes.prod(-1) > 0, sizes
        size, frames = self.config.image_size, max((len(row.images) for row in rows if row.images), default=1)
        pixels = torch.zeros(len(rows), frames, 3, size, size, dtype=torch.uint8)
        mask = torch.zeros(len(rows), frames, dtype=torch.bool)
        for place, row in enumerate(rows):
            for frame, picture in enumerate(row.images):
                pixels[place, frame] = picture
            mask[place, : len(row.images)] = True
        return pixels, mask, None

    def _stack_audio(self, rows: Sequence[ViewRow]) -> tuple[Tensor, Tensor]:
        # All four of a fusion, whatever the rows have: what is computed must not depend on them.
        chunks = audio.FUSED if self.spectrogram.whole else max((len(row.audio) for row in rows if row.audio is not None), default=1)
        mels = torch.zeros(len(rows), chunks, self._frames, self.config.mel_bins, dtype=torch.float16)
        mask = torch.zeros(len(rows), chunks, dtype=torch.bool)
        for place, row in enumerate(rows):
            if row.audio is not None:
                mels[place, : len(row.audio)] = row.audio
                mask[place, : len(row.audio)] = True
        return mels, mask


def shared_decoder(config: DataConfig) -> ViewDecoder:
    """The process's decoder for these decoding options: stages and evaluations share what is decoded already."""
    options = (config.tokenizer, config.max_tokens, config.image_size, config.image_patches, config.image_patch, config.frames)
    sound = (config.audio_rate, config.audio_chunk_seconds, config.audio_chunks, config.mel_bins, config.spectrogram)
    if (options, sound) not in _DECODERS:
        _DECODERS.clear()  # one at a time: its caches are large
        _DECODERS[options, sound] = ViewDecoder(config)
    return _DECODERS[options, sound]
