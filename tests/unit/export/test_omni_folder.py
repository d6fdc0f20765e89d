"""Risks: an exported omni tower that other programs load and that gives other vectors, or needs
sailplan to run.

The table: family x modality x batch, and after tensor parallelism and LoRA, cosine to the run's own
vectors at every truncation.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sailplan.config.schema import Config, LoraConfig
from sailplan.curriculum.testing import write_pack
from sailplan.export.sentence_transformers import export_sentence_transformers
from sailplan.model.testing import PUBLISHED, published_config, small_config

sys.path.insert(0, str(Path(__file__).parent))
from folders import (
    VIEWS,
    items,
    least_cosine,
    needs_sentence_transformers,
    read_without_sailplan,
    shown,
    trained,
    valid,
)

LIMIT = 0.99999
RUNS = (
    "own",
    *PUBLISHED,
    "own, tensor 2",
    "own, LoRA",
    "own, LoRA, tensor 2",
    "causal, last token",
    "latent attention",
)
BATCHES = (1, 32)


def configured(run: str, folder: Path) -> Config:
    config = write_pack(folder)
    config.name, config.data.max_tokens, config.data.image_size = (
        run.replace(",", "").replace(" ", "-"),
        8,
        8,
    )
    (
        config.data.audio_chunk_seconds,
        config.data.mel_bins,
        config.data.audio_chunks,
        config.data.frames,
    ) = 0.5, 6, 2, 2
    config.model = published_config(run) if run in PUBLISHED else small_config()
    config.model.vocabulary = 40
    if run == "naflex_fusion":
        config.data.image_patches, config.data.image_patch = 6, 4
        config.data.audio_chunks, config.data.spectrogram, config.data.audio_rate = (
            1,
            "clap_fusion",
            48000,
        )
    if run == "qwen_clap":
        config.data.spectrogram, config.data.audio_rate = "clap", 48000
    if run == "siglip_whisper":
        config.data.spectrogram = "whisper"
        config.model.vision.processor = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 10},
            "crop_size": {"height": 8, "width": 8},
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.3, 0.2, 0.25],
        }
    if "LoRA" in run:
        config.model.lora = LoraConfig(rank=2, parts=["tower", "vision", "perceiver", "audio"])
    if run.startswith("causal"):
        config.model.tower.causal, config.model.pooling = True, "last_token"
    if run.startswith("latent"):
        config.model.pooling, config.model.pooling_latents, config.model.pooling_heads = (
            "latent_attention",
            5,
            2,
        )
    return config


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """Run -> exported folder, the run's own vectors."""
    found = {}
    for run in RUNS:
        root = tmp_path_factory.mktemp("run")
        config = configured(run, root)
        checkpoint, vectors = trained(
            config, root, list(VIEWS), tensor=2 if "tensor 2" in run else 1
        )
        found[run] = (
            export_sentence_transformers(checkpoint, root / "exported", config=config),
            vectors,
        )
    return found


@pytest.fixture(scope="module")
def read(
    made: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, np.ndarray]:
    """Vectors of every run's folder as SentenceTransformer gives them in a process without
    sailplan.
    """
    folder = tmp_path_factory.mktemp("read")
    asked = []
    for run, (exported, _) in made.items():
        asks: list[Any] = []
        for name, view in VIEWS.items():
            chosen = [shown(items()[row], view, folder) for row in valid(view)]
            asks += [
                (
                    f"{run}/{name}/{batch}",
                    chosen,
                    {"batch_size": batch, "prompt_name": f"things.{name}"},
                )
                for batch in BATCHES
            ]
            asks += [
                (f"{run}/{name}/cut {size}", chosen, {"truncate_dim": size, "prompt_name": name})
                for size in (4, 8)
            ]
        mixed = [shown(items()[0], view, folder) for view in VIEWS.values()]
        asks.append((f"{run}/unlike", mixed, {"prompt": "name"}))
        asked.append((str(exported), True, asks))
    return read_without_sailplan(asked, folder)


@needs_sentence_transformers
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("view", VIEWS)
def test_sentence_transformers_gives_the_runs_vectors(
    made: Mapping[str, Any], read: Mapping[str, np.ndarray], run: str, view: str
) -> None:
    wanted = made[run][1][view][valid(VIEWS[view])]
    for batch in BATCHES:
        assert least_cosine(read[f"{run}/{view}/{batch}"], wanted) >= LIMIT, batch
    for size in (4, 8):
        assert least_cosine(read[f"{run}/{view}/cut {size}"], wanted[:, :size]) >= LIMIT, size
    assert np.allclose(np.linalg.norm(read[f"{run}/{view}/32"], axis=1), 1.0, atol=1e-5)


@needs_sentence_transformers
def test_unlike_items_share_a_batch(
    made: Mapping[str, Any], read: Mapping[str, np.ndarray]
) -> None:
    """The first item in each view, all at once and with the prompt of two of them."""
    found = read["own/unlike"]
    for place, name in enumerate(VIEWS):
        same = least_cosine(found[place : place + 1], made["own"][1][name][:1])
        assert same >= LIMIT if VIEWS[name].prompt == "name" else same < LIMIT


def vectors(folder: Path, prompt: str = "find the item", **changes: Any) -> np.ndarray:
    """The texts' vectors through AutoModel and AutoProcessor, with changes to config.json's
    settings.
    """
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for name, value in changes.items():
        owner = config.settings
        *path, last = name.split("__")
        for part in path:
            owner = owner[part]
        owner[last] = value
    model = transformers.AutoModel.from_pretrained(
        folder, config=config, trust_remote_code=True
    ).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        texts = [item.fields["title"]["en"] for item in items() if item.fields]
        found: np.ndarray = model(**processor(text=texts, prompt=prompt)).pooler_output.numpy()
    return found


def test_what_is_left_out_is_seen(made: Mapping[str, Any], tmp_path: Path) -> None:
    """Causality, the modality's vector, the prompt and the pooling, each broken alone: the check
    above must fail.
    """
    folder, own = made["own"]
    wanted = own["text"][valid(VIEWS["text"])].numpy()
    assert least_cosine(vectors(folder), wanted) >= LIMIT
    assert least_cosine(vectors(folder, tower__causal=True), wanted) < LIMIT
    assert least_cosine(vectors(folder, pooling="mean"), wanted) < LIMIT
    assert least_cosine(vectors(folder, prompt=""), wanted) < LIMIT
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["encoder.tower.kinds"][0] = 0.0
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert least_cosine(vectors(tmp_path), wanted) < LIMIT


def test_the_folder_is_whole_and_readable_by_others(made: Mapping[str, Any]) -> None:
    folder = made["own"][0]
    umask = os.umask(0)
    os.umask(umask)
    assert all(
        path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask
        for path in folder.rglob("*")
    )
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    prompts = json.loads((folder / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["things.text"] == prompts["text"] == "find the item"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert (tokenizer.unk_token, tokenizer.pad_token) == ("[UNK]", "[PAD]")
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card and "| `things.text` | text | find the item |" in card


def test_the_code_in_it_imports_nothing_of_training(made: Mapping[str, Any]) -> None:
    allowed = {
        "torch",
        "transformers",
        "sentence_transformers",
        "numpy",
        "PIL",
        "soundfile",
        "scipy",
        "__future__",
        *sys.stdlib_module_names,
    }
    for path in made["own"][0].glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += (
                [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            )
            assert {name.split(".")[0] for name in names} <= allowed, path.name
            assert "torch.distributed" not in names, path.name
