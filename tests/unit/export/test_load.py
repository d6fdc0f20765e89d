"""Risks: `sailplan.load` gives other vectors than the run, in another order, or imports what
encoding does not need.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from PIL import Image

import sailplan
from sailplan.config.schema import Config, DataConfig
from sailplan.errors import ConfigurationError
from sailplan.export.sentence_transformers import export_sentence_transformers
from sailplan.export.weights import export_weights
from sailplan.model.encoders.transformers import TransformersConfig
from sailplan.parity.published import TINY
from sailplan.train.run_folder import RunFolder

sys.path.insert(0, str(Path(__file__).parent))
from folders import KEYS, VIEWS, items, least_cosine, shown, trained, valid
from test_omni_folder import configured
from test_published_folder import source

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 0.99999


@pytest.fixture(scope="module")
def omni(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, Config, dict[str, torch.Tensor]]:
    """A tensor-parallel run with LoRA, whose tokenizer's folder is gone: run folder, checkpoint,
    configuration, its own vectors.
    """
    root = tmp_path_factory.mktemp("omni")
    config = configured("own, LoRA", root / "data")
    checkpoint, vectors = trained(config, root / "checkpoints", list(VIEWS), tensor=2)
    RunFolder(root).write_config(config)
    (root / "data" / "tokenizer.json").unlink()
    return root, checkpoint, dataclasses.replace(config), vectors


@pytest.mark.parametrize("place", ["run", "checkpoint", "exported", "sentence-transformers"])
def test_every_place_gives_the_runs_vectors(omni: Any, tmp_path: Path, place: str) -> None:
    """From the run's own copy of the tokenizer: nothing of the training data is there any more."""
    root, checkpoint, _, vectors = omni
    config = RunFolder(root).load_config()
    places = {
        "run": lambda: root,
        "checkpoint": lambda: checkpoint,
        "exported": lambda: export_weights(checkpoint, tmp_path / "out", config=config),
        "sentence-transformers": lambda: export_sentence_transformers(
            checkpoint, tmp_path / "out", config=config
        ),
    }
    model = sailplan.load(places[place](), device="cpu")
    for name, view in VIEWS.items():
        wanted = vectors[name][valid(view)]
        asked = [shown(items()[row], view, tmp_path) for row in valid(view)]
        for batch in (1, 32):
            assert (
                least_cosine(model.encode(asked, view=f"things.{name}", batch_size=batch), wanted)
                >= LIMIT
            ), (name, batch)
        assert least_cosine(model.encode(asked, view=name, dimension=4), wanted[:, :4]) >= LIMIT
    assert model.prefixes == [4, 8, 16] and not model.encode(["boot"], normalize=False).shape[0] - 1


def test_pictures_and_sound_in_every_form(omni: Any, tmp_path: Path) -> None:
    model, item = sailplan.load(omni[0], device="cpu"), items()[0]
    samples, rate = soundfile.read(io.BytesIO(item.audio), dtype="float32")
    picture, path = Image.open(io.BytesIO(item.images[0])), tmp_path / "picture.png"
    path.write_bytes(item.images[0])
    (tmp_path / "sound.wav").write_bytes(item.audio)
    seen = model.encode(
        [path, str(path), picture, np.asarray(picture), {KEYS["vision"]: [item.images[0]]}]
    )
    heard = model.encode(
        [
            tmp_path / "sound.wav",
            samples,
            {"array": samples, "sampling_rate": rate},
            {"audio": item.audio},
        ]
    )
    for found in (seen, heard):
        assert (
            found.dtype == np.float32
            and np.allclose(found, found[:1], atol=1e-6)
            and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        )
    both = model.encode(
        ["a boot", picture, "snow", {"text": "a boot", "image": picture}]
    )  # unlike items, in their order
    assert np.allclose(both[0], model.encode("a boot"), atol=1e-6) and np.allclose(
        both[1], seen[0], atol=1e-6
    )
    assert model.similarity(both, both).shape == (4, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.encode("a", view="nowhere"), "view=nowhere: expected one of"),
        (lambda model: model.encode("a", dimension=99), "dimension=99: expected 1 to 16"),
        (lambda model: model.encode([{"words": "a"}]), "expected some of text, image, audio"),
        (lambda model: model.encode([3]), "an item is a int"),
    ],
)
def test_what_cannot_be_encoded_is_one_line(omni: Any, call: Any, words: str) -> None:
    with pytest.raises((ConfigurationError, ValueError), match=words):
        call(sailplan.load(omni[0], device="cpu"))


