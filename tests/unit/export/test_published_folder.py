"""Risks: a trained published model whose folder pools, prompts, cuts or projects otherwise; code
in a folder that needs none.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from sailplan.config.schema import Config, DataConfig
from sailplan.export.sentence_transformers import export_sentence_transformers
from sailplan.model.encoders.transformers import TransformersConfig
from sailplan.model.encoders.transformers.config import PeftConfig, PromptTemplate
from sailplan.parity.published import TINY

sys.path.insert(0, str(Path(__file__).parent))
from folders import (
    VIEWS,
    WORDS,
    items,
    least_cosine,
    needs_sentence_transformers,
    read_without_sailplan,
    shown,
    trained,
    valid,
)

LIMIT = 0.99999
BATCHES = (1, 32)
LORA = PeftConfig(rank=2, targets=["query", "value"])
# Run -> kind of model, settings, whether the folder needs code of its own.
RUNS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "mean": ("bert", {}, False),
    "first token": ("bert", {"pooling": "cls"}, False),
    "last token": ("bert", {"pooling": "last_token"}, False),
    "maximum": ("bert", {"pooling": "max"}, False),
    "weighted mean": ("bert", {"pooling": "weighted_mean"}, False),
    "projection": ("bert", {"projection": True, "embedding": 12, "prefixes": [4, 8, 12]}, False),
    "template": ("bert", {"prompts": {"find the item": PromptTemplate("want", " : find ")}}, False),
    "text behind": (
        "bert",
        {"prompts": {"find the item": PromptTemplate("want ", "", " item")}, "projection": True},
        True,
    ),
    "own pooler": ("bert", {"pooling": "model"}, True),
    "two towers": ("clip", {}, True),
    "two towers, projection": (
        "clip",
        {"projection": True, "embedding": 12, "prefixes": [4, 8, 12]},
        True,
    ),
}
if importlib.util.find_spec("peft") is not None:
    RUNS["LoRA"] = ("bert", {"lora": LORA}, False)


def source(kind: str, folder: Path) -> Path:
    """A published folder with random weights, a word tokenizer, and CLIP's own picture
    processor.
    """
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, ":"]
    made = Tokenizer(
        WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "eos_token": "[SEP]",
    }
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    values = json.loads(json.dumps(TINY[kind][1]))
    if kind == "clip":
        values["text_config"] |= {"eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 2}
        size = {"height": 8, "width": 8}
        transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 8}, crop_size=size
        ).save_pretrained(folder)
    transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model(kind, **values)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, dict[str, torch.Tensor], list[str]]]:
    """Run -> exported folder, the run's own vectors, its views."""
    found = {}
    for run, (kind, options, _) in RUNS.items():
        root = tmp_path_factory.mktemp("run")
        modalities: list[Any] = list(TINY[kind][0])
        settings = {"embedding": 16, "prefixes": [4, 8, 16], "modalities": modalities} | options
        model = TransformersConfig(source=str(source(kind, root / "source")), **settings)
        config = Config(name=run, model=model, data=DataConfig(max_tokens=9, frames=2))
        views = ["text"] if kind == "bert" else ["text", "vision", "text_vision"]
        checkpoint, vectors = trained(config, root, views)
        found[run] = (
            export_sentence_transformers(checkpoint, root / "exported", config=config),
            vectors,
            views,
        )
    return found


@pytest.fixture(scope="module")
def read(
    made: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("read")
    asked = []
    for run, (exported, _, views) in made.items():
        asks: list[Any] = []
        for name in views:
            chosen = [shown(items()[row], VIEWS[name], folder) for row in valid(VIEWS[name])]
            asks += [
                (
                    f"{run}/{name}/{batch}",
                    chosen,
                    {"batch_size": batch, "prompt_name": f"things.{name}"},
                )
                for batch in BATCHES
            ]
            asks += [
                (
                    f"{run}/{name}/cut {size}",
                    chosen,
                    {"truncate_dim": size, "prompt_name": f"things.{name}"},
                )
                for size in (4, 8)
            ]
        if run == "mean":
            asks.append(
                (
                    "mean/no prompt",
                    [shown(items()[row], VIEWS["text"], folder) for row in valid(VIEWS["text"])],
                    {},
                )
            )
        asked.append((str(exported), RUNS[run][2], asks))
    return read_without_sailplan(asked, folder)


@needs_sentence_transformers
@pytest.mark.parametrize("run", RUNS)
def test_sentence_transformers_gives_the_runs_vectors(
    made: Mapping[str, Any], read: Mapping[str, np.ndarray], run: str
) -> None:
    """Without trust in code, where the folder brings none."""
    folder, vectors, views = made[run]
    assert bool(list(folder.glob("*.py"))) == RUNS[run][2]
    for view in views:
        wanted = vectors[view][valid(VIEWS[view])]
        for batch in BATCHES:
            assert least_cosine(read[f"{run}/{view}/{batch}"], wanted) >= LIMIT, (view, batch)
        for size in (4, 8):
            assert least_cosine(read[f"{run}/{view}/cut {size}"], wanted[:, :size]) >= LIMIT, (
                view,
                size,
            )


@needs_sentence_transformers
def test_a_prompt_left_out_is_seen(made: Mapping[str, Any], read: Mapping[str, np.ndarray]) -> None:
    assert (
        least_cosine(read["mean/no prompt"], made["mean"][1]["text"][valid(VIEWS["text"])]) < LIMIT
    )


def test_the_folder_is_of_the_published_format(made: Mapping[str, Any]) -> None:
    """AutoModel opens it without code of its own, with every weight in its place."""
    for run, (folder, _, _) in made.items():
        _, told = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"], run


@pytest.mark.skipif("LoRA" not in RUNS, reason="peft is not installed")
def test_the_adapter_alone_is_of_pefts_format(made: Mapping[str, Any]) -> None:
    """Put beside the published weights it gives the merged model's hidden states; without it
    they differ.
    """
    from peft import PeftModel

    folder = made["LoRA"][0]
    base = transformers.AutoModel.from_pretrained(folder.parent / "source").eval()
    merged = transformers.AutoModel.from_pretrained(folder).eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        wanted, without = (
            merged(input_ids=ids).last_hidden_state,
            base(input_ids=ids).last_hidden_state,
        )
        found = (
            PeftModel.from_pretrained(base, folder / "adapter")
            .eval()(input_ids=ids)
            .last_hidden_state
        )
    assert torch.allclose(found, wanted, atol=1e-5) and not torch.allclose(
        without, wanted, atol=1e-3
    )
