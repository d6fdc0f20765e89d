"""Recordings as a published model's features: cut into chunks, each through the model's own feature
extractor.

Every chunk has one shape, so that a row's vector does not depend on the rows beside it. What is
drawn, where a long recording begins, follows from the row's seed; the extractor itself draws
nothing, as no chunk is longer than what it takes whole.

Shape legend: b rows, c chunks, s samples of a chunk, `...` what the extractor makes of a chunk.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailplan.config.fields import JsonObject
from sailplan.config.schema import DataConfig
from sailplan.data import audio, video
from sailplan.data.cache import ByteCache
from sailplan.data.values import BadSample
from sailplan.errors import ConfigurationError


class Recordings:
    """Makes float32 [c, ...] of a recording; `decoded` keeps what was made, or its samples."""

    def __init__(self, extractor: Any, data: DataConfig) -> None:
        """Raise ConfigurationError for chunks longer than the extractor takes whole."""
        self.extractor, self.chunks = extractor, data.audio_chunks
        self.rate = int(extractor.sampling_rate)
        self.length = round(data.audio_chunk_seconds * self.rate)
        longest = _longest(extractor)
        self.longest = longest
        if longest is not None and self.length > longest:
            raise ConfigurationError(
                f"data.audio_chunk_seconds={data.audio_chunk_seconds}: expected at most "
                f"{longest / self.rate:g}, what the model's {type(extractor).__name__} takes whole; "
                "use more data.audio_chunks of that length"
            )

    def features(
        self,
        item_id: str,
        content: bytes,
        source: random.Random | None,
        decoded: ByteCache[Tensor],
    ) -> Tensor:
        """Return a recording's chunks [c, ...], at most `chunks`; raises BadSample.

        source: draws where a longer recording begins; None: at its beginning.
        """
        known = decoded.get(content)
        if known is not None and known.shape[1:] == self.shape:
            return known
        samples = known.numpy() if known is not None else self._samples(item_id, content)
        found = self._extracted(self._cut(samples, source))
        long = len(samples) > self.length * self.chunks
        kept = torch.from_numpy(samples) if long else found
        decoded.put(content, kept, kept.nbytes + len(content))
        return found

    def whole(
        self, item_id: str, content: bytes, source: random.Random | None
    ) -> NDArray[np.float32]:
        """Return a recording's samples [s], at most those of all chunks, for a model that takes them
        as one; raises BadSample.
        """
        return np.concatenate(self._cut(self._samples(item_id, content), source))

    def check_whole(self) -> None:
        """Raise ConfigurationError where all chunks are longer than the extractor takes as one."""
        if self.longest is not None and self.length * self.chunks > self.longest:
            raise ConfigurationError(
                f"data.audio_chunks={self.chunks}: expected at most "
                f"{self.longest / self.rate:g} seconds in all, what the model's "
                f"{type(self.extractor).__name__} takes whole; use fewer"
            )

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """What a chunk becomes, whatever is in it."""
        return tuple(self._extracted([np.zeros(self.length, dtype=np.float32)]).shape[1:])

    def stacked(self, recordings: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Return float32 [b, c, ...], zeros where there is nothing, and which chunks are there,
        bool [b, c].
        """
        number = max((len(one) for one in recordings if one is not None), default=1)
        features = torch.zeros(len(recordings), number, *self.shape)
        present = torch.zeros(len(recordings), number, dtype=torch.bool)
        for row, own in enumerate(recordings):
            if own is not None:
                features[row, : len(own)], present[row, : len(own)] = own, True
        return features, present

    @property
    def masked(self) -> bool:
        """True for raw samples whose padding the model must not hear."""
        return bool(self._padding) and bool(getattr(self.extractor, "return_attention_mask", False))

    @staticmethod
    def lengths(samples: Tensor) -> Tensor:
        """Return int64 [b, c]: the samples [b, c, s] of each chunk up to its last that is not 0,
        which is padding; at least 1.
        """
        places = torch.arange(1, samples.size(-1) + 1)
        return (places * (samples != 0)).amax(-1).clamp(min=1)

    def _samples(self, item_id: str, content: bytes) -> NDArray[np.float32]:
        try:
            return audio.decode(content, self.rate, video.sound)
        except ValueError as error:
            raise BadSample(item_id, str(error)) from error

    def _cut(
        self, samples: NDArray[np.float32], source: random.Random | None
    ) -> list[NDArray[np.float32]]:
        """Return chunks without padding, which is the extractor's."""
        spare = len(samples) - self.chunks * self.length
        start = int(source.random() * (spare + 1)) if source is not None and spare > 0 else 0
        used = samples[start : start + self.chunks * self.length]
        return [used[at : at + self.length] for at in range(0, len(used), self.length)]

    def _extracted(self, chunks: Sequence[NDArray[np.float32]]) -> Tensor:
        name = self.extractor.model_input_names[0]
        made = [
            self.extractor(chunk, sampling_rate=self.rate, return_tensors="np", **self._padding)
            for chunk in chunks
        ]
        return torch.from_numpy(np.concatenate([one[name] for one in made])).float()

    @cached_property
    def _padding(self) -> JsonObject:
        """Options for an extractor that makes as many values as it gets, as those of raw samples
        do; others fill up by themselves.
        """
        name = self.extractor.model_input_names[0]
        one, other = (
            self.extractor(
                np.zeros(length, dtype=np.float32), sampling_rate=self.rate, return_tensors="np"
            )[name].shape
            for length in (self.length, self.length // 2)
        )
        if one == other:
            return {}
        if len(one) != 2:
            raise ConfigurationError(
                f"model.source: its {type(self.extractor).__name__} makes features {one[1:]} of "
                f"{self.length} samples and {other[1:]} of half of them; expected features of one "
                "size, or raw samples; choose another model for sound"
            )
        return {"padding": "max_length", "max_length": self.length, "truncation": True}


def _longest(extractor: object) -> int | None:
    """Return the samples that an extractor takes whole; None: any number."""
    samples: int | None = getattr(extractor, "n_samples", None) or getattr(
        extractor, "nb_max_samples", None
    )
    if samples is None and hasattr(extractor, "max_length"):  # in frames of 10 ms
        samples = (extractor.max_length + 2) * extractor.sampling_rate // 100  # type: ignore[attr-defined]
    return samples
