"""Qwen2, Qwen2.5, Qwen3 and Qwen3-VL (dense): text embedding and blocks of the tower.

All are pre-norm decoders with RMSNorm, rotary positions, grouped key/value heads and a gated SiLU
feed-forward; Qwen2 and Qwen2.5 have biases on queries, keys and values, Qwen3 a norm on each head's
queries and keys. Qwen3-VL's text model is Qwen3's, with rotary positions in three dimensions. The
language-model head is left out.
"""

from __future__ import annotations

from sailplan.config.fields import JsonObject
from sailplan.config.schema import ModelConfig
from sailplan.model.backbones.weight_map import Entry, Piece, WeightMap, grouped, same
from sailplan.model.blocks import head_size

MODEL_TYPES = ("qwen2", "qwen3", "qwen3_vl", "qwen3_vl_text")


def weight_map(config: ModelConfig) -> WeightMap:
    shape = config.tower
    entries: list[Entry] = [
        same("text.weight", "embed_tokens.weight"),
        same("tower.blocks.block.final_layernorm.weight", "norm.weight"),
    ]
    for layer in range(shape.layers):
        ours, theirs = f"tower.blocks.block.layers.{layer}", f"layers.{layer}"
        attention = f"{theirs}.self_attn"
        for kind in ("weight", "bias") if shape.query_key_value_bias else ("weight",):
            query, key, value = (Piece(f"{attention}.{name}_proj.{kind}") for name in "qkv")
            entries.append(
                grouped(f"{ours}.self_attention.linear_qkv.{kind}", shape, query, key, value)
            )
        if shape.query_key_norm:
            entries += [
                same(
                    f"{ours}.self_attention.{name}_layernorm.weight",
                    f"{attention}.{name}_norm.weight",
                )
                for name in "qk"
            ]
        gate, up = (
            Piece(f"{theirs}.mlp.{name}_proj.weight", 0, shape.feed_forward)
            for name in ("gate", "up")
        )
        entries += [
            same(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight"),
            same(f"{ours}.self_attention.linear_proj.weight", f"{attention}.o_proj.weight"),
            same(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight"),
            Entry(f"{ours}.mlp.linear_fc1.weight", (gate, up)),
            same(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.mlp.down_proj.weight"),
        ]
    return WeightMap(
        tuple(entries),
        anchor="embed_tokens.weight",
        left_out=(r"lm_head\.weight", r"(model\.)?visual\..*"),
    )


def _rope(found: JsonObject) -> JsonObject:
    """rope_parameters, or what older files have in its place."""
    return found.get("rope_parameters") or {
        "rope_theta": found.get("rope_theta", 10000.0),
        **(found.get("rope_scaling") or {}),
    }


def unsupported(found: JsonObject) -> str | None:
    found = found.get("text_config", found)
    rope = _rope(found)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        return f"config.json has rope_type {kind}: expected default, longer contexts by scaled positions are not built"
    if found.get("use_sliding_window", False):
        return "config.json has use_sliding_window: windowed attention is not built; choose weights without it"
    return None


def expected(config: ModelConfig, found: JsonObject) -> dict[str, tuple[str, object, object]]:
    """config.json's key -> (our key, our value, the value there), for what the tensors' shapes
    do not tell.
    """
    found = found.get("text_config", found)
    kind = str(found.get("model_type"))
    shape, qwen3, rope = config.tower, kind.startswith("qwen3"), _rope(found)
    sections = rope.get("mrope_section", [24, 20, 20]) if kind.startswith("qwen3_vl") else []
    heads = found.get("num_attention_heads")
    return {
        "hidden_size": ("model.tower.hidden", shape.hidden, found.get("hidden_size")),
        "num_hidden_layers": ("model.tower.layers", shape.layers, found.get("num_hidden_layers")),
        "num_attention_heads": ("model.tower.heads", shape.heads, heads),
        "num_key_value_heads": (
            "model.tower.key_value_heads",
            shape.key_value_heads or shape.heads,
            found.get("num_key_value_heads", heads),
        ),
        "head_dim": (
            "model.tower.head_size",
            head_size(shape),
            found.get("head_dim") or found.get("hidden_size", 0) // (heads or 1),
        ),
        "intermediate_size": (
            "model.tower.feed_forward",
            shape.feed_forward,
            found.get("intermediate_size"),
        ),
        "vocab_size": ("model.vocabulary", config.vocabulary, found.get("vocab_size")),
        "rms_norm_eps": (
            "model.tower.norm_epsilon",
            shape.norm_epsilon,
            found.get("rms_norm_eps", 1e-6),
        ),
        "mrope_section": ("model.rope_sections", list(config.rope_sections), list(sections)),
        "rope_theta": ("model.rope_base", config.rope_base, rope.get("rope_theta")),
        "hidden_act": ("model.tower.activation", shape.activation, found.get("hidden_act", "silu")),
        "model_type (biases)": (
            "model.tower.query_key_value_bias",
            shape.query_key_value_bias,
            not qwen3 or bool(found.get("attention_bias")),
        ),
        "model_type (head norms)": ("model.tower.query_key_norm", shape.query_key_norm, qwen3),
        "attention_bias": ("model.tower.bias", shape.bias, False),
    }
