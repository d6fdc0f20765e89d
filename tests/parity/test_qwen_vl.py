"""Qwen3-VL in the omni encoder is transformers' own: image tower, deepstack, positions in three
dimensions, text model.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from sailplan.config.schema import ModelConfig, TransformerShape, WeightsConfig
from sailplan.data.packing import OmniInputs
from sailplan.errors import ConfigurationError
from sailplan.model.backbones.load import allocate, load, open_sources
from sailplan.model.check import check_model
from sailplan.model.count import check_weights
from sailplan.model.testing import join_layout, small_config, whole_tensor
from sailplan.model.tower import OmniEncoder
from sailplan_kernels.testing import run_ranks

BEFORE, BEHIND, IMAGE = 93, 94, 95  # tokens: around a picture, and where its own tokens go in
VISION = {
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 48,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}
TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e4,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}


def configured(**weights: str) -> ModelConfig:
    config = small_config()
    config.vocabulary, config.embedding, config.rope_base, config.rope_sections = (
        96,
        32,
        5e4,
        [4, 2, 2],
    )
    config.tower = TransformerShape(3, 32, 4, 2, 48, query_key_norm=True, head_size=16, causal=True)
    image = TransformerShape(
        3, 32, 4, None, 48, norm="layer", activation="gelu_tanh", gated=False, bias=True
    )
    config.vision = dataclasses.replace(
        config.vision,
        backbone="qwen3_vl",
        patch=4,
        position_grid=6,
        merge=2,
        deepstack=[0, 2],
        encoder=image,
    )
    config.pooling = "last_token"
    config.weights = WeightsConfig(**weights)
    return config


@pytest.fixture(scope="module", params=["with_head", "without_head"])
def published(request, tmp_path_factory):
    """(folder, Qwen3VLModel) of the whole model with its language-model head or without."""
    torch.manual_seed(4)
    tokens = {
        "image_token_id": IMAGE,
        "vision_start_token_id": BEFORE,
        "vision_end_token_id": BEHIND,
    }
    config = Qwen3VLConfig(
        text_config=dict(TEXT), vision_config=dict(VISION), **tokens, tie_word_embeddings=False
    )
    model = (
        Qwen3VLForConditionalGeneration(config)
        if request.param == "with_head"
        else Qwen3VLModel(config)
    )
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # norms start as ones and biases as zeros: a mix-up would not show
            parameter.mul_(5 if parameter.ndim > 1 else 1).add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("qwen3_vl")
    model.eval().save_pretrained(folder)
    return folder, getattr(model, "model", model)


def pictures(height: int, width: int) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1


def patches_of(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The published processor's layout of pictures shown twice: patches [all, 3 * 2 * 4 * 4] by
    squares of 2 x 2, and each one's grid.
    """
    number, _, height, width = images.shape
    cut = (
        images[:, :, None]
        .expand(-1, -1, 2, -1, -1)
        .reshape(number, 3, 2, height // 8, 2, 4, width // 8, 2, 4)
    )
    return cut.permute(0, 3, 6, 4, 7, 1, 2, 5, 8).reshape(-1, 96), torch.tensor(
        [[1, height // 4, width // 4]] * number
    )


def loaded(world: int, config: ModelConfig, **options: bool):
    parallel = join_layout(world)
    sources = open_sources(config)
    encoder = OmniEncoder(config, published=[source.part for source in sources], **options)
    for source in sources:
        allocate(encoder)
        load(source, encoder, parallel.tensor_parallel_rank, world)
    whole = {
        name: whole_tensor(parameter, parameter, parallel)
        for name, parameter in encoder.named_parameters()
    }
    return encoder, whole, sum(source.folder.bytes_read for source in sources)


def seen(rank, world, folder, sizes):
    encoder, whole, read = loaded(world, configured(vision=str(folder)), share_encoders=False)
    with torch.no_grad():
        return [encoder.vision(pictures(*size)) for size in sizes], whole, read


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_image_tower_and_its_deepstack_are_those_of_transformers(published, tmp_path, tensor):
    folder, model = published
    sizes = [
        (24, 24),
        (16, 32),
    ]  # its own grid of positions, and one to which they are interpolated
    found, _, read = run_ranks(seen, tensor, folder, sizes)[0]
    for size, parts in zip(sizes, found, strict=True):
        with torch.no_grad():
            wanted = model.visual(*patches_of(pictures(*size)))
        assert len(parts) == 1 + len(wanted.deepstack_features) == 3
        for part, other in zip(
            parts, [wanted.pooler_output, *wanted.deepstack_features], strict=True
        ):
            torch.testing.assert_close(part.flatten(0, 1), other, rtol=0, atol=1e-5)
            assert other.std() > 0.3
    in_the_files = sum(p.nbytes for p in model.visual.parameters())
    assert read == in_the_files if tensor == 1 else read < 0.7 * in_the_files


LENGTHS = (7, 4, 5)  # text tokens of the rows; the last has no picture


def rows(modalities=("vision", "text"), frames=1) -> OmniInputs:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    images = torch.rand(3, frames, 3, 16, 24, generator=generator) * 2 - 1
    present = torch.tensor([[True] * frames, [True] + [False] * (frames - 1), [False] * frames])
    inputs = OmniInputs(
        modalities,
        torch.randint(0, BEFORE, mask.shape, generator=generator),
        mask,
        mask,
        images,
        present,
    )
    return (
        inputs
        if "vision" in modalities
        else dataclasses.replace(inputs, images=None, image_mask=None)
    )


def encoded(rank, world, folder, modalities, frames, marks):
    config = configured(vision=str(folder), tower=str(folder))
    config.vision.marks = marks
    encoder, whole, _ = loaded(world, config)
    found = []
    for pooling in ("last_token", "mean"):
        config.pooling = pooling
        with torch.no_grad():
            found.append(encoder(rows(modalities, frames)).fused)
    return *found, whole


@pytest.mark.parametrize(
    ("tensor", "modalities", "frames", "marks"),
    [
        (1, ("vision", "text"), 1, []),
        (1, ("vision", "text"), 2, [BEFORE, BEHIND]),
        (2, ("vision", "text"), 2, [BEFORE, BEHIND]),
        (1, ("text",), 1, []),
    ],
)
def test_the_whole_model_is_that_of_transformers(
    published, tmp_path, tensor, modalities, frames, marks
):
    """With the pictures before the text, where both have the same sequence."""
    folder, model = published
    inputs = rows(modalities, frames)
    last, mean, _ = run_ranks(encoded, tensor, folder, modalities, frames, marks)[0]
    for row, length in enumerate(LENGTHS):
        text, options = inputs.token_ids[row, :length], {}
        if inputs.images is not None and bool(inputs.image_mask[row].any()):
            pixels, grid = patches_of(inputs.images[row][inputs.image_mask[row]])
            picture = torch.tensor([*marks[:1], *[IMAGE] * 6, *marks[1:]])
            text = torch.cat([*[picture] * len(grid), text])
            options = {
                "pixel_values": pixels,
                "image_grid_thw": grid,
                "mm_token_type_ids": (text == IMAGE).int()[None],
            }
        model.rope_deltas = None
        with torch.no_grad():
            wanted = model(
                input_ids=text[None],
                attention_mask=torch.ones(1, len(text), dtype=torch.int64),
                **options,
            ).last_hidden_state[0]
        torch.testing.assert_close(last[row], wanted[-1], rtol=0, atol=1e-5)
        torch.testing.assert_close(mean[row], wanted.mean(0), rtol=0, atol=1e-5)
        assert wanted.std() > 0.3


def test_the_image_tower_alone_can_be_loaded(published, tmp_path):
    published[1].visual.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert isinstance(published[1].visual, Qwen3VLVisionModel) and not any(
        "visual" in key for key in tensors
    )
    one, two = (
        run_ranks(seen, 1, folder, [(24, 24)])[0][0][0] for folder in (published[0], tmp_path)
    )
    for left, right in zip(one, two, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def frames_of(rank, world):
    join_layout(1)
    encoder = OmniEncoder(configured(), dtype=torch.float64, seed=1)
    inputs = dataclasses.replace(rows(), images=torch.randn(3, 2, 3, 16, 24, dtype=torch.float64))
    inputs.image_mask = torch.tensor([[True, True], [True, False], [False, False]])
    with torch.no_grad():
        together = encoder(inputs, per_modality=True)
        noise = inputs.images.masked_fill(~inputs.image_mask[:, :, None, None, None], float("nan"))
        other = encoder(dataclasses.replace(inputs, images=noise), per_modality=True)
        swapped = encoder(
            dataclasses.replace(
                inputs, images=inputs.images.flip(1), image_mask=inputs.image_mask.flip(1)
            ),
            per_modality=True,
        )
        one = encoder(
            dataclasses.replace(
                inputs, images=inputs.images[:, :1], image_mask=inputs.image_mask[:, :1]
            ),
            per_modality=True,
        )
    return together, other, swapped, one


def test_absent_frames_change_nothing_and_the_order_of_frames_does():
    [(together, other, swapped, one)] = run_ranks(frames_of, 1)
    assert torch.equal(together.by_modality["vision"], other.by_modality["vision"]) and torch.equal(
        together.fused, other.fused
    )
    assert not torch.allclose(together.fused[0], swapped.fused[0], atol=1e-4)
    torch.testing.assert_close(
        one.fused[1:], together.fused[1:], rtol=0, atol=1e-12
    )  # as many frames as the neighbours have
    torch.testing.assert_close(
        one.by_modality["vision"][1:], together.by_modality["vision"][1:], rtol=0, atol=1e-12
    )
    assert not together.by_modality["vision"][2].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_sections": []}, r"model\.rope_sections is \[\].* mrope_section \[4, 2, 2\]"),
        (
            {"vision.deepstack": [0, 1]},
            r"model\.vision\.deepstack is \[0, 1\].* deepstack_visual_indexes \[0, 2\]",
        ),
        ({"vision.marks": [94, 93]}, r"model\.vision\.marks is \[94, 93\].*\[93, 94\]"),
        ({"vision.position_grid": 5}, r"model\.vision\.position_grid squared is 25.* 36"),
        ({"vision.backbone": "siglip2"}, r"model_type qwen3_vl; expected one of siglip2"),
    ],
)
@pytest.mark.parametrize("published", ["with_head"], indirect=True)
def test_files_of_another_model_are_one_line(published, change, words):
    check_weights(configured(vision=str(published[0]), tower=str(published[0])))
    config = configured(vision=str(published[0]), tower=str(published[0]))
    for key, value in change.items():
        setattr(
            config.vision if key.startswith("vision.") else config,
            key.removeprefix("vision."),
            value,
        )
    with pytest.raises(ConfigurationError, match=words):
        check_weights(config)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"deepstack": [2, 0]}, "deepstack"),
        ({"deepstack": [3]}, "deepstack"),
        ({"deepstack": [0, 1, 2]}, "deepstack"),
        ({"merge": 0}, "merge"),
        ({"marks": [1]}, "marks"),
    ],
)
def test_shapes_that_cannot_be_built_name_their_key(change, key):
    config = configured()
    config.vision, config.tower.layers = dataclasses.replace(config.vision, **change), 2
    with pytest.raises(ConfigurationError, match=rf"model\.vision\.{key}( is|=)"):
        check_model(config, 1)


@pytest.mark.parametrize("sections", [[4, 2], [4, 2, 3], [0, 4, 4]])
def test_rotary_sections_that_do_not_fit_name_their_key(sections):
    config = configured()
    config.rope_sections = sections
    with pytest.raises(ConfigurationError, match=r"model\.rope_sections is"):
        check_model(config, 1)
