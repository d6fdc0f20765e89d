"""From an item's fields to tokens: clean, choose a language per field, drop, join in one format, cut to length.

Format (recipe section 1): several fields give `title: grinning face | tags: smile, happy`, one field gives its bare
text. Training draws from the row's own random source: the language of each field by `language_weights`, the fields
to drop (never all), and for `pick: one` a single entry, such as one keyword. Without a source (evaluation) the
language is English, else the first one, and nothing is dropped.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from sailplan.config.schema import DatasetConfig, ViewConfig
from sailplan.data.cache import ByteCache
from sailplan.errors import ConfigurationError

TEXT_TOKENS_LEFT = 4  # a prompt must leave at least this many tokens to the text
KNOWN_BYTES = 32 << 20  # tokens of recent texts
PREFERRED_LANGUAGE = "en"


@lru_cache(maxsize=65536)
def clean(text: str) -> str:
    """NFKC form with every run of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def compose(fields: Mapping[str, Mapping[str, Any]], view: ViewConfig, dataset: DatasetConfig, source: random.Random | None) -> str:
    """The text of an item in a view; "" where it has none of the view's fields.

    fields: field -> language -> text or list of texts. source: the row's random source in training, None in evaluation.
    """
    entries: dict[str, list[str]] = {}
    seen: set[str] = set()
    for name in view.fields:
        language = choose_language(fields.get(name) or {}, dataset.language_weights, source)
        if language is None:
            continue
        value = fields[name][language]
        kept = []
        for text in map(clean, [value] if isinstance(value, str) else value):
            if text and text.casefold() not in seen:  # an alias equal to the title says nothing new
                seen.add(text.casefold())
                kept.append(text)
        if kept:
            entries[name] = kept
    if not entries:
        return ""
    if source is not None and view.pick == "one":
        every = [text for kept in entries.values() for text in kept]
        return every[int(source.random() * len(every))]
    if source is not None:
        entries = _drop(entries, dataset.field_drop, source)
    if len(entries) == 1:
        return ", ".join(next(iter(entries.values())))
    return " | ".join(f"{name}: {', '.join(kept)}" for name, kept in entries.items())


def choose_language(languages: Mapping[str, Any], weights: Mapping[str, float], source: random.Random | None) -> str | None:
    """One of the field's languages, or None if it has none.

    Listed languages have their weight; what is left of 1 is shared equally by the others that the field has. Weights
    of languages that it lacks are shared out in proportion. Without a source: English, else the first language.
    """
    available = [language for language, value in languages.items() if value]
    if not available:
        return None
    if source is None or len(available) == 1:
        return PREFERRED_LANGUAGE if PREFERRED_LANGUAGE in available else available[0]
    listed = {language: weight for language, weight in weights.items() if languages.get(language)}
    unlisted = [language for language in available if language not in listed]
    rest = max(0.0, 1.0 - sum(weights.values())) if unlisted else 0.0
    left = source.random() * (sum(listed.values()) + rest)
    for language, weight in listed.items():
        left -= weight
        if left < 0:
            return language
    if rest > 0:
        return unlisted[min(int(left / rest * len(unlisted)), len(unlisted) - 1)]
    # nothing left for the unlisted ones: take them only where no listed language is there with a weight
    return next((language for language in reversed(listed) if listed[language] > 0), None) or available[int(source.random() * len(available))]


def _drop(entries: dict[str, list[str]], probability: float, source: random.Random) -> dict[str, list[str]]:
    """Each field dropped with the given probability, but one random field always stays."""
    draws = {name: source.random() for name in entries}
    kept = {name: entries[name] for name, draw in draws.items() if draw >= probability}
    if kept:
        return kept
    last = max(draws, key=draws.__getitem__)
    return {last: entries[last]}


class Tokenizer:
    """A Hugging Face tokenizer file and the cut to `max_tokens`."""

    def __init__(self, path: str, max_tokens: int) -> None:
        """Raises ConfigurationError naming data.tokenizer when the file is missing or not a tokenizer."""
        if not Path(path).is_file():
            raise ConfigurationError(f"data.tokenizer={path}: no such file; expected a tokenizer.json of the tokenizers library")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exception
            raise ConfigurationError(f"data.tokenizer={path}: not a tokenizer.json of the tokenizers library ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.path, self.max_tokens = path, max_tokens
        self._prompts: dict[str, list[int]] = {}
        self._known: ByteCache[list[int]] = ByteCache(KNOWN_BYTES)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "max_tokens": self.max_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["max_tokens"])  # type: ignore[misc]

    @property
    def vocabulary(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt. Raises ConfigurationError if it leaves fewer than 4 tokens to the item's text."""
        if text not in self._prompts:
            ids = self._tokenizer.encode(clean(text), add_special_tokens=False).ids if text else []
            if len(ids) > self.max_tokens - TEXT_TOKENS_LEFT:
                raise ConfigurationError(f"data.max_tokens={self.max_tokens}: the prompt {text!r} alone takes {len(ids)}; shorten it or raise data.max_tokens")
            self._prompts[text] = ids
        return self._prompts[text]

    def texts(self, texts: Sequence[str], prompt: str = "") -> list[list[int]]:
        """Token ids of each text without the prompt, cut so that prompt + text fit into max_tokens; "" gives []."""
        room = self.max_tokens - len(self.prompt(prompt))
        known = [self._known.get(text) for text in texts]
        unknown = [place for place, ids in enumerate(known) if ids is None]
        encodings = self._tokenizer.encode_batch_fast([texts[place] for place in unknown], add_special_tokens=False)
        for place, encoding in zip(unknown, encodings, strict=True):
            known[place] = ids = encoding.ids[: self.max_tokens]
            self._known.put(texts[place], ids, 200 + 2 * len(texts[place]) + 40 * len(ids))
        return [ids[:room] for ids in known if ids is not None]
