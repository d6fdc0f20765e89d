"""Risks: a prompt whose line breaks or added tokens are lost, a text that is cut in its
template, a pooling that looks at padding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image

from sailplan.config.schema import Config, DataConfig, ViewConfig
from sailplan.data.processor import ViewRow
from sailplan.errors import ConfigurationError
from sailplan.model.encoders.transformers.config import PromptTemplate, TransformersConfig
from sailplan.model.encoders.transformers.pooling import POOLINGS
from sailplan.model.encoders.transformers.processor import PRESENT, TransformersProcessor
from sailplan.model.encoders.transformers.prompts import PublishedTokenizer

TEXTS = ["a red boot", "snow", "walking in the rain " * 20, ""]
INSTRUCTION = "Instruct: Given a thing, find its name\nQuery:"
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def byte_level() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE as decoders have it: a space belongs to the word behind it, and some
    tokens are added ones.
    """
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator([*TEXTS, INSTRUCTION, "a red query: passage: boot"] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT,
    )


def settings(**options: object) -> TransformersConfig:
    return TransformersConfig(source="made up", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("query: ", ""),
        (INSTRUCTION, "<|endoftext|>"),
        ("", "<|endoftext|>"),
        ("\n\n  two  spaces\t", "\n"),
    ],
)
def test_a_row_is_the_template_with_its_text_tokenized_as_one(
    byte_level: transformers.PreTrainedTokenizerFast, before: str, after: str
) -> None:
    named = {"ask": PromptTemplate(before=before, after=after)}
    found = PublishedTokenizer(byte_level, settings(prompts=named), 400).texts(TEXTS, "ask")
    assert found == [byte_level(before + text + after)["input_ids"] for text in TEXTS]


def test_a_long_text_loses_its_own_last_tokens(
    byte_level: transformers.PreTrainedTokenizerFast,
) -> None:
    tokenizer = PublishedTokenizer(
        byte_level,
        settings(prompts={"ask": PromptTemplate(before=INSTRUCTION, after="<|endoftext|>")}),
        40,
    )
    (short,) = tokenizer.texts([TEXTS[2]], "ask")
    whole = byte_level(INSTRUCTION + TEXTS[2] + "<|endoftext|>")["input_ids"]
    assert len(short) == 40 and short == [*whole[:39], whole[-1]] and len(whole) > 60
    with pytest.raises(
        ConfigurationError, match=r"data\.max_tokens=12: the prompt 'ask' alone takes"
    ):
        PublishedTokenizer(
            byte_level, settings(prompts={"ask": PromptTemplate(before=INSTRUCTION)}), 12
        ).texts(TEXTS, "ask")


def test_a_chat_template_is_the_models_own(
    byte_level: transformers.PreTrainedTokenizerFast,
) -> None:
    tokenizer = PublishedTokenizer(
        byte_level,
        settings(chat_template=True, prompts={"ask": PromptTemplate(before="Find it.")}),
        400,
    )
    messages = [{"role": "system", "content": "Find it."}, {"role": "user", "content": TEXTS[0]}]
    rendered = byte_level.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.texts(TEXTS[:1], "ask") == [
        byte_level(rendered, add_special_tokens=False)["input_ids"]
    ]
    assert rendered.startswith("<|im_start|>system\nFind it.<|im_end|>\n<|im_start|>user\n")


def test_a_prompt_without_a_template_is_a_sentence_before_the_text(
    byte_level: transformers.PreTrainedTokenizerFast,
) -> None:
    tokenizer = PublishedTokenizer(
        byte_level, settings(prompts={"default": PromptTemplate(before="passage: ")}), 400
    )
    assert tokenizer.texts(["boot"], "a red") == [byte_level("a red boot")["input_ids"]]
    assert tokenizer.texts(["boot"], "") == [byte_level("passage: boot")["input_ids"]]


def test_special_tokens_stay_round_a_text_that_is_cut() -> None:
    words = {
        word: number for number, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b"])
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    published = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")
    assert PublishedTokenizer(published, settings(), 8).texts(["a b a b a b a b a b"], "") == [
        [1, 4, 5, 4, 5, 4, 5, 2]
    ]
    assert PublishedTokenizer(published, settings(special_tokens=False), 8).texts(["a b"], "") == [
        [4, 5]
    ]
    assert PublishedTokenizer(published, settings(), 8).overhead("") == 2


@pytest.mark.parametrize("pooling", sorted(POOLINGS))
def test_poolings_see_present_tokens_alone(pooling: str) -> None:
    hidden = torch.randn(4, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([6, 3, 1, 4])
    mask = (torch.arange(6) < lengths[:, None]).to(torch.int64)
    found = POOLINGS[pooling](hidden.masked_fill(mask[..., None] == 0, 1e6), mask)
    for row, length in enumerate(lengths.tolist()):
        present = hidden[row, :length]
        weights = torch.arange(1, length + 1, dtype=torch.float64)[:, None]
        expected = {
            "mean": present.mean(0),
            "cls": present[0],
            "last_token": present[-1],
            "max": present.amax(0),
            "weighted_mean": (present * weights).sum(0) / weights.sum(),
        }
        torch.testing.assert_close(found[row], expected[pooling], rtol=0, atol=1e-12)


def test_pictures_are_the_models_own_processors(tmp_path: Path) -> None:
    """Its Pillow class, whatever the files name; rows without a picture are marked, not left
    out.
    """
    own = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 12}, crop_size={"height": 8, "width": 8}
    )
    own.save_pretrained(tmp_path)
    model = TransformersConfig(source=str(tmp_path), modalities=["vision"])
    processor = TransformersProcessor(model, Config(model=model, data=DataConfig(frames=2)))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    shown = processor.image("one", (tmp_path / "one.png").read_bytes())
    np.testing.assert_array_equal(
        shown.numpy(), own(images=Image.fromarray(pixels))["pixel_values"][0]
    )
    view = ViewConfig(modalities=["vision"])
    inputs = processor.batch([ViewRow(1, images=(shown,)), ViewRow()], [[], []], view)
    assert inputs.named["pixel_values"].shape == (2, 1, 3, 8, 8) and inputs.named[
        PRESENT["vision"]
    ].tolist() == [[True], [False]]
    assert processor.largest(["vision"], 3).named["pixel_values"].shape == (3, 2, 3, 8, 8)
