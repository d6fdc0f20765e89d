"""Risks: a trained model that hears, or several models beside each other, whose folder cuts, masks,
pools or projects otherwise than the run.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import sailplan
from sailplan.config.schema import Config, DataConfig
from sailplan.export.sentence_transformers import export_sentence_transformers
from sailplan.model.encoders.transformers import TransformersConfig
from sailplan.model.encoders.transformers.config import PeftConfig, PromptTemplate
from sailplan.model.encoders.two_towers import TwoTowersConfig

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "encoders")]
from folders import (  # noqa: E402
    VIEWS,
    items,
    least_cosine,
    needs_sentence_transformers,
    read_without_sailplan,
    shown,
    trained,
    valid,
)
from single_stream import configured  # noqa: E402
from test_published_folder import source  # noqa: E402
from test_published_sound import clap, spectrogram_transformer, wav2vec2, whisper  # noqa: E402

LIMIT = 0.99999
BATCHES, SIZES = (1, 32), (4, 8)
PROJECTED = {"embedding": 12, "prefixes": [4, 8, 12]}
LORA = PeftConfig(rank=2, targets=["query", "value"])
HAS_PEFT = importlib.util.find_spec("peft") is not None


def alone(folder: Path, seconds: float, modalities: list[Any], **options: Any) -> tuple[Any, float]:
    settings: dict[str, Any] = {"embedding": 16, "prefixes": [4, 8, 16], "weights": "drawn"}
    return TransformersConfig(
        source=str(folder), modalities=modalities, **settings | options
    ), seconds


def loud_whisper(folder: Path) -> float:
    """With weights so large that a recording is heard through the noise of the positions."""
    seconds = whisper(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"init_std": 0.5}))
    return seconds


def hears_whisper(folder: Path) -> tuple[Any, float]:
    return alone(folder, loud_whisper(folder), ["audio"])


def hears_clap(folder: Path) -> tuple[Any, float]:
    source("bert", folder)
    return alone(folder, clap(folder), ["text", "audio"], projection=True, **PROJECTED)


def hears_raw_samples(folder: Path) -> tuple[Any, float]:
    return alone(folder, wav2vec2(folder), ["audio"], pooling="max")


def hears_spectrograms(folder: Path) -> tuple[Any, float]:
    return alone(folder, spectrogram_transformer(folder), ["audio"], pooling="model")


def encoder_of_a_decoder(folder: Path) -> tuple[Any, float]:
    source("bert", folder)
    transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4
    ).save_pretrained(folder)
    return alone(folder, 1.0, ["text"])


def sees(folder: Path) -> TransformersConfig:
    transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    ).save_pretrained(folder)
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    ).save_pretrained(folder)
    return TransformersConfig(source=str(folder), weights="drawn")


def reads(folder: Path) -> TransformersConfig:
    prompts = {"find the item": PromptTemplate("want ", "", " item")}
    return TransformersConfig(
        source=str(source("bert", folder)), prompts=prompts, lora=LORA if HAS_PEFT else PeftConfig()
    )


def two_towers(folder: Path) -> tuple[Any, float]:
    return TwoTowersConfig(
        text=reads(folder / "text"), vision=sees(folder / "vision"), **PROJECTED
    ), 1.0


def three_towers(folder: Path) -> tuple[Any, float]:
    seconds = loud_whisper(folder / "audio")
    hears = TransformersConfig(source=str(folder / "audio"), weights="drawn")
    found, _ = two_towers(folder)
    return replace(found, audio=hears), seconds


def single_stream(kind: str) -> Any:
    """A model that reads media within its text, asked with a chat template or with marks."""

    def make(folder: Path) -> tuple[Any, float]:
        chat = kind == "llava"
        return configured(folder, kind, chat_template=chat, projection=True, **PROJECTED).model, 0.8

    return make


# Run -> what makes it, the views that it is asked for.
RUNS: dict[str, tuple[Any, list[str]]] = {
    "whisper": (hears_whisper, ["audio"]),
    "clap": (hears_clap, ["text", "audio"]),
    "wav2vec2": (hears_raw_samples, ["audio"]),
    "ast": (hears_spectrograms, ["audio"]),
    "t5": (encoder_of_a_decoder, ["text"]),
    "two towers": (two_towers, ["text", "vision", "text_vision"]),
    "qwen2_vl": (single_stream("qwen2_vl"), ["text", "vision", "text_vision"]),
    "llava": (single_stream("llava"), ["text", "text_vision"]),
    "qwen2_audio": (single_stream("qwen2_audio"), ["text", "audio"]),
    "three towers": (three_towers, ["text", "vision", "audio", "text_vision", "all"]),
}
# Folder with one thing changed -> run, view, the change.
CHANGED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fewer chunks": ("whisper", "audio", {"audio_chunks": 1}),
    "another pooling": ("wav2vec2", "audio", {"pooling": "mean"}),
    "longer chunks": ("three towers", "all", {"audio_chunk_seconds": 0.25}),
    "another mark": ("qwen2_vl", "vision", {"media_marks": {"vision": "<|image_pad|>"}}),
    "shorter rows": ("two towers", "text", {"max_tokens": 8}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Run -> exported folder, the run's own vectors; the published folders are gone."""
    found = {}
    for run, (make, views) in RUNS.items():
        root = tmp_path_factory.mktemp("run")
        (root / "source").mkdir()
        model, seconds = make(root / "source")
        data = DataConfig(max_tokens=11, frames=2, audio_chunk_seconds=seconds / 2, audio_chunks=2)
        config = Config(name=run, model=model, data=data)
        checkpoint, vectors = trained(config, root, views)
        folder = export_sentence_transformers(checkpoint, root / "exported", config=config)
        shutil.rmtree(root / "source")
        found[run] = (folder, vectors)
    return found


