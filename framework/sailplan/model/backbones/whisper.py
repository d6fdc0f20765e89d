"""Whisper's encoder (Radford et al., arXiv 2212.04356) for the sound of an item.

Two convolutions over time, the second of stride 2, fixed sines and cosines as positions, pre-norm
blocks with LayerNorm, exact GELU and biases, a last norm. The decoder is left out. Each chunk is
encoded alone and its positions are averaged, padding included, as transformers' audio classifier
does; our own projection makes the item's vector of it.

The files have no bias of the keys. Ours has one, because megatron-core's query/key/value layer has:
it starts as zeros and changes nothing whatever it learns, as it shifts a query's scores by the same
number for every key. Export drops it.
The files' positions are those computed here, and are copied as they are.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sailplan.config.schema import AudioConfig, ModelConfig
from sailplan.model.audio import mean_of_chunks
from sailplan.model.backbones.plain import Names, block_entries, expected_shape
from sailplan.model.backbones.weight_map import Entry, Piece, WeightMap, same
from sailplan.model.blocks import Blocks

MODEL_TYPES = ("whisper",)
NAMES = Names("self_attn_layer_norm", "self_attn.out_proj", "final_layer_norm", "fc1", "fc2")
TIME_STRIDE = 2


def sinusoids(positions: int, hidden: int, like: Tensor) -> Tensor:
    """Sines, then cosines, [positions, hidden], of wavelengths from 2 pi to 10000 * 2 pi."""
    half = hidden // 2
    rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=like.device))
    angles = torch.outer(torch.arange(positions, device=like.device), rates)
    return torch.cat([angles.sin(), angles.cos()], 1).to(like.dtype)


class WhisperTower(nn.Module):
    """What the files fill: chunks of log-mel [n, frames, mel_bins] to hidden states [n, frames /
    2, hidden].
    """

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

    def __init__(
        self, config: AudioConfig, dtype: torch.dtype, tower_on: AbstractContextManager[object]
    ) -> None:
        super().__init__()
        with tower_on:
            self.tower = WhisperTower(config, dtype)
        self.output = nn.Linear(config.encoder.hidden, config.output, bias=False)
        nn.init.normal_(self.output.weight, std=1 / math.sqrt(config.encoder.hidden))
        self.norm = nn.RMSNorm(config.output, eps=1e-6)
        self.output.to(dtype)
        self.norm.to(dtype)

    def forward(self, log_mel: Tensor, chunk_mask: Tensor) -> Tensor:
        """log_mel [b, c, frames, mel_bins], chunk_mask bool [b, c].

        Returns [b, output]; zeros where no chunk is present.
        """
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
            theirs = f"layers.{layer}"
            query, value = (Piece(f"{theirs}.self_attn.{name}_proj.{kind}") for name in "qv")
            key = Piece(f"{theirs}.self_attn.k_proj.weight" if kind == "weight" else None)
            entries += block_entries(
                f"audio.encoder.tower.blocks.block.layers.{layer}",
                theirs,
                kind,
                shape,
                NAMES,
                query,
                key,
                value,
            )
    left_out = (r"(model\.)?decoder\..*", r"proj_out\.weight", r"(.*\.)?embed_positions\.weight")
    return WeightMap(tuple(entries), anchor="conv1.weight", left_out=left_out)


def unsupported(found: dict[str, object]) -> str | None:
    return (
        "config.json has scale_embedding: scaled embeddings are not built"
        if found.get("scale_embedding", False)
        else None
    )


def expected(
    config: ModelConfig, found: dict[str, object]
) -> dict[str, tuple[str, object, object]]:
    """config.json's key -> (our key, our value, the value there); a key that is not there has
    transformers' default.
    """
    sizes = {
        "hidden": ("d_model", 384),
        "layers": ("encoder_layers", 4),
        "heads": ("encoder_attention_heads", 6),
        "feed_forward": ("encoder_ffn_dim", 1536),
    }
    return {
        "num_mel_bins": (
            "model.audio.mel_bins",
            config.audio.mel_bins,
            found.get("num_mel_bins", 80),
        ),
        **expected_shape(
            "model.audio.encoder",
            config.audio.encoder,
            found,
            sizes,
            ("activation_function", "gelu"),
            1e-5,
        ),
    }
