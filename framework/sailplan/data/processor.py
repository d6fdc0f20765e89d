"""The seam between data and encoders: a processor turns items into an encoder's tensors, and
says what rows cost it.

`data/` reads bytes and structure: which item of a record a view shows, which of its texts in which
language, how much of its media. What becomes of them (tokens, pixels, spectrograms, templates) is
the encoder's own: it hands out a processor, and collating, evaluating and embedding ask that alone.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Protocol

from torch import Tensor

from sailplan.config.schema import Config, DatasetConfig, ViewConfig
from sailplan.data import video
from sailplan.data.cache import EPOCHS, ByteCache
from sailplan.data.image import draw_augmentation, pixels_of
from sailplan.data.record import EncoderInputs, Item
from sailplan.data.text import compose
from sailplan.data.values import BadSample
from sailplan.runtime.seeds import derive

DECODED_BYTES = 128 << 20  # of pictures and spectrograms, per process
_PROCESSORS: dict[str, Processor] = {}


@dataclass(slots=True)
class ViewRow:
    """An item decoded for a view.

    f frames and c chunks as the item has them, at most the configured numbers.
    """

    id: int = -1  # the same document, or for text-only views the same text; -1: not valid
    # Equal in rows of a view that show the encoder the same; None: nothing
    shown: tuple[str, int | None] | None = None
    text: str = ""
    images: tuple[Tensor, ...] = ()  # f pictures, as the processor decodes them
    augmentation: tuple[float, ...] | None = None
    audio: Tensor | None = None  # [c, ...] of c chunks or spectrograms

    @property
    def valid(self) -> bool:
        """False where the item has none of the view's modalities, or there is no item."""
        return self.id >= 0


