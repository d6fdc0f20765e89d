"""Picture encoders of transformers in the omni tower: loaded from their files they see as
transformers does, at any layout, and what does not fit is said before a run.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from sailplan.config.compose import as_dict, compose, from_dict
from sailplan.config.schema import ModelConfig, ParallelConfig
from sailplan.data.packing import SequenceLayout
from sailplan.errors import ConfigurationError
from sailplan.model.build import build_encoder
from sailplan.model.count import check_weights
from sailplan.model.encoders.omni.component import Omni
from sailplan.model.encoders.omni.published import PublishedVisionEncoder, work
from sailplan.model.testing import join_layout, published_pictures, random_inputs, small_config
from sailplan.parity.layouts import compare
from sailplan_kernels.testing import run_ranks

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZES, "intermediate_size": 48, "image_size": 20, "patch_size": 4}
PROCESSOR = {
    "image_processor_type": "SiglipImageProcessorFast",
    "size": {"height": 20, "width": 20},
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.3, 0.2, 0.25],
}
# Kind -> the shape of a tiny one, and its native side; a class token, registers, a grid of features
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "clip": (published_pictures("clip_vision_model"), 4),
    "dinov2_with_registers": (published_pictures("dinov2_with_registers") | {"mlp_ratio": 2}, 4),
    "vit": (published_pictures("vit"), 4),
    "convnext": (
        {"model_type": "convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [4, 8, 8, 16]},
        32,
    ),
}


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module", params=[True, False], ids=["both_towers", "image_tower"])
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """(folder, image tower) of a SigLIP of two towers, or of its image tower alone."""
    torch.manual_seed(4)
    vision = SiglipVisionConfig(**VISION)
    text = SiglipTextConfig(**SIZES, intermediate_size=48, vocab_size=20, max_position_embeddings=8)
    whole = shaken(
        SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
        if request.param
        else SiglipVisionModel(vision)
    )
    folder = tmp_path_factory.mktemp("published")
    whole.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder, whole.vision_model if request.param else whole


def configured(folder: Path | None, **said: Any) -> ModelConfig:
    config = small_config()
    config.vision = dataclasses.replace(config.vision, backbone="published", published=said)
    config.weights.vision = None if folder is None else str(folder)
    return config


def pictures(size: tuple[int, int]) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2)) * 2 - 1


def seen(rank: int, world: int, folder: Path, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    parallel = join_layout(world)
    layout = ParallelConfig(tensor=world, dtype="float32")
    encoder = build_encoder(configured(folder), layout, parallel, 1)
    with torch.no_grad():
        return [encoder.vision(pictures(size)) for size in sizes]  # type: ignore[operator]


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_folder_alone_says_what_the_encoder_is(published: tuple[Path, Any], tensor: int) -> None:
    """Its config.json, weights and means; its own grid, and one that its positions are fitted to."""
    folder, model = published
    sizes = [(20, 20), (12, 28)]
    mean, deviation = (
        torch.tensor(PROCESSOR[name])[:, None, None] for name in ("image_mean", "image_std")
    )
    for found in run_ranks(seen, tensor, folder, sizes):
        for size, tokens in zip(sizes, found, strict=True):
            values = ((pictures(size) + 1) / 2 - mean) / deviation
            with torch.no_grad():
                wanted = model(values, interpolate_pos_encoding=True).last_hidden_state
            torch.testing.assert_close(tokens, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_any_picture_encoder_is_one_setting(kind: str) -> None:
    """One token for each square; what stands before them is left out."""
    said, patch = KINDS[kind]
    settings = dataclasses.replace(
        small_config().vision, backbone="published", patch=patch, published=said
    )
    torch.manual_seed(1)
    encoder = PublishedVisionEncoder(settings, torch.float64).train()
    assert not any(module.training for module in encoder.modules())
    torch.manual_seed(1)
    kinds = dict(said)
    wanted_of = AutoModel.from_config(AutoConfig.for_model(**kinds), dtype=torch.float32).double()
    images = pictures((3 * patch, 3 * patch)).double()
    with torch.no_grad():
        found = encoder(images)
        wanted = wanted_of.eval()(images).last_hidden_state
    wanted = wanted.flatten(2).transpose(1, 2) if wanted.ndim == 4 else wanted[:, -9:]
    assert found.shape == (2, 9, encoder.width) and encoder.width == 16
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert work("key", said) > 0


@pytest.mark.parametrize(("world", "tensor"), [(2, 1), (2, 2)])
def test_gradients_are_those_of_the_full_batch(world: int, tensor: int) -> None:
    """All losses through the gradient cache, with a class token and its own means."""
    for row in compare(world, tensor, ((1, 0), (3, 1)), vision="published"):
        assert row.error <= 1e-10, row


def frozen(rank: int, world: int) -> tuple[bool, set[str]]:
    parallel = join_layout(1)
    layout = ParallelConfig(dtype="bfloat16", activation_checkpointing="full")
    encoder = build_encoder(small_config(vision="published"), layout, parallel, 1)
    for part, parameters in encoder.parts().items():
        for parameter in parameters:
            parameter.requires_grad_(part == "perceiver")
    found = encoder(random_inputs(("vision", "text"), 3, 1, dtype=torch.float32)).fused
    found.square().sum().backward()
    with_gradient = {
        name.partition(".")[0]
        for name, parameter in encoder.named_parameters()
        if parameter.grad is not None
    }
    return bool(found.isfinite().all()), with_gradient


def test_frozen_under_a_trained_perceiver() -> None:
    for finite, trained in run_ranks(frozen, 2):
        assert finite and trained == {"perceiver"}


@pytest.mark.parametrize("published", [False], indirect=True)
def test_what_does_not_fit_is_one_line(published: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = published
    check_weights(configured(folder))
    check_weights(configured(folder, **Omni(configured(folder)).model.vision.published))
    said = {"model_type": "siglip_vision_model", **VISION}
    wide = tmp_path / "wide"
    wide.mkdir()
    tensors = load_file(folder / "model.safetensors")
    (wide / "config.json").write_text((folder / "config.json").read_text())
    name = "encoder.layers.0.mlp.fc1.weight"
    found = next(key for key in tensors if key.endswith(name))
    save_file(tensors | {found: torch.zeros(49, 32)}, wide / "model.safetensors")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    save_file({"head.weight": torch.zeros(1)}, bare / "model.safetensors")
    other = configured(folder)
    other.vision = dataclasses.replace(other.vision, backbone="own")
    patched = configured(folder)
    patched.vision = dataclasses.replace(patched.vision, patch=8)
    several = configured(None, model_type="siglip2_vision_model", **SIZES)
    for config, words in (
        (configured(None), r"model\.vision\.published is empty, and model\.weights\.vision null"),
        (
            configured(folder, **said, hidden_act="relu"),
            r"published\.hidden_act is relu.* has gelu",
        ),
        (configured(wide), r"fc1\.weight has the shape \(49, 32\); expected \(48, 32\)"),
        (configured(bare), r"its weights lack \d+ of \d+ tensors"),
        (
            configured(None, model_type="nothing"),
            r"model\.vision\.published: transformers knows no",
        ),
        (several, r"wants pixel_values, .*expected an encoder of pictures"),
        (other, "backbone is own: expected siglip2 or qwen3_vl or published"),
        (patched, r"model\.vision\.patch is 8, but SiglipVisionModel has 16 tokens"),
    ):
        with pytest.raises(ConfigurationError, match=words) as caught:
            check_weights(config)
            Omni(config).check_shapes(ParallelConfig())
        assert "\n" not in str(caught.value)


def test_a_run_of_the_former_tower_is_refused_in_one_line() -> None:
    saved = as_dict(compose(["experiment=quickstart"]))
    saved["model"]["vision"]["backbone"] = "siglip"
    with pytest.raises(ConfigurationError, match=r"backbone=siglip: expected one of own, publish"):
        from_dict(saved)


@pytest.mark.parametrize("published", [False], indirect=True)
def test_what_is_exported_needs_the_folder_no_more(published: tuple[Path, Any]) -> None:
    model, _ = Omni(configured(published[0])).exported({})
    assert model.weights.vision is None and model.vision.processor["image_mean"][0] == 0.4
    assert Omni(model).model == model and SequenceLayout.of(model).side == 4
