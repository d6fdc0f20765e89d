"""CLAP's audio encoder (Wu et al., arXiv 2211.06687): the Swin transformer HTSAT over a folded
spectrogram.

A chunk's log-mel is normalised per mel bin by the running statistics of a batch norm, stretched
over time to fill image^2 / mel_bins frames, cut into image / mel_bins strips of time, and the
strips are stacked into a square picture. The picture's patches go through stages of blocks that
attend within windows, every second block within windows moved by half a window; between stages four
neighbours become one of twice the width. The mean of the last stage, through CLAP's projection of
two layers and L2-normalised, is the chunk's vector, and the item's is the mean over its chunks.

The batch norm never sees a batch: its statistics stay as they were published, or a row would depend
on its neighbours and on the number of ranks. Its gain and shift are trained. There is no dropout.
Long recordings are cut into chunks; files with feature fusion (`enable_fusion`: four spectrograms
of a recording) are those of `clap_fusion`.

Tensor-parallel ranks hold whole copies (28 million parameters in the published size): their inputs
and gradients are the same, so nothing is exchanged. Under data parallelism they are sharded with
the rest.

Shape legend: n chunks, g side of the picture's grid, h width of the stage, w positions of a window.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sailplan.config.fields import JsonObject
from sailplan.config.schema import AudioConfig, ModelConfig, SwinShape
from sailplan.model.audio import mean_of_chunks
from sailplan.model.backbones.weight_map import Entry, WeightMap, same
from sailplan.model.blocks import initial_deviation

MODEL_TYPES = ("clap", "clap_audio_model")
EPSILON = 1e-5
MEAN, VARIANCE = (
    -40.0,
    30.0**2,
    # decibels, of an encoder that is drawn: about those of speech; files bring those of their
    # training
)
WINDOW_MASK = (
    -100.0
)  # added to the scores of positions that moved windows join from opposite ends of the picture


def relative_index(window: int) -> Tensor:
    """Which row of the bias table a pair of positions of a window uses, int64 [w, w]: their
    distance down and across.
    """
    places = torch.stack(
        torch.meshgrid(*[torch.arange(window, device="cpu")] * 2, indexing="ij")
    ).flatten(1)
    down, across = places[:, :, None] - places[:, None, :] + window - 1
    return down * (2 * window - 1) + across


def joined_regions(grid: int, window: int, move: int) -> Tensor:
    """Scores to add within each window of a moved picture, float32 [windows, w, w]: 0, or
    WINDOW_MASK between regions that are not neighbours.
    """
    place = torch.arange(grid, device="cpu")
    region = (place >= grid - window).long() + (place >= grid - move).long()
    of_window = windows_of((3 * region[:, None] + region)[None, :, :, None], window)[..., 0]
    return torch.where(of_window[:, None] == of_window[:, :, None], 0.0, WINDOW_MASK)


def windows_of(picture: Tensor, window: int) -> Tensor:
    """[n, g, g, h] to [n * windows, w, h]."""
    cut = picture.unflatten(2, (-1, window)).unflatten(
        1, (-1, window)
    )  # [n, rows, window, columns, window, h]
    return cut.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def picture_of(windows: Tensor, grid: int, window: int) -> Tensor:
    """The way back from `windows_of`."""
    cut = windows.unflatten(1, (window, window)).unflatten(0, (-1, grid // window, grid // window))
    return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class WindowBlock(nn.Module):
    """Pre-norm attention within windows, and a feed-forward.

    move: by how much the windows are moved, 0 for none.
    """

    index: Tensor
    joined: Tensor | None

    def __init__(
        self, hidden: int, heads: int, feed_forward: int, grid: int, window: int, move: int
    ) -> None:
        super().__init__()
        self.heads, self.grid, self.window, self.move = heads, grid, window, move
        self.attention_norm, self.mlp_norm = (
            nn.LayerNorm(hidden, eps=EPSILON),
            nn.LayerNorm(hidden, eps=EPSILON),
        )
        self.query, self.key, self.value, self.output = (
            nn.Linear(hidden, hidden) for _ in range(4)
        )
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.fc1, self.fc2 = nn.Linear(hidden, feed_forward), nn.Linear(feed_forward, hidden)
        self.register_buffer("index", relative_index(window), persistent=False)
        self.register_buffer(
            "joined", joined_regions(grid, window, move) if move else None, persistent=False
        )

    def forward(self, picture: Tensor) -> Tensor:
        """[n, g, g, h] to [n, g, g, h]."""
        moved = (
            torch.roll(self.attention_norm(picture), (-self.move, -self.move), (1, 2))
            if self.move
            else self.attention_norm(picture)
        )
        windows = windows_of(moved, self.window)
        query, key, value = (
            part(windows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        bias = self.bias_table[self.index].permute(2, 0, 1)  # [heads, w, w]
        if self.joined is not None:
            bias = (bias + self.joined[:, None].to(bias.dtype)).repeat(len(picture), 1, 1, 1)
        found = (
            F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
            .transpose(1, 2)
            .flatten(2)
        )
        found = picture_of(self.output(found), self.grid, self.window)
        picture = picture + (
            torch.roll(found, (self.move, self.move), (1, 2)) if self.move else found
        )
        return picture + self.fc2(F.gelu(self.fc1(self.mlp_norm(picture))))


class Merge(nn.Module):
    """Four neighbours become one position of twice the width: [n, g, g, h] to [n, g / 2, g / 2,
    2 h].
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.reduction = (
            nn.LayerNorm(4 * hidden, eps=EPSILON),
            nn.Linear(4 * hidden, 2 * hidden, bias=False),
        )

    def forward(self, picture: Tensor) -> Tensor:
        four = torch.cat(
            [picture[:, row::2, column::2] for column in range(2) for row in range(2)], -1
        )
        return self.reduction(self.norm(four))


