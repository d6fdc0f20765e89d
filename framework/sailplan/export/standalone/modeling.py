"""Any subset of text, pictures and sound as one vector, in plain PyTorch: no distributed
training, no other package.

The sequence of a row is its sound (one token), its pictures (a few tokens) and its text, read by
one stack of blocks and pooled. The rows of a batch are packed, so a row's vector does not depend on
its neighbours.
"""

# A template: what it lacks or overrides comes together when `export.bundle` writes it.
# mypy: disable-error-code="arg-type, attr-defined, override"
from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sailplan.data.packing import OmniInputs, Runs, SequenceLayout
from sailplan.export.standalone.configuration import SailplanConfig
from sailplan.export.standalone.items import BITS
from sailplan.model.attention import by_length, rotated
from sailplan.model.audio import AudioAdapter, AudioEncoder
from sailplan.model.backbones.clap import WindowBlock, joined_regions, relative_index
from sailplan.model.backbones.qwen_vl import NORM_EPSILON, QwenVisionEncoder
from sailplan.model.blocks import ACTIVATIONS, head_size, rotary_angles
from sailplan.model.tower import SOUND, VISION, Tower
from sailplan.model.vision import Perceiver

PUBLISHED = ("published", "processor")  # settings that transformers reads


class Settings(SimpleNamespace):
    """Nested settings by attribute."""

    @classmethod
    def of(cls, values: object) -> Any:
        if not isinstance(values, dict):
            return values
        return cls(
            **{key: each if key in PUBLISHED else cls.of(each) for key, each in values.items()}
        )


AudioConfig = ModelConfig = ParallelConfig = SwinShape = TransformerShape = VisionConfig = Settings


class Sequences(NamedTuple):
    """Rows of a packed sequence, shortest first."""

    runs: Runs  # (rows, length)
    rotation: tuple[Tensor, Tensor] | None = (
        None  # cosines and sines of the rotary angles, [p, 1, d]
    )

    @classmethod
    def of(cls, runs: Runs, ends: Tensor | None, device: torch.device) -> Sequences:
        return cls(runs)

    def rotated_by(self, angles: Tensor, dtype: torch.dtype) -> Sequences:
        """angles: float32 [p, d]."""
        return self._replace(
            rotation=(angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None])
        )


def norm_of(shape: Settings, size: int, dtype: torch.dtype) -> nn.Module:
    return (nn.RMSNorm if shape.norm == "rms" else nn.LayerNorm)(
        size, eps=shape.norm_epsilon, dtype=dtype
    )


