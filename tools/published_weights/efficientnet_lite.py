"""EfficientNet-Lite0 as a folder that transformers' AutoModel opens: python
tools/published_weights/efficientnet_lite.py FILE.pth FOLDER

Lite0 (Apache-2.0; weights as TensorFlow published them, trained on ImageNet) is EfficientNet-B0
with ReLU6 and without squeeze-and-excitation. transformers' EfficientNet always has that; here its
gate is the number 1: weights of 0 and a bias whose sigmoid is exactly 1 in float32, so that the
folder computes what the file does. Only a gradient could change the gate, and that of a saturated
sigmoid is 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

SIZE = 128  # pixels a side: a multiple of 32, as the paddings are those of even sides
GATE = 40.0  # sigmoid(40) is 1 in float32
STEM = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def config() -> Any:
    """Return the shape of Lite0: B0's, with ReLU6 and the smallest gates."""
    return transformers.EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        image_size=SIZE,
        hidden_act="relu6",
        squeeze_expansion_ratio=0.01,
        batch_norm_eps=1e-3,
        drop_connect_rate=0.0,
    )


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's tensors under transformers' names; the classes' are left out."""
    found = {}
    for name, tensor in weights.items():
        part, _, own = name.rpartition(".")
        if part.startswith("_blocks."):
            _, number, layer = part.split(".")
            found[f"encoder.blocks.{number}.{BLOCK[layer]}.{own}"] = tensor
        elif part in STEM:
            found[f"{STEM[part]}.{own}"] = tensor
    return found


def model_of(weights: dict[str, Tensor]) -> Any:
    """Return the model with these weights and open gates.

    Raises RuntimeError for weights of another shape.
    """
    model = transformers.EfficientNetModel(config()).eval()
    gates = {
        name: torch.zeros_like(value)
        for name, value in model.state_dict().items()
        if "squeeze_excite" in name
    }
    for name in gates:
        if name.endswith("squeeze_excite.expand.bias"):
            gates[name].fill_(GATE)
    model.load_state_dict(renamed(weights) | gates)
    return model


def main(file: str, folder: str) -> None:
    """Write the folder, its picture processor included."""
    model_of(torch.load(file, map_location="cpu", weights_only=True)).save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
        "image_mean": [127 / 255] * 3,
        "image_std": [128 / 255] * 3,
        "do_convert_rgb": True,
        "resample": 3,
    }
    Path(folder, "preprocessor_config.json").write_text(
        json.dumps(processor, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