def draw(part: nn.Module) -> None:
    """Fresh weights of the matrices and convolutions."""
    for module in part.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=initial_deviation(module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ClapTower(nn.Module):
    """What every such file fills: chunks of log-mel in decibels [n, frames, mel_bins] to hidden
    states [n, positions, h] of the last stage.
    """

    bin_mean: Tensor
    bin_variance: Tensor

    def __init__(self, swin: SwinShape, mel_bins: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.image, self.strips = swin.image, swin.image // mel_bins
        self.bin_gain, self.bin_shift = (
            nn.Parameter(torch.ones(mel_bins)),
            nn.Parameter(torch.zeros(mel_bins)),
        )
        self.register_buffer("bin_mean", torch.full((mel_bins,), MEAN))
        self.register_buffer("bin_variance", torch.full((mel_bins,), VARIANCE))
        self.embedding = nn.Conv2d(1, swin.hidden, swin.patch, stride=swin.patch)
        self.embedding_norm = nn.LayerNorm(swin.hidden, eps=EPSILON)
        layers: list[nn.Module] = []
        for stage, (depth, heads) in enumerate(zip(swin.layers, swin.heads, strict=True)):
            hidden, grid = swin.hidden * 2**stage, swin.image // swin.patch // 2**stage
            half = swin.window // 2 if grid > swin.window else 0
            layers += [
                WindowBlock(
                    hidden, heads, swin.feed_forward * hidden, grid, swin.window, half * (layer % 2)
                )
                for layer in range(depth)
            ]
            if stage < len(swin.layers) - 1:
                layers.append(Merge(hidden))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(swin.hidden * 2 ** (len(swin.layers) - 1), eps=EPSILON)
        draw(self)
        self.to(dtype)

    def folded(self, log_mel: Tensor) -> Tensor:
        """Normalised and folded into a picture: [n, frames, mel_bins] to [n, 1, image, image],
        the picture's rows being mel bins of strips.

        Raises ValueError where there are more frames than the picture holds.
        """
        frames, bins = log_mel.shape[1:]
        width = self.image * self.strips
        if frames > width:
            raise ValueError(
                f"{frames} frames of log-mel do not fit: expected at most {width}; lower "
                "data.audio_chunk_seconds"
            )
        factor = torch.rsqrt(self.bin_variance + EPSILON)
        normalised = (log_mel.to(factor.dtype) - self.bin_mean) * factor
        if frames < width:
            normalised = F.interpolate(
                normalised[:, None], (width, bins), mode="bicubic", align_corners=True
            )[:, 0]
        scaled = normalised.to(self.bin_gain.dtype) * self.bin_gain + self.bin_shift
        return scaled.unflatten(1, (self.strips, self.image)).transpose(2, 3).flatten(1, 2)[:, None]

    def embedded(self, log_mel: Tensor) -> Tensor:
        """The patches, [n, h, g, g]."""
        return self.embedding(self.folded(log_mel))

    def forward(self, *inputs: Tensor) -> Tensor:
        picture = self.embedding_norm(self.embedded(*inputs).permute(0, 2, 3, 1))
        for layer in self.layers:
            picture = layer(picture)
        return self.norm(picture).flatten(1, 2)


class ClapAudioEncoder(nn.Module):
    """Chunks of log-mel (data.spectrogram=clap) to the item's vector, [b, output]."""

    def __init__(
        self,
        config: AudioConfig,
        dtype: torch.dtype,
        tower_on: AbstractContextManager[object],
        tower: type[ClapTower] = ClapTower,
    ) -> None:
        super().__init__()
        with tower_on:
            self.tower = tower(config.swin, config.mel_bins, dtype)
        hidden = self.tower.norm.normalized_shape[0]
        self.first, self.second = (
            nn.Linear(hidden, config.output),
            nn.Linear(config.output, config.output),
        )
        for linear in (self.first, self.second):
            nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
            nn.init.zeros_(linear.bias)
        self.norm = nn.RMSNorm(config.output, eps=1e-6)
        for module in (self.first, self.second, self.norm):
            module.to(dtype)

    def chunks(self, *inputs: Tensor) -> Tensor:
        """The tower's inputs, such as [n, frames, mel_bins], to CLAP's own embeddings, of length
        1, [n, output].
        """
        return F.normalize(self.second(F.relu(self.first(self.tower(*inputs).mean(1)))), dim=-1)

    def forward(self, log_mel: Tensor, chunk_mask: Tensor) -> Tensor:
        """log_mel [b, c, frames, mel_bins], chunk_mask bool [b, c].

        Returns [b, output]; zeros where no chunk is present.
        """
        log_mel = log_mel.masked_fill(~chunk_mask[:, :, None, None], 0)
        return self.norm(mean_of_chunks(self.chunks(log_mel.flatten(0, 1)), chunk_mask))


def weight_map(config: ModelConfig) -> WeightMap:
    swin = config.audio.swin
    ours, theirs = "audio.encoder.tower", "audio_encoder"
    entries: list[Entry] = [
        same(f"{ours}.bin_gain", f"{theirs}.batch_norm.weight"),
        same(f"{ours}.bin_shift", f"{theirs}.batch_norm.bias"),
        same(f"{ours}.bin_mean", f"{theirs}.batch_norm.running_mean"),
        same(f"{ours}.bin_variance", f"{theirs}.batch_norm.running_var"),
    ]
    for kind in ("weight", "bias"):
        entries += [
            same(f"{ours}.embedding.{kind}", f"{theirs}.patch_embed.proj.{kind}"),
            same(f"{ours}.embedding_norm.{kind}", f"{theirs}.patch_embed.norm.{kind}"),
            same(f"{ours}.norm.{kind}", f"{theirs}.norm.{kind}"),
            same(f"audio.encoder.first.{kind}", f"/audio_projection.linear1.{kind}", drawn=True),
            same(f"audio.encoder.second.{kind}", f"/audio_projection.linear2.{kind}", drawn=True),
        ]
    constants: list[tuple[str, str]] = []
    layer = 0
    for stage, depth in enumerate(swin.layers):
        for block in range(depth):
            here, there = f"{ours}.layers.{layer}", f"{theirs}.layers.{stage}.blocks.{block}"
            entries.append(
                same(f"{here}.bias_table", f"{there}.attention.self.relative_position_bias_table")
            )
            constants.append((f"{here}.index", f"{there}.attention.self.relative_position_index"))
            for kind in ("weight", "bias"):
                entries += [
                    same(f"{here}.{name}.{kind}", f"{there}.attention.self.{name}.{kind}")
                    for name in ("query", "key", "value")
                ]
                entries += [
                    same(f"{here}.output.{kind}", f"{there}.attention.output.dense.{kind}"),
                    same(f"{here}.attention_norm.{kind}", f"{there}.layernorm_before.{kind}"),
                    same(f"{here}.mlp_norm.{kind}", f"{there}.layernorm_after.{kind}"),
                    same(f"{here}.fc1.{kind}", f"{there}.intermediate.dense.{kind}"),
                    same(f"{here}.fc2.{kind}", f"{there}.output.dense.{kind}"),
                ]
            layer += 1
        if stage < len(swin.layers) - 1:
            here, there = f"{ours}.layers.{layer}", f"{theirs}.layers.{stage}.downsample"
            entries.append(same(f"{here}.reduction.weight", f"{there}.reduction.weight"))
            entries += [
                same(f"{here}.norm.{kind}", f"{there}.norm.{kind}") for kind in ("weight", "bias")
            ]
            layer += 1
    left_out = (
        r"text_(model|projection)\..*",
        r"logit_scale_[at]",
        r"(.*\.)?batch_norm\.num_batches_tracked",
    )
    return WeightMap(
        tuple(entries), f"{theirs}.patch_embed.proj.weight", left_out, tuple(constants)
    )


def unsupported(found: JsonObject) -> str | None:
    found = found.get("audio_config", found)
    if found.get("enable_fusion", False):
        return "enable_fusion is true: expected weights without fusion, such as laion/clap-htsat-unfused; set audio=clap_fusion for these"
    if found.get("fusion_type") or found.get("patch_embed_input_channels", 1) != 1:
        return "fusion_type or patch_embed_input_channels is set: expected one spectrogram, as in laion/clap-htsat-unfused"
    patch, stride = (
        value if isinstance(value, list) else [value] * 2
        for value in (found.get("patch_size", 4), found.get("patch_stride", [4, 4]))
    )
    if patch != stride or patch[0] != patch[1]:
        return f"patch_size {patch} and patch_stride {stride}: expected equal squares, patches that overlap are not built"
    if not found.get("enable_patch_layer_norm", True) or not found.get("qkv_bias", True):
        return "enable_patch_layer_norm or qkv_bias is false: expected both, as in laion/clap-htsat-unfused"
    return None


def expected(config: ModelConfig, found: JsonObject) -> dict[str, tuple[str, object, object]]:
    """config.json's key -> (our key, our value, the value there); a key that is not there has
    transformers' default.
    """
    audio, swin = config.audio, config.audio.swin
    found = found.get("audio_config", found)
    patch = found.get("patch_size", 4)
    return {
        "patch_embeds_hidden_size": (
            "model.audio.swin.hidden",
            swin.hidden,
            found.get("patch_embeds_hidden_size", 96),
        ),
        "depths": (
            "model.audio.swin.layers",
            list(swin.layers),
            list(found.get("depths", [2, 2, 6, 2])),
        ),
        "num_attention_heads": (
            "model.audio.swin.heads",
            list(swin.heads),
            list(found.get("num_attention_heads", [4, 8, 16, 32])),
        ),
        "window_size": ("model.audio.swin.window", swin.window, found.get("window_size", 8)),
        "patch_size": (
            "model.audio.swin.patch",
            swin.patch,
            patch[0] if isinstance(patch, list) else patch,
        ),
        "spec_size": ("model.audio.swin.image", swin.image, found.get("spec_size", 256)),
        "mlp_ratio": (
            "model.audio.swin.feed_forward",
            float(swin.feed_forward),
            float(found.get("mlp_ratio", 4.0)),
        ),
        "num_mel_bins": ("model.audio.mel_bins", audio.mel_bins, found.get("num_mel_bins", 64)),
        "projection_dim": ("model.audio.output", audio.output, found.get("projection_dim", 512)),
        "hidden_act": ("the activation", "gelu", found.get("hidden_act", "gelu")),
        "projection_hidden_act": (
            "the projection's activation",
            "relu",
            found.get("projection_hidden_act", "relu"),
        ),
        "layer_norm_eps": ("the norms' epsilon", EPSILON, found.get("layer_norm_eps", 1e-5)),
    }