@pytest.mark.parametrize("kind", TINY)
def test_a_trained_published_model(tmp_path: Path, kind: str) -> None:
    modalities: list[Any] = list(TINY[kind][0])
    options: dict[str, Any] = {"projection": True, "pooling": "cls"} if kind == "bert" else {}
    model = TransformersConfig(
        source=str(source(kind, tmp_path / "source")),
        embedding=16,
        prefixes=[4, 16],
        modalities=modalities,
        **options,
    )
    config = Config(name="run", model=model, data=DataConfig(max_tokens=9, frames=2))
    views = ["text"] if kind == "bert" else ["text", "vision", "text_vision"]
    checkpoint, vectors = trained(config, tmp_path / "checkpoints", views)
    RunFolder(tmp_path).write_config(config)
    out = export_sentence_transformers(checkpoint, tmp_path / "out", config=config)
    for place in (tmp_path, out):
        loaded = sailplan.load(place, device="cpu")
        for name in views:
            asked = [shown(items()[row], VIEWS[name], tmp_path) for row in valid(VIEWS[name])]
            said = {"prompt": VIEWS[name].prompt + (" " if kind == "bert" and place == out else "")}
            assert (
                least_cosine(
                    loaded.encode(asked, **({"view": name} if place == tmp_path else said)),
                    vectors[name][valid(VIEWS[name])],
                )
                >= LIMIT
            )


IMPORTS = """
import sys
import sailplan
assert not {"torch", "transformers", "numpy"} & set(sys.modules), "import sailplan is slow"
assert all(name in dir(sailplan) for name in sailplan.__all__)
model = sailplan.load(sys.argv[1], device="cpu")
assert model.encode("a boot").shape == (16,)
print(sorted({"wandb", "megatron", "hydra", "matplotlib", "webdataset"} & set(sys.modules)))
"""


@pytest.mark.parametrize("kind", ["omni", "bert"])
def test_the_first_vector_imports_no_training(omni: Any, tmp_path: Path, kind: str) -> None:
    if kind == "omni":
        place = export_sentence_transformers(
            omni[1], tmp_path / "out", config=RunFolder(omni[0]).load_config()
        )
    else:
        place = source("bert", tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, str(place)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented() -> None:
    for name in sailplan.__all__:
        assert getattr(sailplan, name).__doc__, name
    with pytest.raises(AttributeError):
        _ = sailplan.nowhere  # type: ignore[attr-defined]


def test_the_lines_of_the_readme_train_and_encode(tmp_path: Path) -> None:
    """As they stand, but for the model's place: one with random weights of MiniLM's width."""
    (code,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        if "sailplan.Trainer" in block
    ]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    tokenizer = source("bert", tmp_path / "tiny")
    shape = TINY["bert"][1] | {"hidden_size": 384}
    transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model("bert", **shape)
    ).save_pretrained(tokenizer)
    assert code.count("sentence-transformers/all-MiniLM-L6-v2") == 1
    code = code.replace("sentence-transformers/all-MiniLM-L6-v2", str(tokenizer))
    around = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=around,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "runs" / "pairs" / "metrics.jsonl").read_text().splitlines()[0])
    assert re.search(r"\(2, 384\)\s*$", done.stdout)
