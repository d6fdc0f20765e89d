"""The published sizes: counted without being made, and a training step at their full width."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import (
    ClapAudioConfig,
    ClapAudioModelWithProjection,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from sailplan.config.compose import compose
from sailplan.config.schema import ModelConfig
from sailplan.model.count import count_parameters
from sailplan.model.testing import join_layout, random_inputs
from sailplan.model.tower import OmniEncoder
from sailplan.train.plan import describe
from sailplan.train.testing import run
from sailplan_kernels.testing import run_ranks

SIZES = ("sail_1b5", "siglip2_qwen3_0b6", "qwen3_vl_2b")


def test_counts_are_those_of_the_published_models():
    """Qwen2.5-1.5B has 1.5437 B parameters, Qwen3-0.6B 0.5960 B (its head shares the embedding);
    SigLIP2's image tower is 428 M with its pooling head, of which 15.2 M are the head; Qwen3-VL-2B
    has 2.1275 B, its text model
    those of Qwen3-1.7B (1.7206 B)."""
    sail, other, qwen = (count_parameters(compose([f"model={name}"]).model) for name in SIZES)
    assert sail["text"] + sail["tower"] - 3 * 1536 == 1_543_714_304
    assert other["text"] + other["tower"] - 3 * 1024 == 596_049_920
    assert sail["vision"] == other["vision"] and 0.410e9 < sail["vision"] < 0.415e9
    assert qwen["text"] + qwen["tower"] - 3 * 2048 == 1_720_574_976
    with torch.device("meta"):
        sizes = {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2048,
            "deepstack_visual_indexes": [5, 11, 17],
        }
        image = Qwen3VLVisionModel(Qwen3VLVisionConfig(**sizes))
        clap = ClapAudioModelWithProjection(
            ClapAudioConfig()
        )  # transformers' defaults are laion/clap-htsat-unfused's shape
        sizes = {
            "hidden_size": 1152,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "intermediate_size": 4304,
        }
        naflex = Siglip2VisionModel(Siglip2VisionConfig(**sizes))
        fused = ClapAudioModelWithProjection(ClapAudioConfig(enable_fusion=True))
    with_fusion = count_parameters(compose(["model=sail_1b5", "audio=clap_fusion"]).model)
    assert (
        with_fusion["audio"] - sail["audio"]
        == sum(p.numel() for p in fused.parameters()) - sum(p.numel() for p in clap.parameters())
        > 0
    )
    any_size = count_parameters(compose(["model=siglip2_qwen3_0b6", "vision=siglip2_naflex"]).model)
    assert any_size["vision"] == sum(
        p.numel() for name, p in naflex.named_parameters() if not name.startswith("head.")
    )
    assert qwen["vision"] == sum(p.numel() for p in image.parameters()) and qwen["perceiver"] == 0
    assert (
        sail["audio"] == sum(p.numel() for p in clap.parameters()) + 512 + 512 * 1536
    )  # and our norm and adapter


def test_plan_of_the_full_recipe_tells_parameters_and_memory():
    found = run("plan", "experiment=sail_1b5", "--ranks", "16", "--json")
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["parameters"]["total"] > 2e9 and told["memory_bytes"]["total"] > 2e9
    assert told["stages"][0]["learning_rate"]["peak"] == 1e-5


def test_the_plan_counts_the_sound_of_views_that_have_it():
    def activations(*overrides: str) -> int:
        return describe(compose(["experiment=quickstart", "audio=clap", *overrides]), 1)[
            "memory_bytes"
        ]["activations"]

    silent = activations(
        "data.sets.prompts.views.speech.modalities=[text]",
        "+data.sets.prompts.views.speech.fields=[asr]",
        "data.audio_chunks=4",
    )
    assert activations("data.audio_chunks=4") > 3 * activations() > 9 * silent


def shallow(name: str) -> ModelConfig:
    """Full width, two layers a stack; 4096 of the vocabulary's entries, because drawing them all
    takes longer than the step.
    """
    config = compose([f"model={name}"]).model
    two = {
        part: dataclasses.replace(getattr(config.vision, part), layers=2)
        for part in ("encoder", "perceiver")
    }
    config.vision = dataclasses.replace(
        config.vision, **two, deepstack=[0, 1] if config.vision.deepstack else []
    )
    if config.vision.published:
        config.vision.published = config.vision.published | {"num_hidden_layers": 2}
    config.audio.encoder.layers = config.tower.layers = 2
    config.audio.swin.layers = [2, 2, 2, 2]
    config.vocabulary = 4096
    config.vision.marks = [1, 2] if config.vision.marks else []
    return config


def step(rank, world, name):
    join_layout(1)
    encoder = OmniEncoder(shallow(name))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-4)
    inputs = random_inputs(
        ("vision", "audio", "text"), 2, 0, dtype=torch.float32, absent=False, frames=1
    )
    side = 4 * encoder.config.vision.patch
    inputs.images = torch.randn(2, 1, 3, side, side)
    inputs.audio, inputs.audio_mask = torch.randn(2, 1, 64, 64), torch.ones(2, 1, dtype=torch.bool)
    losses = []
    for _ in range(2):
        left, right = torch.nn.functional.normalize(encoder(inputs).fused, dim=-1)
        loss = left @ right
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in encoder.parameters())
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("name", SIZES)
def test_a_step_at_full_width(name):
    [losses] = run_ranks(step, 1, name, timeout=120)
    assert losses[1] < losses[0]  # the two rows were pushed apart
