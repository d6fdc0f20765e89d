"""Published models over layouts: the full batch's gradients, in float64, in bfloat16, with
layers that run again, with LoRA.

The matrix has the float64 rows of every layout (sailplan.parity.matrix); here are the corners that
it leaves out.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from sailplan.errors import ConfigurationError
from sailplan.model.encoders.transformers import TransformersConfig
from sailplan.model.encoders.transformers.module import LORA, merged
from sailplan.model.parallelize import shard
from sailplan.model.testing import join_layout
from sailplan.parity.layouts import cached_step, compare, gathered_gradients, reference
from sailplan.parity.published import TINY, tiny_inputs, tiny_settings
from sailplan_kernels.testing import run_ranks

LIMIT = 1e-10
STACK = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
MORE: dict[
    str, tuple[list[str], dict[str, Any]]
] = {  # other shapes of models: own position codes, decoders, encoder-decoders, other towers
    "modernbert": (
        ["text"],
        STACK
        | {
            "pad_token_id": 0,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "qwen3": (["text"], STACK | {"num_key_value_heads": 2, "head_dim": 4, "is_causal": False}),
    "t5": (
        ["text"],
        {
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
        },
    ),
    "siglip": (
        ["text", "vision"],
        {
            "text_config": STACK
            | {
                "projection_size": 16,
                "max_position_embeddings": 16,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 1,
            },
            "vision_config": {
                **{key: STACK[key] for key in STACK if key != "vocab_size"},
                "image_size": 8,
                "patch_size": 4,
            },
        },
    ),
    "clap": (
        ["text", "audio"],
        {
            "text_config": STACK
            | {
                "pad_token_id": 0,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                "projection_dim": 16,
            },
            "audio_config": {
                "window_size": 4,
                "num_mel_bins": 16,
                "spec_size": 64,
                "patch_size": 4,
                "patch_stride": [4, 4],
                "hidden_size": 16,
                "projection_dim": 16,
                "depths": [2, 2],
                "num_attention_heads": [2, 2],
                "patch_embeds_hidden_size": 8,
                "mlp_ratio": 2.0,
                "num_hidden_layers": 2,
                "hidden_dropout_prob": 0.0,
            },
            "projection_dim": 16,
        },
    ),
}


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[float, dict[str, Tensor]]]:
    return {kind: reference(encoder=kind) for kind in TINY}


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {"checkpointing": True}),
        (2, {"reshard_after_forward": True}),
        (4, {"sharding": "hybrid", "exchange": "ring"}),
        (2, {"rows": {"items": (31, 1), "pairs": (16, 0), "sequences": (8, 0)}}),
    ],
    ids=["layers run again", "ZeRO-3", "two copies", "ranks without rows"],
)
def test_corners_of_the_matrix(
    references: Any, kind: str, world: int, options: dict[str, Any]
) -> None:
    for row in compare(world, 1, ((3, 1),), expected=references[kind], encoder=kind, **options):
        assert row.error <= LIMIT, row


@pytest.mark.parametrize("kind", MORE)
def test_other_models_need_no_code(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(TINY, kind, MORE[kind])
    for row in compare(2, 1, ((3, 0),), encoder=kind):
        assert row.error <= LIMIT, row


GEMMA = ("gemma", "gemma3_text")
GEMMA_SHAPE = STACK | {"num_key_value_heads": 2, "head_dim": 4}


def _float64(rank: int, world_size: int, kind: str) -> dict[str, Any]:
    parallel = join_layout(1)
    step, _ = cached_step(parallel, 3, 0, {"infonce": 1.0}, datasets=("items",), encoder=kind)
    return {name: gradient.numpy() for name, gradient in gathered_gradients(step, parallel).items()}


def _float64_errors(kind: str) -> dict[str, float]:
    _, exact = reference({"infonce": 1.0}, ("items",), encoder=kind)
    found = run_ranks(_float64, 2, kind, timeout=120)[0]
    return {
        name: float((torch.as_tensor(found[name]) - value).norm() / value.norm())
        for name, value in exact.items()
        if value.norm() > 0
    }


def _norm_in_its_inputs_precision(self: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)


@pytest.mark.parametrize("kind", GEMMA)
def test_gemmas_norms_sum_their_weights_gradients_in_float32(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In a float64 model too: `weight.float()` in its RMSNorm, whose gradient is so summed over
    a micro-batch's tokens in float32.

    Nothing else of the model is inexact, and with the norm in its input's precision nothing at all
    is.
    """
    monkeypatch.setitem(TINY, kind, (["text"], GEMMA_SHAPE))
    errors = _float64_errors(kind)
    norms = {name: error for name, error in errors.items() if "norm" in name}
    assert LIMIT < max(norms.values()) < 1e-5, norms
    assert max(error for name, error in errors.items() if name not in norms) <= LIMIT, errors
    classes = {
        type(module)
        for module in tiny_settings(kind).component().module(torch.float32).modules()
        if type(module).__name__.endswith("RMSNorm")
    }
    for cls in classes:
        monkeypatch.setattr(cls, "forward", _norm_in_its_inputs_precision)
    assert classes and max(_float64_errors(kind).values()) <= LIMIT


def _bfloat16(rank: int, world_size: int, kind: str, plain: bool) -> dict[str, Any]:
    parallel = join_layout(1)
    layout: dict[str, Any] = {"dtype": torch.float32, "compute_dtype": torch.bfloat16}
    step, _ = cached_step(
        parallel,
        1 if plain else 3,
        -1 if plain else 1,
        {"infonce": 1.0},
        datasets=("items",),
        encoder=kind,
        **layout,
    )
    return {
        name: gradient.float().numpy()
        for name, gradient in gathered_gradients(step, parallel).items()
    }


