"""SigLIP's image tower, also of SigLIP2 in its files of a fixed image size (model_type siglip).

One linear embedding of each patch, learned positions (bicubic where the image has another grid),
pre-norm blocks with LayerNorm and biases, a last norm. The attention-pooling head and the text
tower are left out: our perceiver reads the patch tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sailplan.config.schema import ModelConfig, VisionConfig
from sailplan.model.backbones.plain import Names, block_entries, expected_shape
from sailplan.model.backbones.weight_map import Entry, Piece, WeightMap, same
from sailplan.model.blocks import Blocks, initial_deviation

MODEL_TYPES = ("siglip", "siglip_vision_model")
NAMES = Names("layer_norm1", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2")


class SiglipVisionEncoder(nn.Module):
    """Frames [n, 3, height, width] in [-1, 1] to tokens [n, p, h], each frame alone."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = self.width = config.encoder.hidden
        self.patch, self.grid = config.patch, config.position_grid
        self.embedding = nn.Conv2d(3, hidden, config.patch, stride=config.patch)
        self.positions = nn.Parameter(torch.empty(config.position_grid**2, hidden))
        nn.init.normal_(self.positions, std=initial_deviation(hidden))
        self.to(dtype)
        self.blocks = Blocks(config.encoder, dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError where the image's sides are not multiples of the patch."""
        if images.size(-1) % self.patch or images.size(-2) % self.patch:
            raise ValueError(
                f"image of {tuple(images.shape[-2:])} pixels: both sides must be multiples of "
                f"model.vision.patch={self.patch}"
            )
        grid = self.embedding(images.to(self.positions.dtype))
        positions: Tensor = self.positions
        if grid.shape[-2:] != (self.grid, self.grid):
            square = positions.T.unflatten(1, (self.grid, self.grid))[None]
            positions = (
                F.interpolate(square, size=grid.shape[-2:], mode="bicubic", align_corners=False)[0]
                .flatten(1)
                .T
            )
        return self.blocks(grid.flatten(2).transpose(1, 2) + positions)


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


def unsupported(found: dict[str, Any]) -> str | None:
    if str(found.get("model_type")).startswith("siglip2"):
        return (
            "config.json has model_type siglip2, images of any size (naflex): expected siglip with "
            "model.vision.backbone=siglip; set "
            "vision=siglip2_naflex, or choose a fixed size, such as "
            "google/siglip2-so400m-patch14-224"
        )
    return None


def expected(config: ModelConfig, found: dict[str, Any]) -> dict[str, tuple[str, object, object]]:
    """config.json's key -> (our key, our value, the value there); a key that is not there has
    SigLIP base's value.
    """
    vision = config.vision
    found = found.get("vision_config", found)
    patch = found.get("patch_size", 16)
    sizes = {
        "hidden": ("hidden_size", 768),
        "layers": ("num_hidden_layers", 12),
        "heads": ("num_attention_heads", 12),
        "feed_forward": ("intermediate_size", 3072),
    }
    activation = ("hidden_act", "gelu_pytorch_tanh")
    return {
        "patch_size": ("model.vision.patch", vision.patch, patch),
        "image_size / patch_size": (
            "model.vision.position_grid",
            vision.position_grid,
            found.get("image_size", 224) // patch,
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
