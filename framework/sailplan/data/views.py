"""One item shown in one view: decode what the view asks for, nothing else; then stack rows into
encoder inputs.

The same two calls serve training (with the row's seed: augmentation, language and field choice) and
evaluation (without): `row` decodes one item, `batch` stacks rows of a view into one micro-batch.
Pictures stay uint8, and spectrograms float16, up to the device.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.config.schema import DataConfig, ViewConfig
from sailplan.data import audio, image, video
from sailplan.data.packing import OmniInputs
from sailplan.data.processor import Processor, ViewRow
from sailplan.data.reader import BadSample
from sailplan.data.text import Tokenizer


class ViewDecoder(Processor):
    """Decoding for a run's data configuration; keeps decoded media of at most 128 MB."""

    tokenizer: Tokenizer

    def __init__(self, config: DataConfig) -> None:
        """Raises ConfigurationError when the tokenizer cannot be read."""
        self.config = config
        self.spectrogram = audio.SPECTROGRAMS[config.spectrogram]
        self.tokenizer = Tokenizer(config.tokenizer, config.max_tokens)
        self.audio_rate = config.audio_rate
        self.max_tokens, self.frames, self.chunks = (
            config.max_tokens,
            config.frames,
            config.audio_chunks,
        )

    def overhead(self, view: ViewConfig) -> int:
        return len(self.tokenizer.prompt(view.prompt))

    def tokens(self, rows: Sequence[ViewRow], view: ViewConfig) -> list[list[int]]:
        """Token ids of each row's own text (without the prompt), cut to max_tokens."""
        return self.tokenizer.texts([row.text for row in rows], view.prompt)

    def batch(
        self, rows: Sequence[ViewRow], tokens: Sequence[list[int]], view: ViewConfig
    ) -> OmniInputs:
        """Stack rows (with their `tokens`) into one micro-batch; shapes as in OmniInputs."""
        prompt = self.tokenizer.prompt(view.prompt)
        length = max(1, len(prompt) + max((len(ids) for ids in tokens), default=0))
        ids = np.zeros((len(rows), length), dtype=np.int64)
        ids[:, : len(prompt)] = prompt
        places, sizes = (
            np.arange(length)[None],
            np.array([len(prompt) + len(own) for own in tokens], dtype=np.int64)[:, None],
        )
        for row, own in enumerate(tokens):
            ids[row, len(prompt) : len(prompt) + len(own)] = own
        mask = places < sizes
        result = OmniInputs(
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

    def largest(self, modalities: Sequence[str], rows: int) -> OmniInputs:
        return largest_inputs(self.config, modalities, rows)

    # ---------------------------------------------------------------- parts
    def picture(self, pixels: Tensor) -> Tensor:
        if self.config.image_patches is not None and self.config.image_patch is not None:
            return image.in_ratio(pixels, self.config.image_patch, self.config.image_patches)
        return image.squared(pixels, self.config.image_size)

    def sound(
        self, item_id: str, content: bytes, source: random.Random | None, strength: float
    ) -> Tensor:
        """float16 log-mel [c, frames, mels].

        Kept decoded: the spectrogram, or of a recording longer than its chunks,
        which starts elsewhere each time, the samples."""
        length = round(self.config.audio_chunk_seconds * self.config.audio_rate)
        if self.spectrogram.whole:
            pictures = audio.fused(
                self._whole(item_id, content, length), self.spectrogram_frames, source
            )
            return (
                pictures
                if source is None or strength <= 0
                else audio.augment(pictures.float(), source, strength, self.spectrogram).half()
            )
        mel = self.decoded.get(content)
        if mel is None or mel.dtype != torch.float16:
            samples = mel.numpy() if mel is not None else self._samples(item_id, content)
            waves = audio.chunks(
                samples, length, self.config.audio_chunks, source, repeat=self.spectrogram.repeat
            )
            mel = self.spectrogram.make(
                waves, rate=self.config.audio_rate, bins=self.config.mel_bins
            ).half()
            kept = (
                mel
                if len(samples) <= length * self.config.audio_chunks
                else torch.from_numpy(samples)
            )
            self.decoded.put(content, kept, kept.nbytes + len(content))
        if source is None or strength <= 0:
            return mel
        return audio.augment(mel.float(), source, strength, self.spectrogram).half()

    def _whole(self, item_id: str, content: bytes, length: int) -> Tensor:
        """float16 spectrogram [all frames, mels] of a recording, of at least `length` samples."""
        known = self.decoded.get(content)
        if known is None:
            samples = self._samples(item_id, content)
            waves = (
                audio.chunks(samples, length, 1, repeat=self.spectrogram.repeat)
                if len(samples) < length
                else samples[None]
            )
            known = self.spectrogram.make(
                waves, rate=self.config.audio_rate, bins=self.config.mel_bins
            )[0].half()
            self.decoded.put(content, known, known.nbytes + len(content))
        return known

    @property
    def spectrogram_frames(self) -> int:
        return self.spectrogram.frames(self.config.audio_chunk_seconds, self.config.audio_rate)

    def _samples(self, item_id: str, content: bytes) -> NDArray[np.float32]:
        try:
            return audio.decode(content, self.config.audio_rate, video.sound)
        except ValueError as error:
            raise BadSample(item_id, str(error)) from error

    def _stack_images(self, rows: Sequence[ViewRow]) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.config.image_patches is not None and self.config.image_patch is not None:
            patches, sizes = image.to_patches(
                [row.images for row in rows], self.config.image_patch, self.config.image_patches
            )
            return patches, sizes.prod(-1) > 0, sizes
        size, frames = (
            self.config.image_size,
            max((len(row.images) for row in rows if row.images), default=1),
        )
        pixels = torch.zeros(len(rows), frames, 3, size, size, dtype=torch.uint8)
        mask = torch.zeros(len(rows), frames, dtype=torch.bool)
        for place, row in enumerate(rows):
            for frame, picture in enumerate(row.images):
                pixels[place, frame] = picture
            mask[place, : len(row.images)] = True
        return pixels, mask, None

    def _stack_audio(self, rows: Sequence[ViewRow]) -> tuple[Tensor, Tensor]:
        # All four of a fusion, whatever the rows have: what is computed must not depend on them.
        chunks = (
            audio.FUSED
            if self.spectrogram.whole
            else max((len(row.audio) for row in rows if row.audio is not None), default=1)
        )
        mels = torch.zeros(
            len(rows), chunks, self.spectrogram_frames, self.config.mel_bins, dtype=torch.float16
        )
        mask = torch.zeros(len(rows), chunks, dtype=torch.bool)
        for place, row in enumerate(rows):
            if row.audio is not None:
                mels[place, : len(row.audio)] = row.audio
                mask[place, : len(row.audio)] = True
        return mels, mask


def largest_inputs(data: DataConfig, modalities: Sequence[str], rows: int) -> OmniInputs:
    """Return one micro-batch of a view in which every row has all that the configuration lets it
    have, on the CPU, not packed.
    """
    mask = torch.ones(rows, data.max_tokens, dtype=torch.bool)
    inputs = OmniInputs(tuple(modalities), torch.zeros(mask.shape, dtype=torch.int64), mask, mask)
    if "vision" in modalities:
        inputs.image_mask = torch.ones(rows, data.frames, dtype=torch.bool)
        if data.image_patches is not None and data.image_patch is not None:
            inputs.images = torch.zeros(
                rows, data.frames, data.image_patches, 3 * data.image_patch**2, dtype=torch.uint8
            )
            inputs.image_sizes = (
                torch.tensor([1, data.image_patches]).expand(rows, data.frames, 2).contiguous()
            )
        else:
            inputs.images = torch.zeros(
                rows, data.frames, 3, data.image_size, data.image_size, dtype=torch.uint8
            )
    if "audio" in modalities:
        spectrogram = audio.SPECTROGRAMS[data.spectrogram]
        chunks = audio.FUSED if spectrogram.whole else data.audio_chunks
        frames = spectrogram.frames(data.audio_chunk_seconds, data.audio_rate)
        inputs.audio = torch.zeros(rows, chunks, frames, data.mel_bins, dtype=torch.float16)
        inputs.audio_mask = torch.ones(rows, chunks, dtype=torch.bool)
    return inputs
