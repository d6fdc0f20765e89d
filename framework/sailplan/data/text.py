"""From an item's fields to tokens: clean, choose a language per field, drop, join in one format,
cut to length.

Format (recipe section 1): several fields give `title: grinning face | tags: smile, happy`, one
field gives its bare text. Training draws from the row's own seed: the language of each field by
`language_weights`, the fields to drop (never all), and for `pick: one` a single entry, such as one
keyword. Without a seed (evaluation) the language is English, else the first one, and nothing is
dropped.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import tokenizers

from sailplan.config.fields import JsonView
from sailplan.config.schema import DatasetConfig, ViewConfig
from sailplan.data.order import keyed_integer
from sailplan.data.tokens import TokenCache
from sailplan.errors import ConfigurationError

TEXT_TOKENS_LEFT = 4  # a prompt must leave at least this many tokens to the text
COUNTED_AT_ONCE = 4096  # an encoding takes kilobytes until it is counted
PREFERRED_LANGUAGE = "en"
SEPARATOR = " | "
LANGUAGE_DRAW, DROP_DRAW, ENTRY_DRAW = 1, 2, 3  # purposes of a row's random words
WEIGHT_UNITS = 1 << 20


@lru_cache(maxsize=65536)
def clean(text: str) -> str:
    """NFKC form with every run of white space as one space."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).split())


def compose(
    fields: Mapping[str, JsonView],
    view: ViewConfig,
    dataset: DatasetConfig,
    seed: int | None,
) -> str:
    """The text of an item in a view; "" where it has none of the view's fields.

    fields: field -> language -> text or list of texts. seed: of the row's draws in training, None
    in evaluation. Each draw is a word keyed by the seed, its purpose and the field's number:
    `data.costs` repeats them for all rows at once.
    """
    if len(view.fields) == 1:
        alone = fields.get(view.fields[0]) or {}
        if len(alone) == 1:
            (text,) = alone.values()
            if isinstance(text, str):  # nothing is drawn
                return clean(text)
    entries: dict[int, list[str]] = {}
    seen: set[str] = set()
    for number, name in enumerate(view.fields):
        languages = fields.get(name) or {}
        drawn = seed is not None and len(languages) > 1
        word = keyed_integer(seed, LANGUAGE_DRAW, number) if drawn and seed is not None else None
        language = choose_language(languages, dataset.language_weights, word)
        if language is None:
            continue
        value = fields[name][language]
        kept = []
        for text in map(clean, [value] if isinstance(value, str) else value):
            if text and text.casefold() not in seen:  # an alias equal to the title says nothing new
                seen.add(text.casefold())
                kept.append(text)
        if kept:
            entries[number] = kept
    if not entries:
        return ""
    if seed is not None and view.pick == "one":
        every = [text for kept in entries.values() for text in kept]
        return every[keyed_integer(seed, ENTRY_DRAW) * len(every) >> 64]
    if seed is not None and len(entries) > 1:
        entries = _drop(entries, dataset.field_drop, seed)
    if len(entries) == 1:
        return ", ".join(next(iter(entries.values())))
    return SEPARATOR.join(
        label(view.fields[number]) + ", ".join(kept) for number, kept in entries.items()
    )


def label(field: str) -> str:
    """What stands before a field's text where a view joins several."""
    return f"{field}: "


def choose_language(
    languages: Mapping[str, object], weights: Mapping[str, float], word: int | None
) -> str | None:
    """One of the field's languages, or None if it has none.

    Listed languages have their weight; what is left of 1 is shared equally by the others that the
    field has. Weights of languages that it lacks are shared out in proportion. word: 64 random
    bits. Without them: English, else the first.
    """
    available = [language for language, value in languages.items() if value]
    if not available:
        return None
    if word is None or len(available) == 1:
        return PREFERRED_LANGUAGE if PREFERRED_LANGUAGE in available else available[0]
    unlisted = sum(language not in weights for language in available)
    listed, rest = weight_units(weights)
    units = [listed.get(language, rest // max(1, unlisted)) for language in available]
    units = units if any(units) else [1] * len(available)
    left = (word >> 32) * sum(units) >> 32
    for language, unit in zip(available, units, strict=True):
        left -= unit
        if left < 0:
            return language
    raise AssertionError("the draw lies below the sum of the weights")


def weight_units(weights: Mapping[str, float]) -> tuple[dict[str, int], int]:
    """Return weights in whole units of 2**-20, and what they leave of 1: sums of integers are
    the same on every machine.
    """
    listed = {language: round(weight * WEIGHT_UNITS) for language, weight in weights.items()}
    return listed, max(0, WEIGHT_UNITS - sum(listed.values()))


def drop_threshold(probability: float) -> int:
    """Return the 53-bit number below which a field's draw, cut to 53 bits, drops it."""
    return int(probability * 2**53)


def _drop(entries: dict[int, list[str]], probability: float, seed: int) -> dict[int, list[str]]:
    """Each field dropped with the given probability, but one random field always stays."""
    draws = {number: keyed_integer(seed, DROP_DRAW, number) >> 11 for number in entries}
    kept = {
        number: entries[number]
        for number, draw in draws.items()
        if draw >= drop_threshold(probability)
    }
    if kept:
        return kept
    last = max(draws, key=draws.__getitem__)
    return {last: entries[last]}


class Tokenizer:
    """A Hugging Face tokenizer file and the cut to `max_tokens`."""

    def __init__(self, path: str, max_tokens: int) -> None:
        """Raises ConfigurationError naming data.tokenizer when the file is missing or not a
        tokenizer.
        """
        if not Path(path).is_file():
            raise ConfigurationError(
                f"data.tokenizer={path}: no such file; expected a tokenizer.json of the tokenizers "
                "library"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exception
            raise ConfigurationError(
                f"data.tokenizer={path}: not a tokenizer.json of the tokenizers library ({error})"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.path, self.max_tokens = path, max_tokens
        self.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[
            :8
        ]  # tells this tokenizer's counts from another's
        self._prompts: dict[str, list[int]] = {}
        self._known = TokenCache()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "max_tokens": self.max_tokens}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["path"], state["max_tokens"])  # type: ignore[misc]

    @property
    def vocabulary(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt.

        Raises ConfigurationError if it leaves fewer than 4 tokens to the item's text.
        """
        if text not in self._prompts:
            ids = self._tokenizer.encode(clean(text), add_special_tokens=False).ids if text else []
            if len(ids) > self.max_tokens - TEXT_TOKENS_LEFT:
                raise ConfigurationError(
                    f"data.max_tokens={self.max_tokens}: the prompt {text!r} alone takes "
                    f"{len(ids)}; shorten it or raise data.max_tokens"
                )
            self._prompts[text] = ids
        return self._prompts[text]

    def texts(self, texts: Sequence[str], prompt: str = "") -> list[list[int]]:
        """Token ids of each text without the prompt, cut so that prompt + text fit into
        max_tokens; "" gives [].
        """
        room = self.max_tokens - len(self.prompt(prompt))
        return [ids[:room] for ids in self._known.of(texts, self._encoded)]

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids[: self.max_tokens] for encoding in found]

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text, neither cut nor kept."""
        parts = (
            texts[start : start + COUNTED_AT_ONCE]
            for start in range(0, len(texts), COUNTED_AT_ONCE)
        )
        return [
            len(encoding.ids)
            for part in parts
            for encoding in self._tokenizer.encode_batch_fast(part, add_special_tokens=False)
        ]