class TokenCounts(Protocol):
    """What the length tables and the foreseen costs need of a tokenizer."""

    digest: str  # 8 hex digits, another for every tokenizer that counts otherwise

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, neither cut nor with special tokens."""


@dataclass(frozen=True)
class MediaCosts:
    """What media cost an encoder, in tokens: beside its text a row costs `first_picture` where
    it has any, and so on.
    """

    first_picture: int = 0
    picture: int = 0  # each
    sound: int = 0  # once, where there is any
    chunk: int = 0  # each of at most `chunks`
    chunks: int = 1


class Processor(ABC):
    """Everything between an item and an encoder's inputs, for one configuration."""

    tokenizer: TokenCounts
    max_tokens: int  # of a row's text and its prompt
    frames: int = 1  # pictures of a row, at most
    chunks: int = 1  # of sound of a row, at most
    audio_rate: int = 16000  # Hz, at which the encoder hears
    media = MediaCosts()

    @cached_property
    def decoded(self) -> ByteCache[Tensor]:
        """Pictures and spectrograms by their encoded bytes, kept between epochs."""
        return ByteCache(DECODED_BYTES, patience=EPOCHS)

    def row(
        self,
        item: Item | None,
        view: ViewConfig,
        dataset: DatasetConfig,
        seed: int | None = None,
        text: str | None = None,
    ) -> ViewRow:
        """Decode an item for a view.

        seed: draws the row's language, fields and augmentation; None: evaluation, nothing is drawn.
        text: taken instead of the item's fields. Raises BadSample for media that cannot be decoded.
        """
        if item is None:
            return ViewRow()
        row = ViewRow()
        if "text" in view.modalities:
            row.text = compose(item.fields, view, dataset, seed) if text is None else text
        strength = dataset.image_augmentation if seed is not None else 0.0
        if "vision" in view.modalities and (item.images or item.video is not None):
            row.images = self._pictures(item, view, seed)
            if strength > 0:
                row.augmentation = draw_augmentation(random.Random(seed), strength)
        if "audio" in view.modalities and item.audio is not None:
            source = None if seed is None else random.Random(derive("sound", seed))
            row.audio = self.sound(item.id, item.audio, source, strength)
        if row.text or row.images or row.audio is not None:
            text_only = list(view.modalities) == ["text"]
            row.id = (
                derive("text", row.text.casefold()) if text_only else derive("document", item.id)
            )
            row.shown = (row.text, None) if text_only else (item.id, seed)
        return row

    def picture(self, pixels: Tensor) -> Tensor:
        """Return a picture uint8 [3, height, width] as the encoder takes it."""
        raise NotImplementedError(f"{type(self).__name__} has no pictures")

    def image(self, item_id: str, content: bytes) -> Tensor:
        """Decode a picture, or take it from those decoded lately; raises BadSample."""
        known = self.decoded.get(content)
        if known is None:
            try:
                known = self.picture(pixels_of(content))
            except ValueError as error:
                raise BadSample(item_id, str(error)) from error
            self.decoded.put(content, known, known.nbytes + len(content))
        return known

    def _pictures(self, item: Item, view: ViewConfig, seed: int | None) -> tuple[Tensor, ...]:
        """The pictures that a row shows: the first ones, or frames spread over a film; at most
        `frames`.
        """
        source = (
            None if seed is None else random.Random(derive("frames", seed))
        )  # of its own: other draws do not depend on it
        if item.images:
            shown = (
                video.chosen(item.images, self.frames, source)
                if view.frames == "spread"
                else item.images[: self.frames]
            )
            return tuple(self.image(item.id, content) for content in shown)
        assert item.video is not None
        try:
            return tuple(
                self.picture(pixels) for pixels in video.frames(item.video, self.frames, source)
            )
        except ValueError as error:
            raise BadSample(item.id, str(error)) from error

    def sound(
        self, item_id: str, content: bytes, source: random.Random | None, strength: float
    ) -> Tensor:
        """Decode a recording; source: draws where it is cut and what is changed, None in
        evaluation; raises BadSample.
        """
        raise NotImplementedError(f"{type(self).__name__} has no sound")

    @abstractmethod
    def overhead(self, view: ViewConfig) -> int:
        """Return the tokens of a view's rows beside their own text: the prompt's, and special
        ones. Raises ConfigurationError for a
        prompt that leaves no room."""

    @abstractmethod
    def tokens(self, rows: Sequence[ViewRow], view: ViewConfig) -> list[list[int]]:
        """Return the token ids of each row's own text, cut so that they fit beside `overhead`."""

    @abstractmethod
    def batch(
        self, rows: Sequence[ViewRow], tokens: Sequence[list[int]], view: ViewConfig
    ) -> EncoderInputs:
        """Stack rows (with their `tokens`) into one micro-batch, ready for the upload."""

    @abstractmethod
    def largest(self, modalities: Sequence[str], rows: int) -> EncoderInputs:
        """Return a micro-batch in which every row has all that the configuration lets it have:
        what memory must hold.
        """

    def cost(self, row: ViewRow, tokens: int, view: ViewConfig) -> int:
        """Return what a decoded row costs whose own text has so many tokens."""
        return self.counted(
            tokens, len(row.images), 0 if row.audio is None else len(row.audio), view
        )

    def counted(self, tokens: int, pictures: int, chunks: int, view: ViewConfig) -> int:
        """Return the cost of a row with so many tokens of its own text, pictures and chunks of
        sound.
        """
        media = self.media
        cost = (
            self.overhead(view)
            + tokens
            + media.first_picture * (pictures > 0)
            + media.picture * pictures
        )
        return cost + media.sound * (chunks > 0) + media.chunk * min(chunks, media.chunks)


def processor_of(config: Config) -> Processor:
    """Return the process's processor for a configuration: stages and evaluations share what is
    decoded already.
    """
    options = {
        one.name: getattr(config.data, one.name)
        for one in fields(config.data)
        if one.name != "sets"
    }
    key = repr(
        (
            config.model.encoder,
            asdict(config.model),
            options,
            config.parallel.tensor,
            config.parallel.encoders,
        )
    )
    if key not in _PROCESSORS:
        _PROCESSORS.clear()  # one at a time: its caches are large
        _PROCESSORS[key] = config.model.component().processor(config)
    return _PROCESSORS[key]
