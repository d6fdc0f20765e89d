"""A small encoder and random inputs for tests: every modality, every kind of layer, a few
thousand parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from sailplan.config.fields import Options
from sailplan.config.schema import (
    AudioConfig,
    ModelConfig,
    SwinShape,
    TransformerShape,
    VisionConfig,
)
from sailplan.data.packing import OmniInputs, SequenceLayout, pack
from sailplan.model.attention import Sequences
from sailplan.runtime.groups import form_groups
from sailplan.runtime.process import Parallel

PATCHES = 6  # of a picture that keeps its sides' ratio
PUBLISHED = (
    "qwen_clap",
    "naflex_fusion",
    "siglip_whisper",
)  # image and sound encoders of published models


def small_config(
    dropout: float = 0.0, *, query_key_norm: bool = True, vision: str = "own"
) -> ModelConfig:
    """Hidden 16, one or two layers a stack; can be built at tensor-parallel sizes 1 and 2.

    vision: own, siglip2, or published: one of transformers with a class token and its own means.
    """

    def shape(layers: int, key_value_heads: int | None = None) -> TransformerShape:
        return TransformerShape(layers, 16, 4, key_value_heads, 24, dropout, query_key_norm)

    chosen: dict[str, Options] = {
        "siglip2": {"backbone": "siglip2", "position_grid": 3},
        "published": {
            "backbone": "published",
            "published": published_pictures("clip_vision_model"),
            "processor": {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.25]},
        },
    }
    return ModelConfig(
        vocabulary=40,
        embedding=16,
        prefixes=[4, 8, 16],
        tower=shape(2, 2),
        vision=VisionConfig(
            patch=4,
            stem_width=4,
            encoder=shape(1),
            perceiver=shape(1),
            latents=3,
            **chosen.get(vision, {}),
        ),
        audio=AudioConfig(encoder=shape(1), stem_width=8, time_stride=2, mel_bins=6, output=12),
    )


def published_pictures(model_type: str) -> Options:
    """The content of a tiny config.json, for pictures of 12 pixels in patches of 4."""
    return {
        "model_type": model_type,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "image_size": 12,
        "patch_size": 4,
    }


def random_inputs(
    modalities: tuple[str, ...],
    rows: int,
    seed: int,
    *,
    dtype: torch.dtype = torch.float64,
    absent: bool = True,
    tokens: int = 5,
    frames: int = 2,
    vision: str = "own",
) -> OmniInputs:
    """Inputs for `small_config`; with `absent`, rows have padded tokens and some lack frames or
    chunks. vision: as there.
    """
    generator = torch.Generator().manual_seed(seed)

    def mask(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < (0.6 if absent else 2)

    token_mask = mask(rows, tokens)
    if absent:
        token_mask = token_mask.sort(1, descending=True).values  # padding stands at the end
    inputs = OmniInputs(
        modalities=modalities,
        token_ids=torch.randint(0, 40, (rows, tokens), generator=generator),
        token_mask=token_mask,
        text_mask=token_mask & (torch.arange(tokens) > 0),
        images=torch.randn(rows, frames, 3, 8, 12, generator=generator).to(dtype)
        if "vision" in modalities
        else None,
        image_mask=mask(rows, frames) if "vision" in modalities else None,
        audio=torch.randn(rows, 2, 9, 6, generator=generator).to(dtype)
        if "audio" in modalities
        else None,
        audio_mask=mask(rows, 2) if "audio" in modalities else None,
    )
    if vision == "siglip2" and "vision" in modalities:
        grids = torch.tensor(
            [
                [down, across]
                for down in range(1, PATCHES + 1)
                for across in range(1, PATCHES // down + 1)
            ]
        )
        inputs.image_sizes = grids[
            torch.randint(0, len(grids), (rows, frames), generator=generator)
        ]
        inputs.images = torch.randn(rows, frames, PATCHES, 3 * 4**2, generator=generator).to(dtype)
    return inputs


def published_config(kind: str) -> ModelConfig:
    """`small_config` with the encoders of one of PUBLISHED."""
    config = small_config(vision="siglip2" if kind == "naflex_fusion" else "own")
    swin = SwinShape(
        layers=[2, 1], heads=[2, 2], hidden=4, feed_forward=2, window=2, patch=2, image=24
    )
    plain = TransformerShape(
        2, 16, 4, None, 24, norm="layer", activation="gelu_tanh", gated=False, bias=True
    )
    if kind == "naflex_fusion":
        config.audio = dataclasses.replace(config.audio, backbone="clap_fusion", swin=swin)
    elif kind == "qwen_clap":
        config.vision = dataclasses.replace(
            config.vision,
            backbone="qwen3_vl",
            patch=2,
            merge=2,
            marks=[1, 2],
            position_grid=3,
            deepstack=[0, 1],
            encoder=plain,
        )
        config.rope_sections = [1, 1, 0]
        config.audio = dataclasses.replace(config.audio, backbone="clap", swin=swin)
    else:
        config.vision = dataclasses.replace(
            config.vision,
            backbone="published",
            published=published_pictures("siglip_vision_model") | {"vision_use_head": False},
        )
        config.audio = dataclasses.replace(
            config.audio, backbone="whisper", encoder=dataclasses.replace(plain, activation="gelu")
        )
    return config


def published_inputs(kind: str, rows: int, **options: Any) -> OmniInputs:
    """Inputs for `published_config`, of all modalities; with fusion every other row's sound is a
    longer one.
    """
    inputs = random_inputs(
        ("vision", "audio", "text"),
        rows,
        3,
        vision="siglip2" if kind == "naflex_fusion" else "own",
        **options,
    )
    if kind == "naflex_fusion":
        assert inputs.audio is not None
        inputs.audio = torch.cat([inputs.audio, inputs.audio.flip(2)], 1)
        longer = torch.arange(rows) % 2 == 0
        inputs.audio_mask = torch.stack(
            [torch.ones(rows, dtype=torch.bool), longer, longer, longer], 1
        )
    return inputs


def join_layout(tensor_parallel: int) -> Parallel:
    """Form the groups in a world that has its default process group; return this rank's place
    (CPU).
    """
    return form_groups(tensor_parallel, torch.device("cpu"))


def rows_of(inputs: OmniInputs, start: int, stop: int) -> OmniInputs:
    """Rows start..stop of a micro-batch (none, where start is past the end)."""
    tensors = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    changes: Options = {"packing": None} | {
        name: value[start:stop]
        for name, value in tensors.items()
        if isinstance(value, torch.Tensor)
    }
    return dataclasses.replace(inputs, **changes)


def packed_rows(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Sequences]:
    """Of a mask bool [b, s]: the kept positions' numbers in [b * s] in packed order, their
    places in their rows, and the rows.
    """
    numbers = torch.arange(keep.numel(), device=keep.device).view(keep.shape)
    packing = pack(OmniInputs(("text",), numbers, keep, keep), SequenceLayout.of(ModelConfig()))
    lists = packing.lists()
    return (
        lists["ids"],
        lists["place"],
        Sequences.of(packing.runs["tower"], lists["ends"], keep.device),
    )


def whole_tensor(parameter: torch.Tensor, value: torch.Tensor, parallel: Parallel) -> torch.Tensor:
    """The whole tensor of `value` (the parameter, its gradient, ...) gathered from all ranks, a
    fresh copy on each.
    """
    whole = (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    parts = [torch.empty_like(whole) for _ in range(parallel.tensor_parallel_size)]
    dist.all_gather(parts, whole.contiguous(), group=parallel.tensor_parallel_group)
    dimension, halves = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    return torch.cat(
        [part.chunk(halves, dimension)[half] for half in range(halves) for part in parts], dimension
    )