class Attention(nn.Module):
    """Self-attention within rows; the heads of the fused projection lie group by group: its
    queries, its key, its value.
    """

    def __init__(self, shape: Settings, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.groups, self.causal = (
            head_size(shape),
            shape.key_value_heads or shape.heads,
            shape.causal,
        )
        self.queries = shape.heads // self.groups
        bias = shape.bias or shape.query_key_value_bias
        self.linear_qkv = nn.Linear(
            shape.hidden, (shape.heads + 2 * self.groups) * self.size, bias=bias, dtype=dtype
        )
        self.linear_proj = nn.Linear(
            shape.heads * self.size, shape.hidden, bias=shape.bias, dtype=dtype
        )
        normed = shape.query_key_norm
        self.q_layernorm = (
            nn.RMSNorm(self.size, eps=shape.norm_epsilon, dtype=dtype) if normed else nn.Identity()
        )
        self.k_layernorm = (
            nn.RMSNorm(self.size, eps=shape.norm_epsilon, dtype=dtype) if normed else nn.Identity()
        )

    def forward(self, hidden: Tensor, rows: Sequences) -> Tensor:
        """hidden packed [p, h]."""
        heads = self.linear_qkv(hidden).unflatten(1, (self.groups, self.queries + 2, self.size))
        query, key, value = heads.split([self.queries, 1, 1], 2)
        query, key, value = (
            self.q_layernorm(query.flatten(1, 2)),
            self.k_layernorm(key.flatten(1, 2)),
            value.flatten(1, 2),
        )
        if rows.rotation is not None:
            query, key = rotated(query, rows.rotation), rotated(key, rows.rotation)
        return self.linear_proj(
            by_length(query, key, value, rows.runs, self.causal, 0.0).flatten(1)
        )


class FeedForward(nn.Module):
    def __init__(self, shape: Settings, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation, self.gated = ACTIVATIONS[shape.activation], shape.gated
        self.linear_fc1 = nn.Linear(
            shape.hidden,
            shape.feed_forward * (2 if shape.gated else 1),
            bias=shape.bias,
            dtype=dtype,
        )
        self.linear_fc2 = nn.Linear(shape.feed_forward, shape.hidden, bias=shape.bias, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.linear_fc1(hidden)
        if self.gated:
            gate, up = hidden.chunk(2, -1)
            return self.linear_fc2(self.activation(gate) * up)
        return self.linear_fc2(self.activation(hidden))


class Layer(nn.Module):
    """A pre-norm block."""

    def __init__(self, shape: Settings, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm, self.pre_mlp_layernorm = (
            norm_of(shape, shape.hidden, dtype),
            norm_of(shape, shape.hidden, dtype),
        )
        self.self_attention, self.mlp = Attention(shape, dtype), FeedForward(shape, dtype)

    def forward(self, hidden: Tensor, rows: Sequences) -> Tensor:
        hidden = hidden + self.self_attention(self.input_layernorm(hidden), rows)
        return hidden + self.mlp(self.pre_mlp_layernorm(hidden))


class Stack(nn.Module):
    def __init__(self, shape: Settings, dtype: torch.dtype, final_norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(shape, dtype) for _ in range(shape.layers))
        self.final_layernorm = norm_of(shape, shape.hidden, dtype) if final_norm else nn.Identity()


class Blocks(nn.Module):
    """A stack of blocks and a final norm; a norm alone where `shape.layers` is 0."""

    def __init__(
        self,
        shape: Settings,
        dtype: torch.dtype,
        rope_base: float | None = None,
        *,
        final_norm: bool = True,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.rope_base, self.head_size, self.layers = rope_base, head_size(shape), shape.layers
        if shape.layers:
            self.block: nn.Module = Stack(shape, dtype, final_norm)
        else:
            self.block = norm_of(shape, shape.hidden, dtype) if final_norm else nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        rows: Sequences | None = None,
        angles: Tensor | None = None,
        after: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """hidden [b, s, h], rows of one length; or with `rows` packed, [p, h].

        Returns the same shape.

        angles: rotary angles float32 [s, d] or packed [p, d]. after: changes each layer's output.
        """
        if not self.layers:
            return self.block(hidden)
        shape = hidden.shape
        if rows is None:
            rows = Sequences(((shape[0], shape[1]),))
            if angles is None and self.rope_base is not None:
                angles = rotary_angles(
                    torch.arange(shape[1], device=hidden.device), self.head_size, self.rope_base
                )
            angles = None if angles is None else angles.repeat(shape[0], 1)
            hidden = hidden.flatten(0, 1)
        if angles is not None:
            rows = rows.rotated_by(angles, hidden.dtype)
        for number, layer in enumerate(self.block.layers):  # type: ignore[arg-type]
            hidden = layer(hidden, rows)
            if after is not None:
                hidden = after(number, hidden.reshape(shape)).reshape(hidden.shape)
        return self.block.final_layernorm(hidden).reshape(shape)  # type: ignore[operator]


class Merger(nn.Module):
    """Squares of patches [n, p, h] that follow each other to tokens [n, p / square, output]."""

    def __init__(
        self, hidden: int, square: int, output: int, dtype: torch.dtype, *, norm_of_square: bool
    ) -> None:
        super().__init__()
        width = hidden * square
        self.square, self.norm_of_square = square, norm_of_square
        self.norm = nn.LayerNorm(width if norm_of_square else hidden, eps=NORM_EPSILON, dtype=dtype)
        self.mlp = nn.ModuleDict(
            {
                "linear_fc1": nn.Linear(width, width, dtype=dtype),
                "linear_fc2": nn.Linear(width, output, dtype=dtype),
            }
        )

    def forward(self, hidden: Tensor) -> Tensor:
        squares = hidden.unflatten(1, (-1, self.square))
        squares = (
            self.norm(squares.flatten(2)) if self.norm_of_square else self.norm(squares).flatten(2)
        )
        return self.mlp["linear_fc2"](F.gelu(self.mlp["linear_fc1"](squares)))


class OmniTower(nn.Module):
    """The towers and what joins them."""

    sharing = None

    def __init__(self, config: Settings, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype, self.layout = config, dtype, SequenceLayout.of(config)
        hidden = config.tower.hidden
        self.text = nn.Embedding(config.vocabulary, hidden, dtype=dtype)
        own_tokens = config.vision.backbone == "qwen3_vl"
        self.vision = (
            QwenVisionEncoder(config.vision, hidden, dtype)
            if own_tokens
            else VISION[config.vision.backbone](config.vision, dtype)
        )
        self.perceiver = (
            nn.Module()
            if own_tokens
            else Perceiver(config.vision, self.vision.width, hidden, dtype)
        )
        if config.audio.backbone == "own":
            sound: nn.Module = AudioEncoder(config.audio, config.rope_base, dtype)
        else:
            sound = SOUND[config.audio.backbone](config.audio, dtype, nullcontext())
        self.audio = nn.ModuleDict(
            {"encoder": sound, "adapter": AudioAdapter(config.audio.output, hidden, dtype)}
        )
        self.tower = Tower(config, dtype, nullcontext(), sequence_parallel=False)

    def _shared(self, encode: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Sequence[Tensor]:
        return encode(*inputs)


class SailplanModel(PreTrainedModel):
    """Vectors of rows as `AutoProcessor` makes them: `pooler_output`, float32 [b, D], not
    normalised.

    Two rows are compared by the cosine of their vectors, whole or cut to one of `config.prefixes`.
    """

    config_class = SailplanConfig
    main_input_name = "input_ids"
    _no_split_modules = ("Layer",)  # type: ignore[assignment]

    def __init__(self, config: SailplanConfig) -> None:
        super().__init__(config)
        self.encoder = OmniTower(Settings.of(config.settings), torch.get_default_dtype())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, WindowBlock):  # buffers that no file holds
            module.index = relative_index(module.window)
            module.joined = (
                joined_regions(module.grid, module.window, module.move) if module.move else None
            )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        text_mask: Tensor,
        modalities: Tensor,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        pixel_sizes: Tensor | None = None,
        audio_values: Tensor | None = None,
        audio_mask: Tensor | None = None,
        **_: object,
    ) -> BaseModelOutputWithPooling:
        """input_ids [b, t] prompt and text; text_mask: the item's own; modalities int64 [b]:
        BITS of what a row shows.

        pixel_values uint8 [b, f, 3, height, width], or with pixel_sizes [b, f, 2] patches [b, f, p,
        3 s^2]; audio_values [b, c, frames, bins]; masks bool [b, t], [b, f], [b, c].
        """
        self.encoder.dtype = self.dtype
        shown = modalities.tolist()
        fused = torch.zeros(len(shown), self.encoder.config.embedding, device=input_ids.device)
        for kind in sorted(set(shown)):
            rows = torch.tensor(
                [row for row, bits in enumerate(shown) if bits == kind], device=input_ids.device
            )
            given = [name for name in BITS if kind & BITS[name]]

            def of(
                tensor: Tensor | None, modality: str, rows: Tensor = rows, given: list[str] = given
            ) -> Tensor | None:
                return (
                    tensor.index_select(0, rows)
                    if tensor is not None and modality in given
                    else None
                )

            inputs = OmniInputs(
                modalities=tuple(given),
                token_ids=input_ids.index_select(0, rows),
                token_mask=attention_mask.index_select(0, rows).bool(),
                text_mask=text_mask.index_select(0, rows).bool(),
                images=of(pixel_values, "vision"),
                image_mask=of(pixel_mask, "vision"),
                image_sizes=of(pixel_sizes, "vision"),
                audio=of(audio_values, "audio"),
                audio_mask=of(audio_mask, "audio"),
            )
            fused = fused.index_copy(0, rows, self.encoder(inputs).fused.to(fused.dtype))
        return BaseModelOutputWithPooling(pooler_output=fused)
