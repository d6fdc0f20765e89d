"""The names and the size of files that others have published, against what the weight maps expect.

The digests are of the sorted names in model.safetensors.index.json, without lm_head.weight, as
found in public repositories; the bytes are that file's metadata.total_size. Neither comes from this
project or from transformers.
"""

from __future__ import annotations

import hashlib

from sailplan.config.schema import ModelConfig, TransformerShape, VisionConfig
from sailplan.model.backbones import qwen, qwen_vl
from sailplan.model.backbones.load import full_name
from sailplan.model.backbones.weight_map import WeightMap
from sailplan.model.count import count_parameters


def names(weights: WeightMap, prefix: str) -> set[str]:
    return {
        full_name(prefix, piece.name)
        for entry in weights.entries
        for piece in entry.pieces
        if piece.name is not None
    }


def digest(found: set[str]) -> str:
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()


def test_of_a_qwen2_5_of_14_billion_parameters():
    """deepcogito/cogito-v1-preview-qwen-14B, the shape of Qwen2.5-14B."""
    tower = TransformerShape(
        layers=48,
        hidden=5120,
        heads=40,
        key_value_heads=8,
        feed_forward=13824,
        query_key_value_bias=True,
    )
    config = ModelConfig(tower=tower, vocabulary=151665, embedding=5120, prefixes=[5120])
    found = names(qwen.weight_map(config), "model.")
    assert (
        len(found) == 578
        and digest(found) == "30c75d3c1e6bf4598709f4e20b4db297c2d561ed3f832f780d7ea5160014d739"
    )
    counted = count_parameters(config)
    head, kinds = (
        151665 * 5120,
        3 * 5120,
    )  # lm_head.weight, which an embedding model leaves out; our vectors of the three modalities
    assert 2 * (counted["text"] + counted["tower"] - kinds + head) == 29_531_895_808


def test_of_a_qwen3_vl_of_8_billion_parameters():
    """nvidia/Cosmos-Reason2-8B, the shape of Qwen3-VL-8B."""
    tower = TransformerShape(
        layers=36,
        hidden=4096,
        heads=32,
        key_value_heads=8,
        head_size=128,
        feed_forward=12288,
        query_key_norm=True,
        causal=True,
    )
    encoder = TransformerShape(
        layers=27,
        hidden=1152,
        heads=16,
        feed_forward=4304,
        norm="layer",
        activation="gelu_tanh",
        gated=False,
        bias=True,
    )
    vision = VisionConfig(
        backbone="qwen3_vl",
        encoder=encoder,
        patch=16,
        position_grid=48,
        merge=2,
        deepstack=[8, 16, 24],
    )
    config = ModelConfig(
        tower=tower, vision=vision, vocabulary=151936, embedding=4096, prefixes=[4096]
    )
    found = names(qwen.weight_map(config), "model.language_model.") | names(
        qwen_vl.weight_map(config), "model.visual."
    )
    assert (
        len(found) == 749
        and digest(found) == "e6834c964c79fda37a17ac689509c8edecb11aba744a27d36782d239d488358f"
    )
