"""CLAP's audio encoder with feature fusion (`enable_fusion`, such as laion/clap-htsat-fused;
arXiv 2211.06687, section 3.3).

A recording comes as four spectrograms: the whole one, shrunk in time to a chunk's length, and three
crops of a chunk's length, from its first, second and last third. The crops' patches are three times
as long in time, so that side by side they make a picture as wide as the whole one's, and an
attentional fusion weighs the two against each other at each place and channel (Dai et al., arXiv
2009.14082). A recording of at most a chunk has no crops: its picture is the whole one's alone.

The chunk mask says which: its first column is whether there is a sound, the others whether it is
longer than a chunk. The fusion runs for every row and is taken for those that are longer, so that
ranks train the same parameters whatever they hold. (The published front end calls a random
recording of a batch longer where none is; a row here does not depend on its neighbours.)

The batch norms keep their published statistics, as that of the input (see `clap`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sailplan.config.fields import JsonObject
from sailplan.config.schema import AudioConfig, ModelConfig, SwinShape
from sailplan.model.backbones import clap
from sailplan.model.backbones.clap import EPSILON, ClapAudioEncoder, ClapTower, draw
from sailplan.model.backbones.weight_map import Entry, WeightMap, same
from sailplan.model.check import REDUCTION

MODEL_TYPES = clap.MODEL_TYPES
PICTURES = 4  # the whole recording and three crops


class FixedNorm(nn.Module):
    """A batch norm of [n, channels, ., .] with statistics that stay."""

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain, self.shift = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, picture: Tensor) -> Tensor:
        mean, factor = (
            each[:, None, None] for each in (self.mean, torch.rsqrt(self.variance + EPSILON))
        )
        normalised = ((picture.to(factor.dtype) - mean) * factor).to(self.gain.dtype)
        return normalised * self.gain[:, None, None] + self.shift[:, None, None]


class AttentionalFusion(nn.Module):
    """Two pictures [n, h, g, g] to 2 w first + 2 (1 - w) second; w in 0..1 from their sum at
    each place, and from its mean over places.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        inner = hidden // REDUCTION
        self.local, self.everywhere = (
            nn.Sequential(
                nn.Conv2d(hidden, inner, 1),
                FixedNorm(inner),
                nn.ReLU(),
                nn.Conv2d(inner, hidden, 1),
                FixedNorm(hidden),
            )
            for _ in range(2)
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        both = first + second
        weight = torch.sigmoid(self.local(both) + self.everywhere(both.mean((2, 3), keepdim=True)))
        return 2 * first * weight + 2 * second * (1 - weight)


class FusedClapTower(ClapTower):
    """Recordings of log-mel in decibels [n, 4, frames, mel_bins], longer bool [n], to hidden
    states [n, positions, h] of the last stage.
    """

    def __init__(self, swin: SwinShape, mel_bins: int, dtype: torch.dtype) -> None:
        super().__init__(swin, mel_bins, dtype)
        size = (swin.patch, 3 * swin.patch)
        self.crops = nn.Conv2d(1, swin.hidden, size, stride=size)
        self.fusion = AttentionalFusion(swin.hidden)
        for part in (self.crops, self.fusion):
            draw(part)
            part.to(dtype)

    def embedded(self, log_mel: Tensor, longer: Tensor) -> Tensor:  # type: ignore[override]
        pictures = self.folded(log_mel.flatten(0, 1)).unflatten(
            0, log_mel.shape[:2]
        )  # [n, 4, 1, image, image]
        whole = self.embedding(pictures[:, 0])
        crops = (
            self.crops(pictures[:, 1:].flatten(0, 1))
            .unflatten(0, (-1, PICTURES - 1))
            .permute(0, 2, 3, 1, 4)
            .flatten(3)
        )
        crops = F.pad(crops, (0, whole.size(-1) - crops.size(-1)))
        return torch.where(longer[:, None, None, None], self.fusion(whole, crops), whole)


class FusedClapAudioEncoder(ClapAudioEncoder):
    """Recordings of log-mel (data.spectrogram=clap_fusion) to the item's vector, [b, output]."""

    def __init__(
        self, config: AudioConfig, dtype: torch.dtype, tower_on: AbstractContextManager[object]
    ) -> None:
        super().__init__(config, dtype, tower_on, tower=FusedClapTower)

    def forward(self, log_mel: Tensor, chunk_mask: Tensor) -> Tensor:
        """log_mel [b, 4, frames, mel_bins], chunk_mask bool [b, 4].

        Returns [b, output]; zeros where there is no sound.

        Raises ValueError for another number of spectrograms.
        """
        if log_mel.size(1) != PICTURES:
            raise ValueError(
                f"{log_mel.size(1)} spectrograms a recording: expected {PICTURES}, as "
                "data.spectrogram=clap_fusion makes them"
            )
        present, longer = chunk_mask[:, 0], chunk_mask.all(1)
        log_mel = log_mel.masked_fill(~chunk_mask[:, :, None, None], 0)
        return self.norm(
            self.chunks(log_mel, longer) * present[:, None].to(self.first.weight.dtype)
        )


def weight_map(config: ModelConfig) -> WeightMap:
    plain = clap.weight_map(config)
    ours, theirs = "audio.encoder.tower", "audio_encoder.patch_embed"
    entries: list[Entry] = [
        same(f"{ours}.crops.{kind}", f"{theirs}.mel_conv2d.{kind}") for kind in ("weight", "bias")
    ]
    for name, there, pooled in (
        ("local", "local_att", 0),
        ("everywhere", "global_att", 1),
    ):  # theirs has its mean over places as a layer
        for layer in (0, 3):
            entries += [
                same(
                    f"{ours}.fusion.{name}.{layer}.{kind}",
                    f"{theirs}.fusion_model.{there}.{layer + pooled}.{kind}",
                )
                for kind in ("weight", "bias")
            ]
        for layer in (1, 4):
            norm = {
                "gain": "weight",
                "shift": "bias",
                "mean": "running_mean",
                "variance": "running_var",
            }
            entries += [
                same(
                    f"{ours}.fusion.{name}.{layer}.{key}",
                    f"{theirs}.fusion_model.{there}.{layer + pooled}.{kind}",
                )
                for key, kind in norm.items()
            ]
    left_out = (*plain.left_out, r"(.*\.)?fusion_model\..*\.num_batches_tracked")
    return WeightMap((*plain.entries, *entries), plain.anchor, left_out, plain.constants)


def unsupported(found: JsonObject) -> str | None:
    found = found.get("audio_config", found)
    if not found.get("enable_fusion", False):
        return "enable_fusion is false: expected weights with fusion, such as laion/clap-htsat-fused; set audio=clap for these"
    if (
        found.get("fusion_type") == "channel_map"
        or found.get("aff_block_r", REDUCTION) != REDUCTION
    ):
        return f"fusion_type is channel_map or aff_block_r is not {REDUCTION}: expected the fusion of laion/clap-htsat-fused"
    return clap.unsupported(found | {"enable_fusion": False, "fusion_type": None})


def expected(
    config: ModelConfig, found: dict[str, object]
) -> dict[str, tuple[str, object, object]]:
    return clap.expected(config, found)
