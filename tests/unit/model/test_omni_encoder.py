"""What a row's vector depends on, and what it must not depend on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sailplan.config.schema import AudioConfig, ModelConfig, TransformerShape, VisionConfig
from sailplan.errors import ConfigurationError
from sailplan.model.check import check_model
from sailplan.model.count import count_parameters
from sailplan.model.testing import join_layout, random_inputs, rows_of, small_config
from sailplan.model.tower import OmniEncoder

EVERYTHING = ("text", "vision", "audio")


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """A world of one in this process."""
    store = tmp_path_factory.mktemp("world") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    join_layout(1)
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def encoder(world):
    return OmniEncoder(small_config(), dtype=torch.float64, seed=1)


def encode(encoder, inputs):
    with torch.no_grad():
        return encoder(inputs, per_modality=True)


def assert_equal(left, right, atol=1e-12):
    assert left.named().keys() == right.named().keys()
    for name, vector in left.named().items():
        torch.testing.assert_close(vector, right.named()[name], rtol=0, atol=atol)


@pytest.mark.parametrize("modalities", [("text",), ("vision",), ("audio", "text"), EVERYTHING])
def test_a_row_does_not_depend_on_its_neighbours_or_padding(encoder, modalities):
    inputs = random_inputs(modalities, 6, 0)
    together = encode(encoder, inputs)
    for row in range(6):
        alone = encode(encoder, rows_of(inputs, row, row + 1))
        for name in ("fused", "text"):
            torch.testing.assert_close(
                alone.named()[name][0], together.named()[name][row], rtol=0, atol=1e-12
            )
    wider = dataclasses.replace(
        inputs,
        token_ids=torch.nn.functional.pad(inputs.token_ids, (0, 3), value=7),
        token_mask=torch.nn.functional.pad(inputs.token_mask, (0, 3)),
        text_mask=torch.nn.functional.pad(inputs.text_mask, (0, 3)),
    )
    assert_equal(encode(encoder, wider), together)


def test_absent_parts_have_no_influence_whatever_they_hold(encoder):
    inputs = random_inputs(EVERYTHING, 6, 0)
    images, audio, tokens = inputs.images.clone(), inputs.audio.clone(), inputs.token_ids.clone()
    images[~inputs.image_mask] = 1e3
    audio[~inputs.audio_mask] = float("inf")
    tokens[~inputs.token_mask] = 11
    assert_equal(
        encode(encoder, dataclasses.replace(inputs, images=images, audio=audio, token_ids=tokens)),
        encode(encoder, inputs),
    )


def test_present_parts_all_have_influence(encoder):
    inputs = random_inputs(EVERYTHING, 2, 0, absent=False)
    base = encode(encoder, inputs).fused
    for name in ("images", "audio"):
        value = getattr(inputs, name)
        for part in range(2):  # both frames, both chunks
            other = value.clone()
            other[:, part] = other[:, part].flip(-2) * 2
            assert (
                encode(encoder, dataclasses.replace(inputs, **{name: other})).fused - base
            ).abs().min(1).values.max() > 0
    swapped = inputs.token_ids[:, [1, 0, 2, 3, 4]]  # the order of words counts
    assert not torch.allclose(
        encode(encoder, dataclasses.replace(inputs, token_ids=swapped)).fused, base
    )
    turned = encode(
        encoder, dataclasses.replace(inputs, images=inputs.images.flip(1))
    ).fused  # and that of frames
    assert not torch.allclose(turned, base)


def test_a_row_with_nothing_present_is_zero_with_finite_gradients(encoder):
    inputs = random_inputs(EVERYTHING, 3, 0)
    for name in ("token_mask", "text_mask", "image_mask", "audio_mask"):
        getattr(inputs, name)[1] = False
    out = encoder(inputs, per_modality=True)
    for vector in (out.fused, out.by_modality["vision"], out.by_modality["text"]):
        assert (vector[1] == 0).all()
    (out.fused.sum() + out.by_modality["vision"].sum() + out.by_modality["text"].sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
    encoder.zero_grad()


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("modalities", [("text",), EVERYTHING])
def test_an_empty_micro_batch_gives_empty_vectors_and_zero_gradients(encoder, modalities, tokens):
    out = encoder(rows_of(random_inputs(modalities, 2, 0, tokens=tokens), 0, 0), per_modality=True)
    assert out.fused.shape == (0, 16) and ("vision" in out.by_modality) == ("vision" in modalities)
    out.fused.sum().backward()
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert gradients and all((gradient == 0).all() for gradient in gradients)
    encoder.zero_grad()


def test_towers_follow_the_declaration_not_the_presence(encoder):
    """Two ranks with different rows of one view must touch the same parameters."""
    inputs = random_inputs(EVERYTHING, 2, 0)
    inputs.image_mask[:] = False
    inputs.audio_mask[:] = False
    encoder(inputs).fused.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    encoder.zero_grad()
    encoder(random_inputs(("text",), 2, 0)).fused.sum().backward()
    touched = {name.split(".")[0] for name, p in encoder.named_parameters() if p.grad is not None}
    assert touched == {"text", "tower"}
    encoder.zero_grad()


def test_per_modality_vectors_are_means_over_their_own_positions(encoder):
    inputs = random_inputs(("vision", "text"), 4, 0)
    out = encode(encoder, inputs)
    rows = inputs.image_mask.any(1)
    weights = torch.stack(
        [rows * 3.0, (inputs.token_mask & ~inputs.text_mask).sum(1), inputs.text_mask.sum(1)], 1
    )
    without_prompt = inputs.token_mask.equal(inputs.text_mask)
    assert not without_prompt
    own = out.by_modality["vision"] * weights[:, :1] + out.by_modality["text"] * weights[:, 2:]
    prompt = (out.fused * weights.sum(1, keepdim=True) - own) / weights[:, 1:2].clamp(min=1)
    assert prompt.abs().max() < 1 and (prompt[weights[:, 1] == 0].abs() < 1e-12).all()
    assert encode(encoder, random_inputs(("text",), 2, 0)).by_modality.get("vision") is None


def test_dropout_is_a_function_of_the_seed_and_off_in_evaluation():
    encoder = OmniEncoder(small_config(dropout=0.3), dtype=torch.float64, seed=1)
    inputs = random_inputs(EVERYTHING, 3, 0, absent=False)

    def fused(seed):
        torch.manual_seed(seed)
        return encoder(inputs).fused

    assert torch.equal(fused(1), fused(1)) and not torch.allclose(fused(1), fused(2))
    encoder.eval()
    assert torch.equal(fused(1), fused(2))


def test_building_is_a_function_of_the_seed_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models = [
        OmniEncoder(small_config(), dtype=dtype, seed=seed)
        for dtype, seed in ((torch.float32, 1), (torch.float64, 1), (torch.float32, 2))
    ]
    assert torch.equal(torch.rand(3), expected)
    first, wide, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name].double(), wide[name]) for name in first)
    assert not torch.equal(first["text.weight"], other["text.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_float32_in_narrow_models(dtype):
    encoder = OmniEncoder(small_config(), dtype=dtype, seed=1)
    exact = OmniEncoder(small_config(), dtype=torch.float64, seed=1)
    out = encode(encoder, random_inputs(EVERYTHING, 3, 0, dtype=torch.float32))
    assert (
        out.fused.dtype
        == out.by_modality["vision"].dtype
        == out.by_modality["text"].dtype
        == torch.float32
    )
    error = (
        out.fused - encode(exact, random_inputs(EVERYTHING, 3, 0)).fused
    ).norm() / out.fused.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)


def test_patch_stem_and_plain_mean_and_any_image_size():
    config = small_config()
    config.pooling, config.vision.stem, config.vision.patch, config.vision.encoder.layers = (
        "mean",
        "patch",
        3,
        0,
    )
    encoder = OmniEncoder(config, dtype=torch.float64)
    inputs = random_inputs(("vision",), 2, 0, absent=False)
    assert (
        encode(encoder, dataclasses.replace(inputs, images=torch.randn(2, 2, 3, 9, 60).double()))
        .fused.abs()
        .max()
        > 0
    )
    with pytest.raises(ValueError, match=r"multiples of model\.vision\.patch=3"):
        encode(encoder, inputs)


def test_a_few_steps_tell_rows_apart():
    """Contrastive loss on random triples falls from chance to near zero: gradients reach every
    tower.
    """
    encoder = OmniEncoder(small_config(), dtype=torch.float32, seed=0)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    sides = [
        random_inputs((name,), 8, index, dtype=torch.float32, absent=False)
        for index, name in enumerate(EVERYTHING)
    ]
    sides[1].token_mask[:] = sides[2].token_mask[:] = False
    losses = []
    for _ in range(40):
        text, vision, audio = (
            torch.nn.functional.normalize(encoder(side).fused, dim=-1) for side in sides
        )
        labels = torch.arange(8)
        loss = (
            sum(
                torch.nn.functional.cross_entropy(left @ text.T / 0.1, labels)
                for left in (vision, audio)
            )
            / 2
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5 and losses[-1] < 0.2, losses[::10]


@pytest.mark.parametrize(
    ("change", "tensor", "key"),
    [
        (lambda c: setattr(c.tower, "heads", 5), 1, "model.tower.hidden"),
        (lambda c: setattr(c.tower, "key_value_heads", 1), 2, "model.tower.key_value_heads"),
        (
            lambda c: setattr(c.vision.perceiver, "feed_forward", 25),
            2,
            "model.vision.perceiver.feed_forward",
        ),
        (lambda c: setattr(c.audio.encoder, "heads", 3), 1, "model.audio.encoder.hidden"),
        (lambda c: setattr(c, "vocabulary", 41), 2, "model.vocabulary"),
        (lambda c: setattr(c, "embedding", 8), 1, "model.embedding"),
        (lambda c: setattr(c, "prefixes", [8, 32]), 1, "model.prefixes"),
        (lambda c: setattr(c, "pooling", "max"), 1, "model.pooling"),
        (lambda c: setattr(c.vision, "stem", "linear"), 1, "model.vision.stem"),
        (lambda c: setattr(c.vision, "patch", 6), 1, "model.vision.patch"),
        (lambda c: setattr(c.audio, "time_stride", 3), 1, "model.audio.time_stride"),
        (lambda c: setattr(c.tower, "dropout", 1.0), 1, "model.tower.dropout"),
    ],
)
def test_what_cannot_be_built_is_named_by_its_key(change, tensor, key):
    config = small_config()
    check_model(config, 2, share_encoders=False)
    change(config)
    with pytest.raises(ConfigurationError, match=f"^{key}( is |=).*: expected .*"):
        check_model(config, tensor, share_encoders=False)


def test_encoders_that_are_not_cut_need_not_divide():
    """Three heads over two tensor-parallel ranks: whole on each, rows shared out."""
    config = small_config()
    config.audio.encoder.heads, config.audio.encoder.hidden = 3, 18
    check_model(config, 2)
    with pytest.raises(
        ConfigurationError, match=r"^model\.audio\.encoder\.heads is 3: expected a multiple"
    ):
        check_model(config, 2, share_encoders=False)


def test_the_count_is_the_built_models_at_any_layout(encoder):
    counts = count_parameters(small_config())
    assert counts["total"] == sum(p.numel() for p in encoder.parameters())
    assert counts["perceiver"] == sum(p.numel() for p in encoder.parts()["perceiver"])
    assert len({id(p) for part in encoder.parts().values() for p in part}) == len(
        list(encoder.parameters())
    )


def published_shape(layers):
    """The published size: a 1.5 B decoder's shape made bidirectional, and a perceiver of 16
    latents of width 1024 in 6 layers.
    """

    def wide(layers):
        return TransformerShape(layers, 1024, 16, None, 4096)

    return ModelConfig(
        vocabulary=151936,
        embedding=1536,
        prefixes=[128, 768, 1536],
        tower=TransformerShape(layers, 1536, 12, 2, 8960),
        vision=VisionConfig(14, "patch", 64, wide(min(layers, 24)), wide(min(layers, 6)), 16),
        audio=AudioConfig(TransformerShape(min(layers, 12), 768, 12, None, 2048)),
    )


def test_the_published_size_can_be_laid_out():
    counts = count_parameters(published_shape(28))
    assert counts["text"] == 151936 * 1536
    assert 1.30e9 < counts["tower"] < 1.32e9  # 1.31 B in the blocks of such a decoder
    assert 0.09e9 < counts["perceiver"] < 0.12e9


@pytest.mark.slow
def test_the_published_width_runs_here():
    config = published_shape(1)
    config.vocabulary = 4096  # the width is the point; the whole embedding takes seconds to draw
    encoder = OmniEncoder(config, dtype=torch.bfloat16)
    inputs = random_inputs(("vision", "text"), 1, 0, dtype=torch.float32, absent=False)
    inputs.images = torch.randn(1, 1, 3, 28, 28)
    inputs.image_mask = torch.ones(1, 1, dtype=torch.bool)
    out = encode(encoder, inputs)
    assert out.fused.shape == (1, 1536) and torch.isfinite(out.fused).all()
