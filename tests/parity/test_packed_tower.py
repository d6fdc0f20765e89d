"""The packed tower is the padded formula: vectors and gradients, and what reaches its linear
layers and its attention.

The padded formula is written here again, in plain torch on the encoder's own weights: every row
filled up to the longest, attention under a mask.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sailplan.config.schema import ModelConfig, TransformerShape
from sailplan.data.packing import OmniInputs, pack
from sailplan.model.backbones.naflex import NaflexVisionEncoder
from sailplan.model.backbones.qwen_vl import QwenVisionEncoder
from sailplan.model.blocks import Blocks, interleaved_angles, rotary_angles
from sailplan.model.testing import (
    join_layout,
    published_config,
    published_inputs,
    random_inputs,
    small_config,
)
from sailplan.model.tower import OmniEncoder
from sailplan.model.vision import frame_positions
from sailplan.parity.layouts import relative_errors
from sailplan_kernels.testing import run_ranks


# ---------------------------------------------------------------- the padded formula
def padded_blocks(
    blocks: Blocks,
    shape: TransformerShape,
    hidden: Tensor,
    keep: Tensor,
    angles: Tensor | None = None,
    after: Callable[[int, Tensor], Tensor] = lambda layer, hidden: hidden,
) -> Tensor:
    """hidden [b, s, h], keep bool [b, s], angles float32 [b or 1, s, head_size].

    Rows that keep nothing attend to all.
    """
    if not shape.layers:
        return blocks.block(hidden)
    positions = hidden.size(1)
    mask = (keep | ~keep.any(1, keepdim=True))[:, None, None, :].expand(-1, 1, positions, -1)
    if shape.causal:
        mask = mask & torch.ones(positions, positions).tril().bool() | torch.eye(positions).bool()

    def turned(heads: Tensor) -> Tensor:
        if angles is None:
            return heads
        first, second = heads.chunk(2, -1)
        cosine, sine = (
            function(angles)[:, None].to(heads.dtype) for function in (torch.cos, torch.sin)
        )
        return heads * cosine + torch.cat([-second, first], -1) * sine

    for number, layer in enumerate(blocks.block.layers):
        own = layer.self_attention
        groups, size = shape.key_value_heads or shape.heads, blocks.head_size
        mixed = F.linear(
            layer.input_layernorm(hidden), own.linear_qkv.weight, own.linear_qkv.bias
        ).unflatten(-1, (groups, -1))
        query, key, value = mixed.split([shape.heads // groups * size, size, size], -1)
        query = query.unflatten(-1, (-1, size)).flatten(2, 3)
        if shape.query_key_norm:
            query, key = own.q_layernorm(query), own.k_layernorm(key)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        key, value = (part.repeat_interleave(shape.heads // groups, 1) for part in (key, value))
        scores = turned(query) @ turned(key).transpose(-1, -2) / math.sqrt(size)
        context = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
        hidden = hidden + F.linear(
            context.transpose(1, 2).flatten(2), own.linear_proj.weight, own.linear_proj.bias
        )
        inner = F.linear(
            layer.pre_mlp_layernorm(hidden), layer.mlp.linear_fc1.weight, layer.mlp.linear_fc1.bias
        )
        if shape.gated:
            gate, inner = inner.chunk(2, -1)
            inner = F.silu(gate) * inner
        else:
            inner = F.gelu(inner, approximate="tanh")
        hidden = after(
            number, hidden + F.linear(inner, layer.mlp.linear_fc2.weight, layer.mlp.linear_fc2.bias)
        )
    return hidden if blocks.block.final_layernorm is None else blocks.block.final_layernorm(hidden)


def padded_pictures(
    encoder: OmniEncoder, inputs: OmniInputs
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Visual tokens [b, n, h], which are present, and what is added behind the tower's first
    layers.
    """
    config, present = encoder.config.vision, inputs.image_mask
    rows, frames = present.shape
    images = inputs.images.flatten(0, 1)
    if isinstance(encoder.vision, QwenVisionEncoder):
        tokens, *features = (part.unflatten(0, (rows, frames)) for part in encoder.vision(images))
        before, behind = (
            encoder.text(torch.tensor(config.marks)).expand(rows, frames, -1, -1).split(1, 2)
        )
        tokens = torch.cat([before, tokens, behind], 2)
        present = present.repeat_interleave(tokens.size(2), 1)
        return (
            tokens.flatten(1, 2),
            present,
            [F.pad(part, (0, 0, 1, 1)).flatten(1, 2) for part in features],
        )
    if isinstance(encoder.vision, NaflexVisionEncoder):
        sizes, vision = inputs.image_sizes.flatten(0, 1), encoder.vision
        own = torch.arange(images.size(1)) < sizes.prod(-1, keepdim=True)
        places = (
            torch.arange(images.size(1))
            .expand(len(images), -1)
            .minimum(sizes.prod(-1, keepdim=True) - 1)
        )
        positions = vision.positions_of(
            places.flatten(), sizes.repeat_interleave(images.size(1), 0)
        ).unflatten(0, own.shape)
        patches = padded_blocks(
            vision.blocks, config.encoder, vision.embedding(images) + positions, own
        )
        own = own.unflatten(0, (rows, frames)) & present[..., None]
    else:
        patches = encoder.vision(images)
        own = present[..., None].expand(-1, -1, patches.size(1))
    perceiver = encoder.perceiver
    visual = perceiver.input(patches.unflatten(0, (rows, frames)))
    visual = (
        visual
        + (
            frame_positions(frames, perceiver.latents.size(1), perceiver.latents)
            * perceiver.frame_gain
        )[:, None]
    )
    latents = perceiver.latents.expand(rows, -1, -1)
    keep = torch.cat([torch.ones(rows, latents.size(1), dtype=torch.bool), own.flatten(1)], 1)
    joint = padded_blocks(
        perceiver.blocks, config.perceiver, torch.cat([latents, visual.flatten(1, 2)], 1), keep
    )
    tokens = perceiver.output(joint[:, : latents.size(1)])
    return tokens, present.any(1, keepdim=True).expand(-1, tokens.size(1)), []


