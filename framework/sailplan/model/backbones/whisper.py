"""Whisper's encoder (Radford et al., arXiv 2212.04356) for the sound of an item.

Two convolutions over time, the second of stride 2, fixed sines and cosines as positions, pre-norm blocks with LayerNorm,
exact GELU and biases, a last norm. The decoder is left out. Each chunk is encoded alone and its positions are averaged,
padding included, as transformers' audio classifier does; our own projection makes the item's vector of it.

The files have no bias of the keys. Ours has one, because megatron-core's query/key/value layer has: it starts as zeros
and changes nothing whatever it learns, as it shifts a query's scores by the same number for every key. Export drops it.
The files' positions are those computed here, and are copied as they are.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sailplan.config.schema import AudioConfig, ModelConfig
from sailplan.model.audio import mean_of_chunks
from sailplan.model.backbones.weight_map import Entry, Piece, WeightMap, grouped, same
from sailplan.model.blocks import Blocks

MODEL_TYPES = ("whisper",)
TIME_STRIDE = 2


def sinusoids(positions: int, hidden: int, like: Tensor) -> Tensor:
    """Sines, then cosines, [positions, hidden], of wavelengths from 2 pi to 10000 * 2 pi."""
    half = hidden // 2
    rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=like.device))
    angles = torch.outer(torch.arange(positions, device=like.device), rates)
    return torch.cat([angles.sin(), angles.cos()], 1).to(like.dtype)


class WhisperTower(nn.Module):
    """What the files fill: chunks of log-mel [n, frames, mel_bins] to hidden states [n, frames / 2, hidden]."""

    def __init__(self, config: AudioConfig, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = config.encoder.hidden
        self.first = nn.Conv1d(config.mel_bins, hidden, 3, padding=1)
        self.second = nn.Conv1d(hidden, hidden, 3, stride=TIME_STRIDE, padding=1)
        self.to(dtype)
        self.blocks = Blocks(config.encoder, dtype)

    def forward(self, log_mel: Tensor) -> Tensor:
        hidden = F.gelu(self.second(F.gelu(self.first(log_mel.transpose(1, 2))))).transpose(1, 2)
        return self.blocks(hidden + sinusoids(hidden.size(1), hidden.size(2), hidden))


class WhisperAudioEncoder(nn.Module):
    """Chunks of log-mel (data.spectrogram=whisper) to the item's vector, [b, output]."""

    def __init__(self, config: AudioConfig, dtype: torch.dtype, tower_on: AbstractContextManager[object]) -> None:
        super().__init__()
        with tower_on:
            self.tower = WhisperTower(config, dtype)
        self.output = nn.Linear(config.encoder.hidden, config.output, bias=False)
        nn.init.normal_(self.output.weight, std=1 / math.sqrt(config.encoder.hidden))
        self.norm = nn.RMSNorm(config.output, eps=1e-6)
        self.output.to(dtype)
        self.norm.to(dtype)

    def forward(self, log_mel: Tensor, chunk_mask: Tensor) -> Tensor:
        """log_mel [b, c, frames, mel_bins], chunk_mask bool [b, c]. Returns [b, output]; zeros where no chunk is present."""
        log_mel = log_mel.masked_fill(~chunk_mask[:, :, None, None], 0).to(self.output.weight.dtype)
        hidden = self.tower(log_mel.flatten(0, 1))
        return self.norm(mean_of_chunks(self.output(hidden.mean(1)), chunk_mask))


def weight_map(config: ModelConfig) -> WeightMap:
    shape = config.audio.encoder
    entries: list[Entry] = []
    for kind in ("weight", "bias"):
        entries += [
            same(f"audio.encoder.tower.first.{kind}", f"conv1.{kind}"),
            same(f"audio.encoder.tower.second.{kind}", f"conv2.{kind}"),
            same(f"audio.encoder.tower.blocks.block.final_layernorm.{kind}", f"layer_norm.{kind}"),
        ]
        for layer in range(shape.layers):
            ours, theirs = f"audio.encoder.tower.blocks.block.layers.{layer}", f"layers.{layer}"
            query, value = (Piece(f"{theirs}.self_attn.{name}_proj.{kind}") for name in "qv")
            key = Piece(f"{theirs}.self_attn.k_proj.weight" if kind == "weight" else None)
            entries += [
                same(f"{ours}.input_layernorm.{kind}", f"{theirs}.self_attn_layer_norm.{kind}"),
                grouped(f"{ours}.self_attention.linear_qkv.{kind}", shape, query, key, value),
                same(f"{ours}.self_attention.linear_proj.{kind}", f"{theirs}.self_attn.out_proj.{kind}"),
                same(f"{ours}.pre_mlp_layernorm.{kind}", f"{theirs}.final_layer_norm.{kind}"),
                same(f"{ours}.mlp.linear_fc1.{kind}", f"{theirs}.fc1.{kind}"),
                same(f"{ours}.mlp.linear_fc2.{kind}", f"{theirs}.fc2.{kind}"),
            ]
    left_out = (r"(model\.)?decoder\..*", r"proj_out\.weight", r"(.*\.)?embed_positions\.weight")
    return WeightMap(tuple(entries), anchor="conv1.weight", left_out=left_out)


def unsupported(found: dict[str, Any]) -> str | None:
    return "config.json has scale_embedding: scaled embeddings are not built" if found.get("scale_embedding", False) else None


def expected(config: ModelConfig, found: dict[str, Any]) -> dict[str, tuple[str, object, object]]:
    """config.json's key -> (our key, our value, the value there); a key that is not there has transformers' default."""
    audio, shape = config.audio, config.audio.encoder
    return {
        "d_model": ("model.audio.encoder.hidden", shape.hidden, found.get("d_model", 384)),
        "encoder_layers": ("model.audio.encoder.layers", shape.layers, found.get("encoder_layers", 4)),
        "encoder_attention_heads": ("model.audio.encoder.heads", shape.heads, found.get("encoder_attention_heads", 6)),
        "encoder_ffn_dim": ("model.audio.encoder.feed_forward", shape.feed_forward, found.get("encoder_ffn_dim", 1536)),
        "num_mel_bins": ("model.audio.mel_bins", audio.mel_bins, found.get("num_mel_bins", 80)),
        "activation_function": ("model.audio.encoder.activation", shape.activation, found.get("activation_function", "gelu")),
        "model_type (norm)": ("model.audio.encoder.norm", shape.norm, "layer"),
        "model_type (norm's epsilon)": ("model.audio.encoder.norm_epsilon", shape.norm_epsilon, 1e-5),
        "model_type (feed-forward)": ("model.audio.encoder.gated", shape.gated, False),
        "model_type (biases)": ("model.audio.encoder.bias", shape.bias, True),
        "model_type (key/value heads)": ("model.audio.encoder.key_value_heads", shape.key_value_heads or shape.heads, shape.heads),
        "model_type (head norms)": ("model.audio.encoder.query_key_norm", shape.query_key_norm, False),
        "model_type (causal)": ("model.audio.encoder.causal", shape.causal, False),
    }