@pytest.fixture(scope="module")
def read(
    made: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("read")

    def rows(view: str) -> list[Any]:
        return [shown(items()[row], VIEWS[view], folder) for row in valid(VIEWS[view])]

    asked = []
    for run, (exported, _) in made.items():
        asks: list[Any] = []
        for view in RUNS[run][1]:
            ways = {str(size): {"batch_size": size} for size in BATCHES}
            ways |= {f"cut {size}": {"truncate_dim": size} for size in SIZES}
            asks += [
                (f"{run}/{view}/{way}", rows(view), {"prompt_name": f"things.{view}", **options})
                for way, options in ways.items()
            ]
        if run == "three towers":
            asks += [
                ("no prompt", rows("text"), {}),
                ("mixed", rows("audio") + rows("all"), {"batch_size": 8}),
            ]
        asked.append((str(exported), True, asks))
    for name, (run, view, change) in CHANGED.items():
        other = shutil.copytree(made[run][0], folder / name)
        settings = json.loads((other / "sailplan_encoder.json").read_text())
        assert change.keys() <= settings.keys()
        (other / "sailplan_encoder.json").write_text(json.dumps(settings | change))
        asked.append((str(other), True, [(name, rows(view), {"prompt_name": f"things.{view}"})]))
    return read_without_sailplan(asked, folder)


@needs_sentence_transformers
@pytest.mark.parametrize("run", RUNS)
def test_sentence_transformers_gives_the_runs_vectors(
    made: Mapping[str, Any], read: Mapping[str, np.ndarray], run: str
) -> None:
    for view in RUNS[run][1]:
        wanted = made[run][1][view][valid(VIEWS[view])]
        assert least_cosine(wanted, wanted.roll(1, 0)) < 0.999, "rows are to be told apart"
        for batch in BATCHES:
            assert least_cosine(read[f"{run}/{view}/{batch}"], wanted) >= LIMIT, (view, batch)
        for size in SIZES:
            found = read[f"{run}/{view}/cut {size}"]
            assert least_cosine(found, wanted[:, :size]) >= LIMIT, (view, size)


@needs_sentence_transformers
def test_unlike_items_lie_in_one_batch(
    made: Mapping[str, Any], read: Mapping[str, np.ndarray]
) -> None:
    vectors = made["three towers"][1]
    wanted = torch.cat([vectors[view][valid(VIEWS[view])] for view in ("audio", "all")])
    assert least_cosine(read["mixed"], wanted) >= LIMIT


@needs_sentence_transformers
@pytest.mark.parametrize("change", [*CHANGED, "no prompt"])
def test_what_is_read_otherwise_is_seen(
    made: Mapping[str, Any], read: Mapping[str, np.ndarray], change: str
) -> None:
    run, view, _ = CHANGED.get(change, ("three towers", "text", {}))
    wanted = made[run][1][view][valid(VIEWS[view])]
    assert least_cosine(read[change], wanted) < LIMIT


@pytest.mark.parametrize("run", RUNS)
def test_sailplan_opens_the_folder_again(made: Mapping[str, Any], run: str, tmp_path: Path) -> None:
    folder, vectors = made[run]
    model = sailplan.load(folder, device="cpu")
    for view in RUNS[run][1]:
        rows = [shown(items()[row], VIEWS[view], tmp_path) for row in valid(VIEWS[view])]
        found = model.encode(rows, view=f"things.{view}")
        assert least_cosine(found, vectors[view][valid(VIEWS[view])]) >= LIMIT, view


@pytest.mark.parametrize("run", RUNS)
def test_the_models_are_of_the_published_format(made: Mapping[str, Any], run: str) -> None:
    """AutoModel opens each without code of its own; of an encoder-decoder the decoder is drawn."""
    folder = made[run][0]
    for place in [path.parent for path in folder.rglob("model.safetensors")]:
        model, told = transformers.AutoModel.from_pretrained(place, output_loading_info=True)
        parts = {name.split(".")[0] for name in told["missing_keys"]}
        assert parts <= ({"decoder"} if model.config.is_encoder_decoder else set())
        assert not told["unexpected_keys"]
