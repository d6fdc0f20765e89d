"""CLAP with feature fusion is transformers' own, batch norms included, comes back bit-equal, and
trains alike whatever the rows hold.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ClapAudioConfig, ClapAudioModel, ClapConfig, ClapModel, ClapTextConfig

from sailplan.config.schema import ModelConfig, SwinShape
from sailplan.errors import ConfigurationError
from sailplan.model import parallelize
from sailplan.model.backbones.load import allocate, load, open_sources
from sailplan.model.count import check_weights
from sailplan.model.testing import join_layout, random_inputs, rows_of, small_config, whole_tensor
from sailplan.model.tower import OmniEncoder
from sailplan_kernels.testing import run_ranks

# 16 x 16 patches; the crops' are 5 wide each, so that the last column has none.
SWIN = SwinShape(layers=[2, 1], heads=[2, 2], hidden=8, feed_forward=2, window=4, patch=4, image=64)
SIZES = {
    "window_size": 4,
    "num_mel_bins": 16,
    "spec_size": 64,
    "patch_size": 4,
    "patch_stride": [4, 4],
    "hidden_size": 16,
    "projection_dim": 12,
    "depths": [2, 1],
    "num_attention_heads": [2, 2],
    "patch_embeds_hidden_size": 8,
    "mlp_ratio": 2.0,
    "num_hidden_layers": 2,
    "enable_fusion": True,
    "fusion_type": None,
}
LONGER = torch.tensor([True, False, True, False])


def configured(folder: Path | None) -> ModelConfig:
    config = small_config()
    config.audio = dataclasses.replace(config.audio, backbone="clap_fusion", mel_bins=16, swin=SWIN)
    config.weights.audio = None if folder is None else str(folder)
    return config


@pytest.fixture(scope="module", params=["whole", "tower"])
def clap(request: Any, tmp_path_factory: Any) -> tuple[Path, ClapAudioModel]:
    """(folder, audio encoder) of a CLAP with its text encoder and projection, and of the audio
    encoder alone.
    """
    torch.manual_seed(4)
    audio = ClapAudioConfig(**SIZES)
    model: Any = ClapAudioModel(audio)
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
    tower = getattr(model, "audio_model", model)
    with torch.no_grad():
        for parameter in model.parameters():  # biases start as zeros: a mix-up would not show
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.num_batches_tracked.fill_(7)
        norm = tower.audio_encoder.batch_norm
        norm.running_mean.uniform_(-40, -20)
        norm.running_var.uniform_(50, 200)
    folder = tmp_path_factory.mktemp("clap_fusion")
    model.eval().save_pretrained(folder)
    return folder, tower


def sounds(frames: int) -> torch.Tensor:
    return torch.randn(4, 4, frames, 16, generator=torch.Generator().manual_seed(2)) * 15 - 30


def heard(
    rank: int, world: int, folder: Path, frames: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    parallel = join_layout(world)
    config = configured(folder)
    encoder = OmniEncoder(config, published=["audio"])
    allocate(encoder)
    (source,) = open_sources(config)
    load(source, encoder, parallel.tensor_parallel_rank, world)
    sound = encoder.audio[
        "encoder"
    ].train()  # the batch norms' statistics are fixed in training too
    with torch.no_grad():
        hidden = sound.tower(sounds(frames), LONGER)
    mask = torch.stack(
        [
            torch.tensor([True, True, True, False]),
            *[LONGER & torch.tensor([True, True, True, False])] * 3,
        ],
        1,
    )
    vector = sound(sounds(frames), mask)
    vector.square().sum().backward()
    assert all(
        parameter.grad is not None and bool(parameter.grad.isfinite().all())
        for parameter in sound.parameters()
    )
    noise = sounds(frames).masked_fill(~mask[:, :, None, None], float("nan"))
    assert torch.equal(sound(noise, mask), vector)
    with pytest.raises(ValueError, match="1 spectrograms a recording: expected 4"):
        sound(sounds(frames)[:, :1], mask[:, :1])
    whole = {
        name: whole_tensor(value, value, parallel)
        for name, value in encoder.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }
    return hidden, vector.detach(), whole


@pytest.mark.parametrize(("tensor", "frames"), [(1, 256), (2, 101)], ids=["1-full", "2-stretched"])
def test_it_hears_as_transformers_does(clap: Any, tmp_path: Path, tensor: int, frames: int) -> None:
    folder, model = clap
    with torch.no_grad():
        wanted, swapped = (
            model(sounds(frames), is_longer=flag[:, None]).pooler_output
            for flag in (LONGER, ~LONGER)
        )
    assert bool(((wanted - swapped).abs().amax(1) > 1e-3).all())  # the crops matter
    found = run_ranks(heard, tensor, folder, frames)
    for hidden, vector, _ in found:
        torch.testing.assert_close(hidden.mean(1), wanted, rtol=0, atol=1e-5)
        assert vector.shape == (4, 12) and bool(vector[:3].any(1).all()) and not vector[3].any()


def one_step(
    rank: int, world: int, tensor: int
) -> tuple[int, torch.Tensor, dict[str, torch.Tensor]]:
    parallel = join_layout(tensor)
    config = configured(None)
    encoder = parallelize.shard(
        OmniEncoder(config, dtype=torch.float64, seed=1), parallel, shard=True
    )
    inputs = random_inputs(("audio", "text"), 4, 3, absent=False)
    inputs.audio = sounds(64).double()
    inputs.audio_mask = torch.tensor(
        [[True] * 4, [True] * 4, [True, False, False, False], [False] * 4]
    )  # one rank has no longer sound
    rows = 4 // parallel.data_parallel_size
    start = parallel.data_parallel_rank * rows
    found = encoder(rows_of(inputs, start, start + rows)).fused
    weights = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(9))[
        start : start + rows
    ]
    ((found * weights).sum() * parallel.data_parallel_size).backward()
    parallelize.finish_gradients(encoder, parallel)
    return (
        start,
        found.detach(),
        {
            name: whole_tensor(p, p.grad, parallel)
            for name, p in encoder.named_parameters()
            if p.grad is not None
        },
    )


@pytest.mark.parametrize(("tensor", "data"), [(1, 2), (2, 2)])
def test_gradients_are_the_same_at_every_layout(tensor: int, data: int) -> None:
    [(_, whole, expected)] = run_ranks(one_step, 1, 1)
    assert (
        expected["audio.encoder.tower.fusion.local.0.weight"].abs().max() > 1e-6
        and expected["audio.encoder.tower.crops.weight"].abs().max() > 1e-6
    )
    for start, part, gradients in run_ranks(one_step, tensor * data, tensor):
        torch.testing.assert_close(part, whole[start : start + len(part)], rtol=0, atol=1e-12)
        assert gradients.keys() == expected.keys()
        for name, wanted in expected.items():
            torch.testing.assert_close(
                gradients[name],
                wanted,
                rtol=0,
                atol=1e-10,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"enable_fusion": False}, r"enable_fusion is false.*set audio=clap"),
        ({"fusion_type": "channel_map"}, "channel_map"),
        ({"aff_block_r": 2}, "not 4"),
    ],
)
@pytest.mark.parametrize("clap", ["tower"], indirect=True)
def test_files_that_do_not_fit_are_one_line(
    clap: Any, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder, _ = clap
    check_weights(configured(folder))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | change)
    )
    with pytest.raises(ConfigurationError, match=words):
        check_weights(configured(tmp_path))
