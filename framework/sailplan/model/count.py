"""How large a model is before it is built: parameters of each part, and a rough estimate of a rank's memory.

The model is laid out on the meta device, so a billion parameters cost no memory and a second of time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sailplan.config.schema import ModelConfig, SwinShape, TransformerShape
from sailplan.model.backbones.load import check_shapes, open_sources
from sailplan.model.blocks import head_size, process_groups
from sailplan.model.check import CLAP
from sailplan.model.tower import ENCODERS, OmniEncoder

BYTES = {torch.bfloat16: 2, torch.float32: 4, torch.float64: 8}


def build_on_meta(config: ModelConfig) -> OmniEncoder:
    """The model's shapes without its numbers."""
    with torch.device("meta"):
        return OmniEncoder(config)


def check_weights(config: ModelConfig) -> None:
    """Raises ConfigurationError where the published weights of `model.weights` do not fit the configured model.

    Reads headers only and needs no process group, so that every rank can refuse before any group is formed.
    """
    for source in open_sources(config):
        check_shapes(source, build_on_meta(config))


def _split_sizes(model: OmniEncoder, part: str) -> tuple[int, int]:
    """(elements that tensor parallelism cuts, elements that every tensor-parallel rank holds whole), of the whole model."""
    groups = process_groups()
    size = groups.tp.size() if groups.tp is not None else 1

    def is_cut(parameter: nn.Parameter) -> bool:
        # The note is set where weights are drawn, so it is there on the meta device too.
        return bool(getattr(parameter, "tensor_model_parallel", False))

    parameters = model.parts()[part]
    cut = sum(parameter.numel() * size for parameter in parameters if is_cut(parameter))
    return cut, sum(parameter.numel() for parameter in parameters if not is_cut(parameter))


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of text, vision, perceiver, audio and tower, and "total"; the same in a world of any layout.

    Raises ConfigurationError where the model cannot be built.
    """
    model = build_on_meta(config)
    counts = {part: sum(_split_sizes(model, part)) for part in model.parts()}
    return counts | {"total": sum(counts.values())}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    parameters: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gathered + self.gradients + self.optimizer + self.activations


def _layer_elements(shape: TransformerShape, tensor: int) -> float:
    query, key_value = head_size(shape) * shape.heads, head_size(shape) * (shape.key_value_heads or shape.heads)
    return 7 * shape.hidden + (4 * query + 4 * key_value + (4 if shape.gated else 2) * shape.feed_forward) / tensor


def _swin_elements(swin: SwinShape) -> float:
    """Of one chunk: a block's residual stream, norms, attention and feed-forward, and the scores' bias of each window."""
    elements = 0.0
    for stage, (layers, heads) in enumerate(zip(swin.layers, swin.heads, strict=True)):
        positions, hidden = (swin.image / swin.patch / 2**stage) ** 2, swin.hidden * 2**stage
        elements += layers * positions * ((11 + 2 * swin.feed_forward) * hidden + heads * swin.window**2)
    return elements


def activation_elements(
    config: ModelConfig,
    modalities: tuple[str, ...],
    *,
    tensor: int,
    tokens: int,
    image_size: int,
    frames: int,
    audio_frames: int,
    audio_chunks: int = 1,
    image_patches: int | None = None,
) -> float:
    """Elements that one row keeps for the backward pass (rough; see `estimate_memory`).

    audio_frames: of each of its chunks. image_patches: of a picture, where its sides are not those of a square of image_size.
    """
    vision, audio, positions, elements = config.vision, config.audio, float(tokens), 0.0
    if "vision" in modalities:
        patches = image_patches or (image_size // vision.patch) ** 2
        halvings = int(math.log2(vision.patch)) if vision.backbone == "own" and vision.stem == "convolutional" else 0
        for step in range(halvings):
            channels = vision.encoder.hidden if step == halvings - 1 else min(vision.stem_width * 2**step, vision.encoder.hidden)
            elements += 3 * frames * channels * (image_size / 2 ** (step + 1)) ** 2  # convolution, norm, ReLU
        elements += vision.encoder.layers * frames * patches * _layer_elements(vision.encoder, tensor)
        if vision.backbone == "qwen3_vl":
            mergers, width = 1 + len(vision.deepstack), vision.encoder.hidden * (2 + 2 / tensor)  # norm and its input; the feed-forward
            elements += frames * patches * mergers * width
            positions += frames * patches / vision.merge**2
        else:
            joint = vision.latents + frames * patches
            elements += vision.perceiver.layers * joint * _layer_elements(vision.perceiver, tensor) + 4 * joint * vision.perceiver.hidden
            positions += vision.latents
    if "audio" in modalities:
        if audio.backbone in CLAP:
            elements += audio_chunks * _swin_elements(audio.swin)
            if audio.backbone == "clap_fusion":  # four spectrograms as pictures, and what weighs their patches against each other
                elements += 12 * audio.swin.image**2 + 12 * audio.swin.hidden * (audio.swin.image // audio.swin.patch) ** 2
        else:
            kept = audio.encoder.layers / audio.time_stride * _layer_elements(audio.encoder, tensor)
            # Of the convolutions at full length: one with norm and ReLU, or Whisper's first with its activation and the second.
            kept += 3 * audio.encoder.hidden if audio.backbone == "whisper" else 3 * audio.stem_width
            elements += audio_chunks * audio_frames * kept
        positions += 1
    return elements + positions * (config.tower.layers * _layer_elements(config.tower, tensor) + 4 * config.tower.hidden)


def estimate_memory(
    config: ModelConfig,
    *,
    tensor: int,
    data: int,
    shard: bool,
    rows: int,
    share_encoders: bool = True,
    modalities: tuple[str, ...] = ("text", "vision"),
    tokens: int = 48,
    image_size: int = 64,
    frames: int = 1,
    audio_frames: int = 0,
    audio_chunks: int = 1,
    image_patches: int | None = None,
    parameter_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype = torch.float32,
) -> MemoryEstimate:
    """A rank's memory in bytes, for planning: right to some tens of percent.

    share_encoders: the vision and audio encoders and the perceiver are whole on every tensor-parallel rank, which runs
    them on rows / tensor; the activations below count them as cut, which is nearly the same number.

    With P = cut / tensor + whole (the parameters that a tensor-parallel rank sees), S = data if sharded else 1, and
    b, c the bytes of an element of a parameter and of the computation:

    parameters b P / S; gathered c P (whole copies from a step's first forward to its last backward);
    gradients b P + b P / S (summed whole over the micro-batches, then sharded); optimizer 2 b P / S (AdamW).

    activations: c x rows x elements of a row. A layer keeps about 7 h + (4 h + 4 h_kv + 4 f) / tensor elements a
    position (2 f where the feed-forward is not gated): the residual stream, two norms with their factors, queries, keys and values before and after the
    rotation, the attention's output, and the gated feed-forward's 2 f, f and f. Attention matrices are never stored.

    rows: rows with a live graph, that is micro_batch x (1 + kept graphs). The loss and the decoded batches come on top.
    """
    model = build_on_meta(config)
    sizes = {part: _split_sizes(model, part) for part in model.parts()}
    kept_whole = ENCODERS if share_encoders else ()
    cut = sum(size for part, (size, _) in sizes.items() if part not in kept_whole)
    seen = math.ceil(cut / tensor) + sum(map(sum, sizes.values())) - cut
    held = math.ceil(seen / data) if shard else seen
    width, compute = BYTES[parameter_dtype], BYTES[compute_dtype]
    sound = {"audio_frames": audio_frames, "audio_chunks": audio_chunks}
    pictures: dict[str, Any] = {"image_size": image_size, "frames": frames, "image_patches": image_patches}
    elements = activation_elements(config, modalities, tensor=tensor, tokens=tokens, **pictures, **sound)
    return MemoryEstimate(
        parameters=width * held,
        gathered=compute * seen,
        gradients=width * (seen + held),
        optimizer=2 * width * held,
        activations=int(compute * rows * elements),
    )
