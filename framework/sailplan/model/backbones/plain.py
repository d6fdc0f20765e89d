"""What SigLIP2, Whisper's encoder and Qwen3-VL's image tower have in common: pre-norm blocks with
LayerNorm and biases,
every position attending to all, a feed-forward of two matrices."""

from __future__ import annotations

from typing import NamedTuple

from sailplan.config.fields import JsonObject
from sailplan.config.schema import TransformerShape
from sailplan.model.backbones.weight_map import Entry, Piece, grouped, same


class Names(NamedTuple):
    """What a family's files call the layers of a block."""

    attention_norm: str
    output: str
    mlp_norm: str
    fc1: str
    fc2: str


def block_entries(
    ours: str,
    theirs: str,
    kind: str,
    shape: TransformerShape,
    names: Names,
    query: Piece,
    key: Piece,
    value: Piece,
) -> list[Entry]:
    """The weights or biases (`kind`) of one block.

    names: below `theirs`; query, key, value: stacks of heads.
    """
    return [
        same(f"{ours}.input_layernorm.{kind}", f"{theirs}.{names.attention_norm}.{kind}"),
        grouped(f"{ours}.self_attention.linear_qkv.{kind}", shape, query, key, value),
        same(f"{ours}.self_attention.linear_proj.{kind}", f"{theirs}.{names.output}.{kind}"),
        same(f"{ours}.pre_mlp_layernorm.{kind}", f"{theirs}.{names.mlp_norm}.{kind}"),
        same(f"{ours}.mlp.linear_fc1.{kind}", f"{theirs}.{names.fc1}.{kind}"),
        same(f"{ours}.mlp.linear_fc2.{kind}", f"{theirs}.{names.fc2}.{kind}"),
    ]


def expected_shape(
    key: str,
    shape: TransformerShape,
    found: JsonObject,
    sizes: dict[str, tuple[str, int]],
    activation: tuple[str, str],
    epsilon: float,
) -> dict[str, tuple[str, object, object]]:
    """`Family.expected` for the encoder's shape at `key`.

    sizes: our field -> (config.json's key, its default); activation: config.json's key and its
    default; epsilon: the norms'.
    """
    name, default = activation
    there = found.get(name, default)
    checked: dict[str, tuple[str, object, object]] = {
        theirs: (f"{key}.{ours}", getattr(shape, ours), found.get(theirs, usual))
        for ours, (theirs, usual) in sizes.items()
    }
    return checked | {
        name: (
            f"{key}.activation",
            shape.activation,
            {"gelu_pytorch_tanh": "gelu_tanh"}.get(there, there),
        ),
        "model_type (norm)": (f"{key}.norm", shape.norm, "layer"),
        "model_type (norm's epsilon)": (f"{key}.norm_epsilon", shape.norm_epsilon, epsilon),
        "model_type (feed-forward)": (f"{key}.gated", shape.gated, False),
        "model_type (biases)": (f"{key}.bias", shape.bias, True),
        "model_type (key/value heads)": (
            f"{key}.key_value_heads",
            shape.key_value_heads or shape.heads,
            shape.heads,
        ),
        "model_type (size of a head)": (
            f"{key}.head_size",
            shape.head_size or shape.hidden // shape.heads,
            shape.hidden // shape.heads,
        ),
        "model_type (head norms)": (f"{key}.query_key_norm", shape.query_key_norm, False),
        "model_type (causal)": (f"{key}.causal", shape.causal, False),
    }
