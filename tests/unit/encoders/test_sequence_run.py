"""Risk: a model that reads pictures within its text does not go through a run: train, stop, go on,
evaluate, export, encode, from one YAML file.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import sailplan
from sailplan.cli.testing import command
from sailplan.train.testing import metrics

sys.path.insert(0, str(Path(__file__).parent))
from single_stream import qwen2_vl

MODEL = """encoder: transformers
source: published
embedding: 16
prefixes: [8, 16]
modalities: [text, vision]
pooling: last_token
media_marks: {vision: "<|vision_start|><|image_pad|><|vision_end|>"}
image_processor_options: {max_pixels: 1024}
"""
DATA = """# @package data.sets.things
shards: shards
language_weights: {en: 1.0}
field_drop: 0.0
views: {item: {modalities: [vision, text], fields: [title], prompt: find}, name: {fields: [title]}}
patterns: {item_to_name: {query: item, target: name}}
"""
EXPERIMENT = """# @package _global_
defaults: [override /model: sees, override /data: [reading, things], override /logger: [console], _self_]
global_batch: 8
data: {max_tokens: 16}
step: {micro_batch: 3}
loggers: {console: {every: 1}}
parallel: {threads: 1}
checkpoint: {every_steps: 2}
order: [only]
stages:
  only: {steps: 4, trainable: [text, vision, temperatures], data: {things: 1}, objectives: {infonce: 1.0}}
evaluation:
  tasks: {find: {dataset: things, query: item, target: name, split: train, metrics: [recall]}}
"""


def project(root: Path) -> None:
    for name, text in {
        "data/things": DATA,
        "experiment/things": EXPERIMENT,
        "model/sees": MODEL,
    }.items():
        (root / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "conf" / f"{name}.yaml").write_text(text)
    qwen2_vl(root / "published")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModel.from_config(
            transformers.AutoConfig.from_pretrained(root / "published")
        ).save_pretrained(root / "published")
    (root / "shards").mkdir()
    draw = np.random.default_rng(0)
    with tarfile.open(root / "shards" / "things-000000.tar", "w") as archive:
        for number in range(16):
            picture = io.BytesIO()
            shape = (20 + 4 * (number % 3), 24, 3)
            Image.fromarray(draw.integers(0, 255, shape, dtype=np.uint8)).save(picture, "PNG")
            title = "a red boot" if number % 2 else "green snow"
            body = {"id": f"things/{number}", "split": "train", "fields": {"title": {"en": title}}}
            members = [("json", json.dumps(body).encode())]
            members += [("png", picture.getvalue())] if number % 5 else []
            for ending, content in members:
                info = tarfile.TarInfo(f"{number:04}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def test_a_run_from_one_yaml_trains_goes_on_and_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the run's model.source is found
    project(tmp_path)
    words = ["experiment=things", "name=whole", "resume=auto"]
    code, _, err = command(tmp_path, "train", *words)
    assert code == 0, err
    run = tmp_path / "runs" / "whole"
    losses = {line["step"]: line["loss/total"] for line in metrics(run)}
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    code, _, err = command(tmp_path, "train", *words)
    assert code == 0, err
    assert {line["step"]: line["loss/total"] for line in metrics(run)} == losses
    assert sorted(losses) == [1, 2, 3, 4]
    code, out, err = command(tmp_path, "evaluate", "--run-folder", "runs/whole")
    assert code == 0 and "recall@1" in out, err
    code, _, err = command(
        tmp_path, "export", "--run-folder", "runs/whole", "--to", "sentence-transformers"
    )
    assert code == 0, err
    items = ["a red boot", {"text": "green snow", "image": np.full((24, 24, 3), 9, np.uint8)}]
    model = sailplan.load(run, device="cpu")
    vectors = model.encode(items, view="things.item")
    (tmp_path / "published").rename(tmp_path / "gone")
    again = sailplan.load(run / "sentence-transformers", device="cpu")
    np.testing.assert_allclose(again.encode(items, view="things.item"), vectors, atol=1e-5)
    assert not np.allclose(vectors[0], vectors[1])
