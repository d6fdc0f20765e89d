"""Risks: a new family that needs code, an encoder of your own that needs more than its file and
a YAML, and a run of either that cannot be resumed, evaluated or exported.

The family below stands in no file of the package; the encoder below is all in the file that the
test writes.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from sailplan.cli.testing import command
from sailplan.export.weights import load_exported
from sailplan.train.testing import metrics
from sailplan_kernels.testing import run_ranks

SOURCE = Path(__file__).resolve().parents[2] / "framework" / "sailplan"
FAMILY = "electra"
WORDS = [
    "red",
    "green",
    "blue",
    "boot",
    "shoe",
    "hat",
    "for",
    "rain",
    "snow",
    "walking",
    "a",
    "the",
]
DATA = """# @package data.sets.things
shards: shards
language_weights: {en: 1.0}
field_drop: 0.0
views:
  name: {fields: [title], prompt: name}
  tags: {fields: [tags]}
patterns:
  name_to_tags: {query: name, target: tags}
"""
EXPERIMENT = """# @package _global_
defaults:
  - override /data: [reading, things]
  - override /logger: [console]
  - _self_
global_batch: 8
allowed_targets: [sailplan., own_encoder.]
data: {max_tokens: 16, tokenizer: words.json}
step: {micro_batch: 3}
optimizer: {learning_rate: 1.0e-3}
loggers: {console: {every: 1}}
checkpoint: {every_steps: 1}
parallel: {threads: 1}
order: [only]
stages:
  only: {steps: 2, data: {things: 1}, objectives: {infonce: 1.0}}
evaluation:
  tasks:
    find: {dataset: things, query: name, target: tags, split: train, metrics: [recall]}
"""
PUBLISHED = """encoder: transformers
source: published
embedding: 16
prefixes: [8, 16]
pooling: cls
prompts: {name: {before: "the name:\\n"}}
"""
OWN = "_target_: own_encoder.Bag\nembedding: 12\nprefixes: [12]\nbuckets: 50\n"
OWN_FILE = '''"""A bag of words: the mean of hashed words' vectors."""

import zlib
from dataclasses import dataclass

import torch
from torch import nn

from sailplan.config.fields import Size
from sailplan.data.processor import Processor
from sailplan.data.record import NamedInputs
from sailplan.model.component import EncoderComponent
from sailplan.model.config import EncoderConfig
from sailplan.model.protocol import Embeddings, Encoder


@dataclass
class Bag(EncoderConfig):
    buckets: Size = 100

    def component(self):
        return BagComponent(self)


class Words:
    digest = "bagwords"

    def counts(self, texts):
        return [len(text.split()) for text in texts]


class BagProcessor(Processor):
    def __init__(self, buckets, max_tokens):
        self.tokenizer, self.buckets, self.max_tokens = Words(), buckets, max_tokens

    def overhead(self, view):
        return 0

    def tokens(self, rows, view):
        return [[1 + zlib.crc32(word.encode()) % self.buckets for word in row.text.split()][: self.max_tokens] for row in rows]

    def batch(self, rows, tokens, view):
        ids = torch.zeros(len(rows), max(1, *map(len, tokens)) if tokens else 1, dtype=torch.int64)
        for row, own in enumerate(tokens):
            ids[row, : len(own)] = torch.tensor(own, dtype=torch.int64)
        return NamedInputs(tuple(view.modalities), {"ids": ids})

    def largest(self, modalities, rows):
        return NamedInputs(tuple(modalities), {"ids": torch.ones(rows, self.max_tokens, dtype=torch.int64)})


class BagEncoder(Encoder):
    modalities = ("text",)

    def __init__(self, model, dtype):
        super().__init__()
        self.dimension = model.embedding
        self.vectors = nn.Embedding(model.buckets + 1, model.embedding, padding_idx=0, dtype=dtype)

    def forward(self, inputs, *, per_modality=False):
        fused = self.vectors(inputs.named["ids"]).sum(1).float()
        return Embeddings(fused, {"text": fused} if per_modality else {})


class BagComponent(EncoderComponent):
    def processor(self, config):
        return BagProcessor(self.model.buckets, config.data.max_tokens)

    def module(self, dtype):
        return BagEncoder(self.model, dtype)