def places_of(pieces: list[tuple[int, Tensor, Tensor]], grid: tuple[int, int]) -> Tensor:
    """Frame, row and column as Qwen3-VL counts them, position by position, int64 [3, b, s];
    pictures are marked.
    """
    longer, tokens = max(grid), grid[0] * grid[1] + 2
    rows = []
    for row in range(len(pieces[0][1])):
        places, start = [], 0
        for kind, piece, present in pieces:
            for number in range(piece.size(1)):
                if kind != 1:
                    places.append([start] * 3)
                    start += 1
                    continue
                within = number % tokens
                if within in (0, tokens - 1):
                    places.append([start + (longer + 1 if within else 0)] * 3)
                else:
                    places.append(
                        [
                            start + 1,
                            start + 1 + (within - 1) // grid[1],
                            start + 1 + (within - 1) % grid[1],
                        ]
                    )
                if within == tokens - 1 and present[row, number]:
                    start += longer + 2
        rows.append(places)
    return torch.tensor(rows).permute(2, 0, 1)


def padded(encoder: OmniEncoder, inputs: OmniInputs) -> list[Tensor]:
    """The fused, visual and text vectors."""
    config = encoder.config
    pieces, features = [], []
    if "audio" in inputs.modalities:
        token = encoder.audio["adapter"](encoder.audio["encoder"](inputs.audio, inputs.audio_mask))
        pieces.append((2, token, inputs.audio_mask.any(1, keepdim=True)))
    if "vision" in inputs.modalities:
        tokens, present, features = padded_pictures(encoder, inputs)
        pieces.append((1, tokens, present))
    pieces.append((0, encoder.text(inputs.token_ids), inputs.token_mask))
    keep = torch.cat([present for _, _, present in pieces], 1)
    kinds = torch.tensor([kind for kind, tokens, _ in pieces for _ in range(tokens.size(1))])
    tower = encoder.tower
    sequence = torch.cat([tokens for _, tokens, _ in pieces], 1) + tower.kinds[kinds]
    size = tower.blocks.head_size
    if config.rope_sections:
        places = places_of(pieces, encoder.vision.grid(inputs.images))
        angles = torch.stack(
            [
                interleaved_angles(places[:, row], size, config.rope_base, config.rope_sections)
                for row in range(len(keep))
            ]
        )
    else:
        angles = rotary_angles(torch.arange(keep.size(1)), size, config.rope_base)[None]
    first = int((kinds == 1).long().argmax())
    added = [F.pad(part, (0, 0, first, len(kinds) - first - part.size(1))) for part in features]
    hidden = padded_blocks(
        tower.blocks,
        config.tower,
        sequence,
        keep,
        angles,
        lambda layer, hidden: hidden + added[layer] if layer < len(added) else hidden,
    )
    if tower.pooling is not None:
        hidden = tower.pooling(hidden.flatten(0, 1)).unflatten(0, keep.shape)
    hidden = hidden.tanh() if config.pooling == "tanh_mean" else hidden
    own = torch.zeros_like(keep)
    own[:, keep.size(1) - inputs.text_mask.size(1) :] = inputs.text_mask & inputs.token_mask
    found = []
    for mask in (keep, keep & (kinds == 1), own):
        if config.pooling == "last_token":
            last = torch.where(mask, torch.arange(mask.size(1)), -1).amax(1)
            found.append(hidden[torch.arange(len(mask)), last.clamp(min=0)] * (last >= 0)[:, None])
        else:
            found.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1))
    return found


