"""SigLIP2's image tower in its files for images of any size (model_type siglip2, "naflex"; arXiv
2502.14786).

A picture keeps its sides' ratio: it comes as the patches of its own grid, row by row, filled up to
the same number for all (`data.image_patches`). The square grid of learned positions is resized to
each picture's grid, antialiased bilinear; what was filled up is left out. Pre-norm blocks with
LayerNorm and biases, a last norm; the attention-pooling head and the text tower are left out.

transformers' own computes a picture's filling too, and resizes the positions picture by picture,
waiting for the host to know each one's sides; here neither.

Shape legend: n pictures in all, p patches a picture, filled up ones included, g side of the square
grid of positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sailplan.config.fields import JsonObject
from sailplan.config.schema import ModelConfig, VisionConfig
from sailplan.model.attention import Sequences
from sailplan.model.backbones.plain import Names, block_entries, expected_shape
from sailplan.model.backbones.weight_map import Entry, Piece, WeightMap, same
from sailplan.model.blocks import Blocks, initial_deviation

MODEL_TYPES = ("siglip2", "siglip2_vision_model")
NAMES = Names("layer_norm1", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2")


def resize_weights(place: Tensor, length: Tensor, grid: int) -> Tensor:
    """How much each of `grid` points counts at place 0, 1, ...

    of a line of them resized to `length`: [...] to float32 [..., grid].

    Antialiased bilinear, without aligned corners: triangles around (place + 1/2) grid / length, as
    wide as the step where it is more than one point, normalised to a sum of one (torch's
    interpolate with antialias=True).
    """
    step = grid / length.float()[..., None]
    distance = torch.arange(grid, device=place.device) + 0.5 - (place[..., None] + 0.5) * step
    weights = (1 - distance.abs() / step.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


class NaflexVisionEncoder(nn.Module):
    """Patches [n, p, 3 * patch * patch] in [-1, 1] of grids sizes int64 [n, 2] to tokens of
    those that are no filling, each picture alone.
    """

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = self.width = config.encoder.hidden
        self.grid = config.position_grid
        self.embedding = nn.Linear(3 * config.patch**2, hidden)
        self.positions = nn.Parameter(torch.empty(config.position_grid**2, hidden))
        nn.init.normal_(self.positions, std=initial_deviation(hidden))
        self.to(dtype)
        self.blocks = Blocks(config.encoder, dtype)

    def forward(self, patches: Tensor, sizes: Tensor, own: Tensor, rows: Sequences) -> Tensor:
        """own: int64 [k], which of the n * p patches are a picture's own, in the order of
        `rows`. Returns [k, h].
        """
        tokens = self.embedding(patches.flatten(0, 1).index_select(0, own).to(self.positions.dtype))
        return self.blocks(
            tokens
            + self.positions_of(
                own % patches.size(1), sizes.index_select(0, own // patches.size(1))
            ),
            rows,
        )

    def positions_of(self, place: Tensor, sizes: Tensor) -> Tensor:
        """place int64 [k] of patches in grids of sizes int64 [k, 2]: the learned positions
        there, [k, h].
        """
        down, across = sizes.clamp(min=1).unbind(-1)
        rows, columns = (
            resize_weights(at, length, self.grid)
            for at, length in ((place // across, down), (place % across, across))
        )
        return (rows[:, :, None] * columns[:, None, :]).flatten(1).to(
            self.positions.dtype
        ) @ self.positions


def weight_map(config: ModelConfig) -> WeightMap:
    shape = config.vision.encoder
    entries: list[Entry] = [
        same("vision.embedding.weight", "embeddings.patch_embedding.weight"),
        same("vision.embedding.bias", "embeddings.patch_embedding.bias"),
        same("vision.positions", "embeddings.position_embedding.weight"),
    ]
    for kind in ("weight", "bias"):
        entries.append(
            same(f"vision.blocks.block.final_layernorm.{kind}", f"post_layernorm.{kind}")
        )
        for layer in range(shape.layers):
            theirs = f"encoder.layers.{layer}"
            query, key, value = (Piece(f"{theirs}.self_attn.{name}_proj.{kind}") for name in "qkv")
            entries += block_entries(
                f"vision.blocks.block.layers.{layer}", theirs, kind, shape, NAMES, query, key, value
            )
    left_out = (r"(vision_model\.)?head\..*", r"text_model\..*", r"logit_(scale|bias)")
    return WeightMap(tuple(entries), anchor="embeddings.patch_embedding.weight", left_out=left_out)


def unsupported(found: dict[str, object]) -> str | None:
    return None


def expected(config: ModelConfig, found: JsonObject) -> dict[str, tuple[str, object, object]]:
    """config.json's key -> (our key, our value, the value there); a key that is not there has
    SigLIP2 base's value.
    """
    vision = config.vision
    found = found.get("vision_config", found)
    sizes = {
        "hidden": ("hidden_size", 768),
        "layers": ("num_hidden_layers", 12),
        "heads": ("num_attention_heads", 12),
        "feed_forward": ("intermediate_size", 3072),
    }
    activation = ("hidden_act", "gelu_pytorch_tanh")
    return {
        "patch_size": ("model.vision.patch", vision.patch, found.get("patch_size", 16)),
        "num_patches": (
            "model.vision.position_grid squared",
            vision.position_grid**2,
            found.get("num_patches", 256),
        ),
        **expected_shape(
            "model.vision.encoder",
            vision.encoder,
            found,
            sizes,
            activation,
            found.get("layer_norm_eps", 1e-6),
        ),
    }
