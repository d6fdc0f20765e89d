"""The omni tower's processor: `ViewDecoder` with the micro-batch packed for the tower, and what
media cost it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from sailplan.config.schema import Config, TransformerShape, ViewConfig
from sailplan.data.audio import FUSED, SPECTROGRAMS
from sailplan.data.packing import OmniInputs, SequenceLayout, pack
from sailplan.data.processor import MediaCosts, ViewRow
from sailplan.data.views import ViewDecoder
from sailplan.model.encoders.omni.pictures import check_sides, open_processor_of, sized
from sailplan.model.encoders.omni.published import work


class OmniProcessor(ViewDecoder):
    """Decodes and packs; costs are positions of the tower's sequence, and of a picture or a
    chunk of sound also its own
    encoder's work, in positions that cost the tower as much."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigurationError when the tokenizer cannot be read, or the published picture
        processor makes pictures of another size.
        """
        super().__init__(config.data)
        self._published = open_processor_of(config.model.vision.processor)
        if self._published is not None:
            check_sides(self._published, config.data.image_size)
        self.layout = SequenceLayout.planned(config.model, config.parallel)
        picture, once = _picture_positions(config)
        # A fusion's spectrograms are computed all together, whatever the recording has.
        chunks = 1 if self.spectrogram.whole else config.data.audio_chunks
        self.media = MediaCosts(once, picture, 1, _sound_positions(config), chunks)

    def picture(self, pixels: Tensor) -> Tensor:
        """Return it as the published encoder's own processor cuts and sizes it, where it has one."""
        if self._published is None:
            return super().picture(pixels)
        return sized(self._published, pixels)

    def batch(
        self, rows: Sequence[ViewRow], tokens: Sequence[list[int]], view: ViewConfig
    ) -> OmniInputs:
        inputs = super().batch(rows, tokens, view)
        return replace(inputs, packing=pack(inputs, self.layout))


def _work(shape: TransformerShape) -> float:
    """Return the multiplications of one position in a stack's matrices."""
    size = shape.head_size or shape.hidden // shape.heads
    attention = shape.hidden * size * (2 * shape.heads + 2 * (shape.key_value_heads or shape.heads))
    return shape.layers * (
        attention + (3 if shape.gated else 2) * shape.hidden * shape.feed_forward
    )


def _picture_positions(config: Config) -> tuple[int, int]:
    """Return (cost of each picture, cost once where there is any) in positions of the tower."""
    model, vision, data = config.model, config.model.vision, config.data
    patches = data.image_patches or (data.image_size // vision.patch) ** 2
    tower = max(1.0, _work(model.tower))
    if vision.backbone == "qwen3_vl":
        shown = patches // vision.merge**2 + len(vision.marks)
        return shown + math.ceil(patches * _work(vision.encoder) / tower), 0
    seen = (
        work("model.vision.published", vision.published)
        if vision.backbone == "published"
        else _work(vision.encoder)
    )
    perceiver = _work(vision.perceiver) / tower
    return math.ceil(patches * (seen / tower + perceiver)), vision.latents + math.ceil(
        vision.latents * perceiver
    )


def _sound_positions(config: Config) -> int:
    """Return the cost of each chunk of sound in positions of the tower, beside its one token."""
    audio, data = config.model.audio, config.data
    front = SPECTROGRAMS[data.spectrogram]
    tower = max(1.0, _work(config.model.tower))
    if audio.backbone.startswith("clap"):
        stages = enumerate(zip(audio.swin.layers, audio.swin.heads, strict=True))
        work = sum(
            (audio.swin.image / audio.swin.patch / 2**stage) ** 2
            * layers
            * (4 + 2 * audio.swin.feed_forward)
            * (audio.swin.hidden * 2**stage) ** 2
            for stage, (layers, _) in stages
        )
        return math.ceil((FUSED if front.whole else 1) * work / tower)
    positions = front.frames(data.audio_chunk_seconds, data.audio_rate) / (
        2 if audio.backbone == "whisper" else audio.time_stride
    )
    return math.ceil(positions * _work(audio.encoder) / tower)
