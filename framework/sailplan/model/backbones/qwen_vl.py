"""Qwen3-VL's image tower (arXiv 2511.21631), whose tokens stand in the tower's sequence
themselves: there is no perceiver.

A patch is embedded over two frames in time; a picture is shown as both. Learned positions (bilinear
between the corners where the picture has another grid) are added, and rotary angles tell row and
column. Pre-norm blocks with LayerNorm and biases follow, without a last norm. A merger makes one
token of the tower's width of each square of `merge` x `merge` patches; `deepstack` names layers
whose output goes through mergers of their own, and is added to the visual tokens behind the tower's
first layers.

Every frame of a video is a picture of its own here; the published model shows two neighbouring
frames at once and writes their times between them. Pictures stand before the text, each between
`model.vision.marks`.

Shape legend: n pictures, r rows and c columns of merged tokens, m side of the merged square, h
hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor, nn

from sailplan.config.fields import JsonObject
from sailplan.config.schema import ModelConfig, TransformerShape, VisionConfig
from sailplan.model.backbones.plain import Names, block_entries, expected_shape
from sailplan.model.backbones.weight_map import Entry, Piece, WeightMap, same
from sailplan.model.blocks import (
    Blocks,
    head_size,
    initial_deviation,
    process_groups,
    transformer_config,
)

MODEL_TYPES = ("qwen3_vl", "qwen3_vl_vision")
NAMES = Names("norm1", "attn.proj", "norm2", "mlp.linear_fc1", "mlp.linear_fc2")
FRAMES, ROPE_BASE, NORM_EPSILON = 2, 10000.0, 1e-6


class Merger(nn.Module):
    """Squares of m x m patches [n, p, h] that follow each other to tokens [n, p / m^2, output].

    norm_of_square: the norm is over all patches of a square instead of each.
    """

    def __init__(
        self, hidden: int, square: int, output: int, dtype: torch.dtype, *, norm_of_square: bool
    ) -> None:
        super().__init__()
        groups, width = process_groups(), hidden * square
        self.square, self.norm_of_square = square, norm_of_square
        self.norm = nn.LayerNorm(width if norm_of_square else hidden, eps=NORM_EPSILON, dtype=dtype)
        tensor_parallel = groups.tp.size() if groups.tp is not None else 1
        shape = TransformerShape(
            0,
            output,
            tensor_parallel,
            None,
            width,
            norm="layer",
            activation="gelu",
            gated=False,
            bias=True,
        )  # heads are not used
        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        config = transformer_config(shape, dtype, tensor_parallel)
        self.mlp = MLP(config, parts, input_size=width, ffn_hidden_size=width, tp_group=groups.tp)

    def forward(self, hidden: Tensor) -> Tensor:
        squares = hidden.unflatten(1, (-1, self.square))
        squares = (
            self.norm(squares.flatten(2)) if self.norm_of_square else self.norm(squares).flatten(2)
        )
        output, bias = self.mlp(squares)
        return output + bias


class QwenVisionEncoder(nn.Module):
    """Frames [n, 3, height, width] in [-1, 1] to tokens [n, r * c, output] row by row, and as
    much of each deepstack layer; each frame alone.
    """

    def __init__(self, config: VisionConfig, output: int, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, square = config.encoder.hidden, config.merge**2
        self.patch, self.merge, self.position_grid, self.deepstack = (
            config.patch,
            config.merge,
            config.position_grid,
            list(config.deepstack),
        )
        self.head_size = head_size(config.encoder)
        self.embedding = nn.Conv3d(
            3,
            hidden,
            (FRAMES, config.patch, config.patch),
            stride=(FRAMES, config.patch, config.patch),
        )
        self.positions = nn.Parameter(torch.empty(config.position_grid**2, hidden))
        nn.init.normal_(self.positions, std=initial_deviation(hidden))
        self.to(dtype)
        self.blocks = Blocks(config.encoder, dtype, final_norm=False)
        self.merger = Merger(hidden, square, output, dtype, norm_of_square=False)
        self.deepstack_mergers = nn.ModuleList(
            Merger(hidden, square, output, dtype, norm_of_square=True) for _ in config.deepstack
        )

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens.

        Raises ValueError where the image's sides are not multiples of patch x merge.
        """
        height, width = images.shape[-2:]
        side = self.patch * self.merge
        if height % side or width % side:
            raise ValueError(
                f"image of {height} x {width} pixels: both sides must be multiples of "
                f"model.vision.patch x merge = {side}"
            )
        return height // side, width // side

    def forward(self, images: Tensor) -> list[Tensor]:
        rows, columns = self.grid(images)
        images = images.to(self.positions.dtype)
        patches = self.embedding(images[:, :, None].expand(-1, -1, FRAMES, -1, -1))[:, :, 0]
        positions = self.positions.T.unflatten(1, (self.position_grid, self.position_grid))[None]
        if patches.shape[-2:] != positions.shape[-2:]:
            positions = F.interpolate(
                positions, size=patches.shape[-2:], mode="bilinear", align_corners=True
            )
        seen: dict[int, Tensor] = {}

        def note(layer: int, hidden: Tensor) -> Tensor:
            if layer in self.deepstack:
                seen[layer] = hidden
            return hidden

        hidden = self.blocks(
            self._by_squares(patches + positions),
            angles=self._angles(rows, columns, images.device),
            after=note,
        )
        return [
            self.merger(hidden),
            *(
                merger(seen[layer])
                for merger, layer in zip(self.deepstack_mergers, self.deepstack, strict=True)
            ),
        ]

    def _by_squares(self, picture: Tensor) -> Tensor:
        """[n, h, r * m, c * m] to [n, r * c * m * m, h]: the patches of a square follow each
        other.
        """
        cut = picture.unflatten(3, (-1, self.merge)).unflatten(
            2, (-1, self.merge)
        )  # [n, h, r, m, c, m]
        return cut.permute(0, 2, 4, 3, 5, 1).flatten(1, 4)

    def _angles(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Rotary angles float32 [positions, head_size]: a quarter of the head's size of
        frequencies for the row, as many for the column.
        """
        half = self.head_size // 2
        frequencies = ROPE_BASE ** (
            -torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
        )
        down, across = (
            torch.arange(sides * self.merge, dtype=torch.float32, device=device)
            for sides in (rows, columns)
        )
        places = self._by_squares(torch.stack(torch.meshgrid(down, across, indexing="ij"))[None])[
            0
        ]  # [positions, 2]
        angles = (places[:, :, None] * frequencies).flatten(1)
        return torch.cat([angles, angles], -1)


def weight_map(config: ModelConfig) -> WeightMap:
    shape = config.vision.encoder
    entries: list[Entry] = [same("vision.positions", "pos_embed.weight")]
    mergers = {"merger": "merger"} | {
        f"deepstack_mergers.{number}": f"deepstack_merger_list.{number}"
        for number in range(len(config.vision.deepstack))
    }
    for kind in ("weight", "bias"):
        entries.append(same(f"vision.embedding.{kind}", f"patch_embed.proj.{kind}"))
        for layer in range(shape.layers):
            theirs = f"blocks.{layer}"
            query, key, value = (
                Piece(f"{theirs}.attn.qkv.{kind}", number * shape.hidden, shape.hidden)
                for number in range(3)
            )
            entries += block_entries(
                f"vision.blocks.block.layers.{layer}", theirs, kind, shape, NAMES, query, key, value
            )
        for ours, theirs in mergers.items():
            entries.append(same(f"vision.{ours}.norm.{kind}", f"{theirs}.norm.{kind}"))
            entries += [
                same(f"vision.{ours}.mlp.{name}.{kind}", f"{theirs}.{name}.{kind}")
                for name in ("linear_fc1", "linear_fc2")
            ]
    return WeightMap(
        tuple(entries),
        anchor="patch_embed.proj.weight",
        left_out=(r"(model\.)?language_model\..*", r"lm_head\.weight"),
    )


def unsupported(found: JsonObject) -> str | None:
    found = found.get("vision_config", found)
    if found.get("temporal_patch_size", FRAMES) != FRAMES:
        return (
            f"config.json has temporal_patch_size {found['temporal_patch_size']}: expected {FRAMES}"
        )
    return None


def expected(config: ModelConfig, found: JsonObject) -> dict[str, tuple[str, object, object]]:
    """config.json's key -> (our key, our value, the value there); a key that is not there has
    transformers' default.
    """
    vision = config.vision
    marks = [
        found[key] for key in ("vision_start_token_id", "vision_end_token_id") if key in found
    ]  # of the whole model's file
    found = found.get("vision_config", found)
    sizes = {
        "hidden": ("hidden_size", 1152),
        "layers": ("depth", 27),
        "heads": ("num_heads", 16),
        "feed_forward": ("intermediate_size", 4304),
    }
    deepstack = list(found.get("deepstack_visual_indexes", [8, 16, 24]))
    rope = found.get("rope_parameters") or {}
    return {
        "patch_size": ("model.vision.patch", vision.patch, found.get("patch_size", 16)),
        "spatial_merge_size": (
            "model.vision.merge",
            vision.merge,
            found.get("spatial_merge_size", 2),
        ),
        "num_position_embeddings": (
            "model.vision.position_grid squared",
            vision.position_grid**2,
            found.get("num_position_embeddings", 2304),
        ),
        "deepstack_visual_indexes": ("model.vision.deepstack", list(vision.deepstack), deepstack),
        "vision_start_token_id, vision_end_token_id": (
            "model.vision.marks",
            list(vision.marks),
            marks if marks and vision.marks else list(vision.marks),
        ),
        "out_hidden_size": (
            "model.tower.hidden",
            config.tower.hidden,
            found.get("out_hidden_size", 3584),
        ),
        "rope_theta": (
            "the image tower's rotary base",
            ROPE_BASE,
            rope.get("rope_theta", ROPE_BASE),
        ),
        **expected_shape(
            "model.vision.encoder",
            vision.encoder,
            found,
            sizes,
            ("hidden_act", "gelu_pytorch_tanh"),
            NORM_EPSILON,
        ),
    }