def _apart(found: dict[str, Any], exact: dict[str, Tensor]) -> float:
    """Relative error of all of the encoder's gradients together."""
    names = [name for name in exact if name.startswith("encoder.")]
    one, other = (
        torch.cat([torch.as_tensor(some[name]).double().flatten() for name in names])
        for some in (found, exact)
    )
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kind", [*TINY, "clap"])
def test_bfloat16_is_as_near_as_its_rounding(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Two ranks and cut micro-batches against one rank that encodes each view at once: both
    round, none loses a gradient.
    """
    monkeypatch.setitem(TINY, kind, (TINY | MORE)[kind])
    _, exact = reference({"infonce": 1.0}, ("items",), encoder=kind)
    plain, found = (
        run_ranks(_bfloat16, world, kind, world == 1, timeout=120)[0] for world in (1, 2)
    )
    assert found.keys() == exact.keys() == plain.keys()
    assert (
        0 < _apart(plain, exact) < (0.06 if kind in ("bert", "clip") else 0.1)
        and _apart(found, exact) <= 1.25 * _apart(plain, exact) + 5e-3
    )


def _zero_rows(rank: int, world_size: int, kind: str) -> list[Any]:
    join_layout(1)
    encoder = tiny_settings(kind).component().module(torch.float32)
    inputs = tiny_inputs(TINY[kind][0], 3, 0)
    none = inputs.mapped(lambda tensor: tensor[:0])
    vectors = encoder(none, per_modality=True)
    vectors.fused.sum().backward()
    return [tuple(vector.shape) for vector in vectors.named().values()]


@pytest.mark.parametrize("kind", TINY)
def test_a_micro_batch_without_rows_runs_every_layer(kind: str) -> None:
    assert set(run_ranks(_zero_rows, 1, kind)[0]) == {(0, 16)}


def _units(rank: int, world_size: int) -> tuple[int, list[str]]:
    parallel = join_layout(1)
    encoder = tiny_settings("clip").component().module(torch.float32)
    units = len(encoder.shard_units())
    shard(encoder, parallel, shard=True)
    return units, [name for name, tensor in encoder.named_parameters() if tensor.ndim == 0]


def test_every_layer_of_both_towers_is_a_unit_and_no_scalar_is_a_parameter() -> None:
    assert run_ranks(_units, 2)[0] == (4, [])


def _causal(bidirectional: bool) -> bool:
    """Whether a token's hidden state knows the tokens behind it."""
    config = transformers.AutoConfig.for_model(
        "qwen3",
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=24,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        settings = TransformersConfig(
            source=folder,
            embedding=16,
            prefixes=[16],
            weights="drawn",
            pooling="cls",
            options={"is_causal": False} if bidirectional else {},
        )
        torch.manual_seed(0)
        encoder = settings.component().module(torch.float64)
    inputs = tiny_inputs(["text"], 4, 0)
    changed = dataclasses.replace(
        inputs, named=inputs.named | {"input_ids": inputs.named["input_ids"].clone()}
    )
    changed.named["input_ids"][:, -1] = 7
    changed.named["attention_mask"] = inputs.named["attention_mask"] = torch.ones(
        4, 5, dtype=torch.int64
    )
    with torch.no_grad():
        return torch.equal(encoder(inputs).fused, encoder(changed).fused)


def test_a_decoder_is_bidirectional_by_its_configuration() -> None:
    with torch.random.fork_rng():
        assert _causal(False) and not _causal(True)


def test_parts_follow_the_towers() -> None:
    with torch.random.fork_rng():
        parts = tiny_settings("clip").component().module(torch.float32).parts()
    assert set(parts) == {"text", "vision"} and all(parts.values())


@pytest.mark.skipif(
    importlib.util.find_spec("peft") is None,
    reason="peft is not installed: LoRA of published models is not tested",
)
def test_lora_merged_gives_the_same_vectors() -> None:
    from sailplan.model.encoders.transformers.config import PeftConfig

    settings = dataclasses.replace(tiny_settings("bert"), lora=PeftConfig(rank=2, alpha=4.0))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = settings.component().module(torch.float64)
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                if LORA in name:
                    nn.init.normal_(parameter)
        plain = tiny_settings("bert").component().module(torch.float64)
    assert encoder.parts()["lora"] and not any(LORA in name for name in plain.state_dict())
    assert plain.load_state_dict(merged(encoder.state_dict(), settings.lora), strict=True)
    inputs = tiny_inputs(["text"], 5, 2)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.eval()(inputs).fused, plain.eval()(inputs).fused, rtol=0, atol=1e-12
        )


@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="peft is installed")
def test_lora_without_peft_says_what_to_install() -> None:
    from sailplan.model.encoders.transformers.config import PeftConfig

    settings = dataclasses.replace(tiny_settings("bert"), lora=PeftConfig(rank=2))
    with pytest.raises(ConfigurationError, match=r"model\.lora\.rank=2: expected peft"):
        settings.component().module(torch.float32)


def test_all_losses_take_part() -> None:
    """Else the rows of the matrix would show less than they say."""
    _, gradients = reference(encoder="clip")
    assert {name.split(".")[1] for name in gradients if name.startswith("objectives.")} == {
        "late_fusion",
        "seq2item",
        "id2item",
        "sigmoid",
    }