'''


def write_tokenizer(folder: Path) -> None:
    words = {
        word: number
        for number, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", ":", *WORDS, "name"])
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])],
    )
    made.save(str(folder.parent / "words.json"))
    special = {
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
    }
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    files = {
        "conf/data/things.yaml": DATA,
        "conf/experiment/things.yaml": EXPERIMENT,
        "conf/model/family.yaml": PUBLISHED,
        "conf/model/bag.yaml": OWN,
        "own_encoder.py": OWN_FILE,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    write_tokenizer(root / "published")
    config = transformers.AutoConfig.for_model(
        FAMILY,
        vocab_size=len(WORDS) + 6,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(root / "published")
    (root / "shards").mkdir()
    with tarfile.open(root / "shards" / "things-000000.tar", "w") as archive:
        for number in range(16):
            title, tag = (
                f"{WORDS[number % 3]} {WORDS[3 + number % 3]}",
                f"{WORDS[7 + number % 2]} {WORDS[number % 3]}",
            )
            body = {
                "id": f"things/{number}",
                "split": "train",
                "fields": {"title": {"en": title}, "tags": {"en": [tag]}},
            }
            content = json.dumps(body).encode()
            info = tarfile.TarInfo(f"{number:04}.json")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return root


def test_no_file_of_the_package_names_the_family() -> None:
    named = [
        path
        for path in SOURCE.rglob("*")
        if path.suffix in (".py", ".yaml") and FAMILY in path.read_text(encoding="utf-8").lower()
    ]
    assert not named


@pytest.mark.parametrize("model", ["family", "bag"])
def test_a_run_is_planned_trained_resumed_evaluated_and_exported(project: Path, model: str) -> None:
    overrides = ["experiment=things", f"model={model}", f"name={model}"]
    code, out, err = command(project, "plan", *overrides, "--json")
    assert code == 0, err
    assert json.loads(out)["parameters"]["text"] > 0
    code, _, err = command(project, "train", *overrides)
    assert code == 0, err
    lines = metrics(project / "runs" / model)
    assert len(lines) == 2 and all(
        torch.isfinite(torch.tensor(line["loss/total"])) for line in lines
    )
    code, _, err = command(project, "train", *overrides, "stages.only.steps=2", "resume=auto")
    assert code == 0, err
    code, out, err = command(project, "evaluate", "--run-folder", f"runs/{model}")
    assert code == 0, err
    found = json.loads(out)
    code, out, err = command(
        project, "export", "--run-folder", f"runs/{model}", "--out", f"export-{model}"
    )
    assert code == 0, err
    code, out, err = command(
        project, "evaluate", "--run-folder", f"runs/{model}", "--checkpoint", f"export-{model}"
    )
    assert code == 0, err
    assert json.loads(out) == found


def test_an_exported_family_stands_alone(project: Path) -> None:
    """Its folder holds configuration, tokenizer and weights; the folder that the run started
    from may go.
    """
    (project / "published").rename(project / "gone")

    def load(rank: int, world_size: int) -> tuple[int, str]:
        encoder, description = load_exported(project / "export-family")
        return sum(parameter.numel() for parameter in encoder.parameters()), description["views"][
            "things"
        ]["name"]["prompt"]

    try:
        size, prompt = run_ranks(load, 1)[0]
    finally:
        (project / "gone").rename(project / "published")
    expected = sum(
        value.numel()
        for value in transformers.AutoModel.from_pretrained(project / "published").parameters()
    )
    assert size == expected and prompt == "name"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.source=nowhere/there", r"model.source=nowhere/there"),
        ("model.embedding=20", "model.embedding is 20: expected 16"),
        ("model.pooling=avg", "model.pooling=avg: expected one of mean, cls"),
        ("model.sauce=x", "unknown key 'model.sauce'; did you mean 'source'?"),
        ("model.lora.rank=-1", "model.lora.rank=-1: expected a number at least 0"),
        ("data.max_tokens=6", "data.max_tokens=6: the prompt 'name' alone takes"),
        (
            "data.sets.things.views.tags.modalities=[vision,text]",
            "views.tags shows vision, but model.modalities is text",
        ),
        ("model.encoder=omny", "model.encoder=omny: expected one of omni, transformers"),
        (
            "parallel.compile=blocks",
            "parallel.compile=blocks: expected none with model.encoder=transformers",
        ),
        (
            "model._target_=os.path.join",
            "model._target_=os.path.join: expected a class below sailplan., own_encoder.",
        ),
        (
            "model._target_=own_encoder.Words",
            "model._target_=own_encoder.Words: expected a subclass of",
        ),
    ],
)
def test_what_cannot_be_is_one_line(project: Path, setting: str, message: str) -> None:
    code, _, err = command(
        project,
        "check",
        "experiment=things",
        "model=family",
        "name=wrong",
        setting if "_target_" not in setting else f"+{setting}",
    )
    assert code == 64 and message in err and len(err.strip().splitlines()) == 1, err


def test_tensor_parallelism_names_the_omni_tower(project: Path) -> None:
    code, _, err = command(
        project, "plan", "experiment=things", "model=family", "parallel.tensor=2", "--ranks", "2"
    )
    assert (
        code == 64
        and "parallel.tensor=2: expected 1 with model.encoder=transformers; the omni tower is tensor parallel"
        in err
    )
