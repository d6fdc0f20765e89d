"""CLAP's audio encoder is transformers' own, buffers included, and comes back bit-equal at every
tensor-parallel size.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ClapAudioConfig,
    ClapAudioModel,
    ClapAudioModelWithProjection,
    ClapConfig,
    ClapModel,
    ClapTextConfig,
)

from sailplan.config.schema import LoraConfig, ModelConfig, SwinShape
from sailplan.errors import ConfigurationError
from sailplan.model.backbones.load import allocate, load, open_sources
from sailplan.model.check import check_model
from sailplan.model.count import check_weights
from sailplan.model.testing import join_layout, small_config, whole_tensor
from sailplan.model.tower import OmniEncoder
from sailplan_kernels.testing import RankFailure, run_ranks

# Three stages over 16 x 16, 8 x 8 and 4 x 4 patches: windows of 4 moved by half a window in the
# first two, one window in the last.
SWIN = SwinShape(
    layers=[2, 2, 2], heads=[2, 2, 4], hidden=8, feed_forward=2, window=4, patch=4, image=64
)
SIZES = {
    "window_size": 4,
    "num_mel_bins": 16,
    "spec_size": 64,
    "patch_size": 4,
    "patch_stride": [4, 4],
    "hidden_size": 32,
    "projection_dim": 12,
    "depths": [2, 2, 2],
    "num_attention_heads": [2, 2, 4],
    "patch_embeds_hidden_size": 8,
    "mlp_ratio": 2.0,
    "num_hidden_layers": 3,
}


def configured(folder: Path | None) -> ModelConfig:
    config = small_config()
    config.audio = dataclasses.replace(config.audio, backbone="clap", mel_bins=16, swin=SWIN)
    config.weights.audio = None if folder is None else str(folder)
    return config


@pytest.fixture(scope="module", params=["whole", "projection", "tower"])
def clap(request, tmp_path_factory):
    """(folder, audio encoder, projection or None) of a CLAP with its text encoder, without it,
    and of the audio encoder alone.
    """
    torch.manual_seed(4)
    audio = ClapAudioConfig(**SIZES)
    if request.param == "whole":
        text = {
            "vocab_size": 20,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "pad_token_id": 1,
        }
        model = ClapModel(
            ClapConfig(
                text_config=ClapTextConfig(**text).to_dict(),
                audio_config=audio.to_dict(),
                projection_dim=12,
            )
        )
    else:
        model = (
            ClapAudioModelWithProjection(audio)
            if request.param == "projection"
            else ClapAudioModel(audio)
        )
    tower = getattr(model, "audio_model", model)
    norm = tower.audio_encoder.batch_norm
    with torch.no_grad():
        for parameter in (
            model.parameters()
        ):  # biases and the table of positions start as zeros: a mix-up would not show
            parameter.add_(torch.randn_like(parameter) * 0.2)
        norm.running_mean.uniform_(-40, -20)
        norm.running_var.uniform_(50, 200)
        norm.num_batches_tracked.fill_(7)
    folder = tmp_path_factory.mktemp("clap")
    model.eval().save_pretrained(folder)
    return folder, tower, getattr(model, "audio_projection", None)


def sounds(frames: int) -> torch.Tensor:
    return torch.randn(3, frames, 16, generator=torch.Generator().manual_seed(2)) * 15 - 30


def heard(rank, world, folder, frames):
    parallel = join_layout(world)
    config = configured(folder)
    encoder = OmniEncoder(config, published=["audio"])
    allocate(encoder)
    (source,) = open_sources(config)
    load(source, encoder, parallel.tensor_parallel_rank, world)
    sound = encoder.audio[
        "encoder"
    ].train()  # the batch norm's statistics are fixed in training too
    with torch.no_grad():
        hidden, chunks = sound.tower(sounds(frames)), sound.chunks(sounds(frames))
    vector = sound(sounds(frames)[:, None], torch.tensor([[True], [True], [False]]))
    vector.square().sum().backward()
    assert all(
        parameter.grad is not None and bool(parameter.grad.isfinite().all())
        for parameter in sound.parameters()
    )
    whole = {
        name: whole_tensor(value, value, parallel)
        for name, value in encoder.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }
    return hidden, chunks, vector.detach(), whole


@pytest.mark.parametrize(("tensor", "frames"), [(1, 256), (2, 101)], ids=["1-full", "2-stretched"])
def test_clap_hears_as_transformers_does(clap, tmp_path, tensor, frames):
    folder, model, projection = clap
    with torch.no_grad():
        output = model(sounds(frames)[:, None])
    # The published encoder folds its last positions by strips of time: [n, h, 4 x 4] to [n, h, 1,
    # 16].
    folded = output.last_hidden_state.unflatten(3, (4, 4)).permute(0, 3, 2, 4, 1).flatten(1, 3)
    found = run_ranks(heard, tensor, folder, frames)
    for hidden, chunks, vector, _ in found:
        torch.testing.assert_close(hidden, folded, rtol=0, atol=1e-5)
        torch.testing.assert_close(hidden.mean(1), output.pooler_output, rtol=0, atol=1e-5)
        if projection is not None:
            with torch.no_grad():
                wanted = torch.nn.functional.normalize(projection(output.pooler_output), dim=-1)
            torch.testing.assert_close(chunks, wanted, rtol=0, atol=1e-5)
        assert vector.shape == (3, 12) and bool(vector[:2].any(1).all()) and not vector[2].any()
    assert hidden.std() > 0.5 and hidden.std(0).mean() > 0.05


def test_drawn_weights_are_those_of_the_seed_at_any_size():
    one, two = run_ranks(drawn, 1)[0], run_ranks(drawn, 2)[0]
    assert (
        all(torch.equal(one[name], two[name]) for name in one) and one["bin_variance"].eq(900).all()
    )


def drawn(rank, world):
    join_layout(world)
    return OmniEncoder(configured(None), seed=3).audio["encoder"].tower.state_dict()


def changed(folder: Path, out: Path, change) -> Path:
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    change(tensors, config.get("audio_config", config))
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    return out


TABLE = "audio_model.audio_encoder.layers.0.blocks.0.attention.self.relative_position_bias_table"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t, c: c.update(enable_fusion=True),
            [
                "model.weights.audio",
                "enable_fusion",
                "expected weights without fusion",
                "set audio=clap_fusion",
            ],
        ),
        (
            lambda t, c: c.update(depths=[2, 2, 4]),
            ["model.audio.swin.layers is [2, 2, 2]", "depths [2, 2, 4]"],
        ),
        (lambda t, c: c.update(patch_stride=[2, 2]), ["patch_stride [2, 2]", "overlap"]),
        (
            lambda t, c: t.pop("audio_projection.linear2.bias"),
            ["no tensor audio_projection.linear2.bias", "1 missing"],
        ),
        (lambda t, c: t.update({TABLE: t[TABLE][1:].clone()}), [TABLE, "(48, 2)", "(49, 2)"]),
        (lambda t, c: t.update({TABLE: t[TABLE].long()}), [TABLE, "I64"]),
    ],
)
@pytest.mark.parametrize("clap", ["whole"], indirect=True)
def test_files_that_do_not_fit_are_one_line(clap, tmp_path, change, words):
    check_weights(configured(clap[0]))
    with pytest.raises(ConfigurationError) as caught:
        check_weights(configured(changed(clap[0], tmp_path / "bad", change)))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("clap", ["tower"], indirect=True)
def test_an_index_that_is_not_the_shapes_own_is_refused(clap, tmp_path):
    name = "audio_encoder.layers.1.blocks.1.attention.self.relative_position_index"
    folder = changed(
        clap[0],
        tmp_path / "bad",
        lambda tensors, _: tensors.update({name: tensors[name].T.contiguous()}),
    )
    with pytest.raises(
        RankFailure, match=f"ConfigurationError.*{name} is not what the model's shape gives"
    ):
        run_ranks(heard, 1, folder, 256)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"heads": [2, 2]}, "swin.heads"),
        ({"heads": [2, 3, 4]}, "swin.heads"),
        ({"window": 8}, "swin.image"),
        ({"image": 96}, "swin.image"),
    ],
)
def test_shapes_that_cannot_be_built_name_their_key(change, key):
    config = configured(None)
    config.audio.swin = dataclasses.replace(SWIN, **change)
    with pytest.raises(ConfigurationError, match=rf"model\.audio\.{key}"):
        check_model(config, 2)


def test_low_rank_updates_that_would_have_no_place_are_refused():
    config = configured(None)
    config.lora = LoraConfig(rank=2, parts=["tower", "audio"])
    with pytest.raises(
        ConfigurationError, match=r"model\.lora\.parts is \['tower', 'audio'\].*leave out audio"
    ):
        check_model(config, 1)
