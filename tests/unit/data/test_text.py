"""Text of a view: languages, dropping, formats, and the cut that never loses the prompt."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from sailplan.config.schema import DatasetConfig, ViewConfig
from sailplan.data.order import keyed_integer
from sailplan.data.text import Tokenizer, choose_language, compose
from sailplan.errors import ConfigurationError

FIELDS = {
    "title": {"de": "Grinsendes\u00a0 Gesicht", "en": "grinning  face"},
    "tags": {"en": ["smile", "ｈａｐｐｙ", "Grinning Face", "smile"]},
    "aliases": {"en": []},
}
VIEW = ViewConfig(fields=["title", "tags", "aliases"])


def test_evaluation_text_is_clean_without_repeats_and_fixed() -> None:
    dataset = DatasetConfig(field_drop=1.0)
    assert compose(FIELDS, VIEW, dataset, None) == "title: grinning face | tags: smile, happy"
    assert (
        compose(FIELDS, ViewConfig(fields=["tags"], pick="one"), dataset, None)
        == "smile, happy, Grinning Face"
    )
    assert compose(FIELDS, ViewConfig(fields=["title"]), dataset, None) == "grinning face", (
        "a single field has no label"
    )
    assert compose({"title": {"fr": "visage"}}, VIEW, dataset, None) == "visage", (
        "the first language where English is absent"
    )
    assert (
        compose({}, VIEW, dataset, None) == ""
        and compose(FIELDS, ViewConfig(fields=["author"]), dataset, None) == ""
    )


def test_training_drops_fields_but_never_all() -> None:
    texts = Counter(
        compose(FIELDS, VIEW, DatasetConfig(field_drop=0.5, language_weights={"en": 1.0}), seed)
        for seed in range(400)
    )
    assert set(texts) == {
        "title: grinning face | tags: smile, happy",
        "grinning face",
        "smile, happy",
    }
    assert all(compose(FIELDS, VIEW, DatasetConfig(field_drop=1.0), seed) for seed in range(50))
    kept = sum(
        compose(FIELDS, VIEW, DatasetConfig(field_drop=0.15), seed).count("|")
        for seed in range(1000)
    )
    assert 680 < kept < 770, "both kept with probability 0.85 squared"


def test_keyword_views_draw_one_entry() -> None:
    view, dataset = (
        ViewConfig(fields=["tags", "title"], pick="one"),
        DatasetConfig(language_weights={"en": 1.0}, field_drop=0.9),
    )
    assert {compose(FIELDS, view, dataset, seed) for seed in range(100)} == {
        "smile",
        "happy",
        "Grinning Face",
    }


def test_languages_follow_their_weights() -> None:
    names = {"en": "x", "de": "x", "fr": "x", "ja": "x"}
    drawn = Counter(
        choose_language(names, {"en": 0.5, "de": 0.2}, keyed_integer(seed)) for seed in range(4000)
    )
    assert (
        abs(drawn["en"] / 4000 - 0.5) < 0.04
        and abs(drawn["de"] / 4000 - 0.2) < 0.04
        and abs(drawn["fr"] / 4000 - 0.15) < 0.04
    )
    assert choose_language({"ko": "x", "en": ""}, {"en": 1.0}, keyed_integer(1)) == "ko", (
        "an empty text is no language"
    )
    assert {
        choose_language({"ko": "x", "ja": "x"}, {"en": 1.0}, keyed_integer(seed))
        for seed in range(20)
    } == {"ko", "ja"}
    assert {
        choose_language(names, {"en": 0.7, "de": 0.3}, keyed_integer(seed)) for seed in range(40)
    } == {"en", "de"}
    assert {
        choose_language({"de": "x", "fr": "x"}, {"en": 0.5, "de": 0.5}, keyed_integer(seed))
        for seed in range(20)
    } == {"de"}
    assert choose_language({}, {"en": 1.0}, keyed_integer(1)) is None


def test_long_texts_are_cut_and_the_prompt_stays(shards: Path) -> None:
    tokenizer = Tokenizer(str(shards / "tokenizer.json"), max_tokens=10)
    prompt = tokenizer.prompt("Find the:")
    texts = tokenizer.texts(["red fish " * 40, "moon", ""], "Find the:")
    assert len(prompt) + len(texts[0]) == 10 and texts[2] == [] and 0 < len(texts[1]) < 5
    assert tokenizer.texts(["red fish " * 40])[0][: len(texts[0])] == texts[0], (
        "known texts are cut anew for another prompt"
    )
    assert pickle.loads(pickle.dumps(tokenizer)).texts(["moon"]) == [texts[1]]


def test_unusable_tokenizers_and_prompts_name_their_key(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.max_tokens=8.*prompt"):
        Tokenizer(str(shards / "tokenizer.json"), max_tokens=8).prompt(
            "Find the picture of the following red thing:"
        )
    with pytest.raises(ConfigurationError, match=r"data\.tokenizer=.*no such file"):
        Tokenizer(str(tmp_path / "absent.json"), 8)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"data\.tokenizer=.*not a tokenizer"):
        Tokenizer(str(tmp_path / "broken.json"), 8)


def test_the_tokenizer_of_a_published_folder_gives_its_own_ids(tmp_path: Path) -> None:
    """Byte-level BPE with end-of-text tokens that a chat template or a post-processor may add,
    as in Qwen's folders.
    """
    base = tokenizers.Tokenizer(tokenizers.models.BPE())
    base.normalizer = tokenizers.normalizers.NFC()
    base.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    base.train_from_iterator(
        ["the red fish and the moon"] * 4,
        tokenizers.trainers.BpeTrainer(
            vocab_size=280, initial_alphabet=alphabet, show_progress=False
        ),
    )
    published = PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"]
    )
    published.save_pretrained(tmp_path)
    texts = [
        "the red fish",
        "Grüße, 月 🙂",
        "the moon and a longer text about the fish that is cut",
    ]
    found = Tokenizer(str(tmp_path / "tokenizer.json"), max_tokens=24)
    assert found.vocabulary == len(published) == base.get_vocab_size() + 2
    assert found.texts(texts) == [
        published(text, add_special_tokens=False).input_ids[:24] for text in texts
    ]
    assert published.decode(found.texts(texts)[1]) == texts[1]