def configured(kind: str, pooling: str, causal: bool) -> ModelConfig:
    config = small_config() if kind in ("own", "text") else published_config(kind)
    config.tower = dataclasses.replace(config.tower, causal=causal)
    config.pooling = pooling
    if pooling == "latent_attention":
        config.pooling_latents, config.pooling_heads = 3, 2
    return config


def made_inputs(kind: str) -> OmniInputs:
    modalities = ("text",) if kind == "text" else ("text", "vision", "audio")
    inputs = (
        random_inputs(modalities, 7, 3) if kind in ("own", "text") else published_inputs(kind, 7)
    )
    for name in (
        "token_mask",
        "text_mask",
        "image_mask",
        "audio_mask",
    ):  # a row with nothing, and a gap amid a row's text
        if getattr(inputs, name) is not None:
            getattr(inputs, name)[2] = False
    inputs.token_mask[4] = torch.tensor([True, False, True, True, False])
    return inputs


def _against_the_padded_formula(
    rank: int, world_size: int, kind: str, pooling: str, causal: bool
) -> float:
    join_layout(1)
    encoder = OmniEncoder(configured(kind, pooling, causal), dtype=torch.float64, seed=1)
    with torch.no_grad():
        encoder.tower.kinds.normal_(generator=torch.Generator().manual_seed(2))
    inputs = made_inputs(kind)
    results = []
    for way in ("padded", "packed"):
        encoder.zero_grad()
        if way == "padded":
            vectors = padded(encoder, inputs)
        else:
            ready = dataclasses.replace(inputs, packing=pack(inputs, encoder.layout))
            vectors = [
                encoder(ready, per_modality=True).named().get(name)
                for name in ("fused", "vision", "text")
            ]
        vectors = [vector for vector in vectors if vector is not None]
        generator = torch.Generator().manual_seed(5)
        weights = [torch.randn(7, 16, dtype=torch.float64, generator=generator) for _ in range(3)]
        if len(vectors) < 3 or kind == "text":  # no visual vector
            vectors, weights = [vectors[0], vectors[-1]], [weights[0], weights[-1]]
        sum(
            (vector * weight).sum() for vector, weight in zip(vectors, weights, strict=True)
        ).backward()
        gradients = {
            name: p.grad
            for name, p in encoder.named_parameters()
            if p.grad is not None and bool(p.grad.any())
        }
        results.append(
            {str(number): vector.detach() for number, vector in enumerate(vectors)} | gradients
        )
    wanted, found = results
    assert wanted.keys() == found.keys(), wanted.keys() ^ found.keys()
    return max(relative_errors(found, wanted).values())


@pytest.mark.parametrize(
    ("kind", "pooling", "causal"),
    [
        ("text", "tanh_mean", True),
        ("own", "tanh_mean", False),
        ("own", "latent_attention", False),
        ("own", "last_token", True),
        ("naflex_fusion", "mean", False),
        ("qwen_clap", "last_token", True),
        ("qwen_clap", "mean", False),
        ("siglip_whisper", "mean", False),
    ],
)
def test_vectors_and_gradients_are_the_padded_formulas(
    kind: str, pooling: str, causal: bool
) -> None:
    (error,) = run_ranks(_against_the_padded_formula, 1, kind, pooling, causal)
    assert error <= 1e-10, error
