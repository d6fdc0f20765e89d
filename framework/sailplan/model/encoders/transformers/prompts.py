"""A published model's tokenizer, with what stands round a text: templates, chat templates and
special tokens.

A row is tokenized as one string, so that tokens merge across a template's edges as the model was
trained; a row that is too long loses tokens of its own text, never of the template.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import tokenizers

from sailplan.data.text import COUNTED_AT_ONCE, TEXT_TOKENS_LEFT
from sailplan.data.tokens import TokenCache
from sailplan.errors import ConfigurationError
from sailplan.model.encoders.transformers.config import PromptTemplate, TransformersConfig

DEFAULT = "default"
SLOT = "\u2400TEXT\u2400"  # stands for the text while a chat template is rendered


class Chat(Protocol):
    """What renders a model's chat template: its tokenizer or its processor."""

    def apply_chat_template(
        self, messages: Sequence[dict[str, object]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


class PublishedTokenizer:
    """Token ids of texts in a view's prompt, at most `max_tokens` a row."""

    def __init__(self, tokenizer: Any, settings: TransformersConfig, max_tokens: int) -> None:
        """tokenizer: of transformers.

        Raises ConfigurationError for one without a fast implementation.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigurationError(
                f"model.source={settings.source}: its tokenizer has no tokenizer.json; expected a "
                "fast tokenizer; convert it first"
            )
        self._published, self.settings, self.max_tokens = tokenizer, settings, max_tokens
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.digest = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:8]
        self.pad = tokenizer.pad_token_id or 0
        self.masked = "attention_mask" in tokenizer.model_input_names
        self._templates: dict[str, PromptTemplate] = {}
        self._overhead: dict[str, int] = {}
        self._known = TokenCache()

    def template(self, prompt: str) -> PromptTemplate:
        """Return what stands round the texts of views whose `prompt` this is: one of
        model.prompts, or a sentence before the text.
        """
        if prompt not in self._templates:
            named = self.named(prompt)
            self._templates[prompt] = (
                self.in_chat(named, [], self._published) if self.settings.chat_template else named
            )
        return self._templates[prompt]

    def named(self, prompt: str) -> PromptTemplate:
        """Return the template of a prompt as the settings have it, outside of a chat."""
        found = self.settings.prompts.get(prompt or DEFAULT)
        if found is None:
            found = PromptTemplate(
                before=f"{prompt} " if prompt and not self.settings.chat_template else prompt
            )
        return found

    def overhead(self, prompt: str) -> int:
        """Return the tokens of a row without a text.

        Raises ConfigurationError where they leave too few to the text.
        """
        if prompt not in self._overhead:
            template = self.template(prompt)
            found = len(self._encode([template.before + template.middle + template.after])[0].ids)
            if found > self.max_tokens - TEXT_TOKENS_LEFT:
                raise ConfigurationError(
                    f"data.max_tokens={self.max_tokens}: the prompt {prompt!r} alone takes "
                    f"{found}; shorten it or raise data.max_tokens"
                )
            self._overhead[prompt] = found
        return self._overhead[prompt]

    def texts(self, texts: Sequence[str], prompt: str) -> list[list[int]]:
        """Return the token ids of whole rows: template, text and special tokens."""
        self.overhead(prompt)
        template = self.template(prompt)
        head, tail = template.before + template.middle, template.after

        def encode(unknown: list[str]) -> Iterator[list[int]]:
            found = self._encode([head + text + tail for text in unknown])
            for text, encoding in zip(unknown, found, strict=True):
                yield self._cut(encoding, len(head), len(head) + len(text))

        return self._known.of(texts, encode, prompt)

    def fitting(self, text: str, prompt: str) -> str:
        """Return a text without its last characters, as far as the row has too many tokens."""
        self.overhead(prompt)
        template = self.template(prompt)
        head = template.before + template.middle
        (encoding,) = self._encode([head + text + template.after])
        dropped = self._dropped(encoding, len(head), len(head) + len(text))
        return text[: max(0, encoding.offsets[dropped[0]][0] - len(head))] if dropped else text

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, neither cut nor with special tokens."""
        parts = (
            texts[start : start + COUNTED_AT_ONCE]
            for start in range(0, len(texts), COUNTED_AT_ONCE)
        )
        return [
            len(encoding.ids)
            for part in parts
            for encoding in self._tokenizer.encode_batch_fast(part, add_special_tokens=False)
        ]

    # ---------------------------------------------------------------- parts
    def _encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        return self._tokenizer.encode_batch(
            list(texts), add_special_tokens=self.settings.special_tokens
        )

    def _cut(self, encoding: tokenizers.Encoding, start: int, stop: int) -> list[int]:
        """Return the ids without the last tokens of the characters start..stop, as far as there
        are too many.
        """
        dropped = set(self._dropped(encoding, start, stop))
        return [number for place, number in enumerate(encoding.ids) if place not in dropped]

    def _dropped(self, encoding: tokenizers.Encoding, start: int, stop: int) -> list[int]:
        """Return the places of the tokens that there are too many."""
        surplus = len(encoding.ids) - self.max_tokens
        if surplus <= 0:
            return []
        inside = [
            place
            for place, ((first, last), special) in enumerate(
                zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
            )
            if not special and first < stop and last > start
        ]
        return inside[max(0, len(inside) - surplus) :]

    def in_chat(
        self, template: PromptTemplate, media: Sequence[dict[str, str]], published: Chat
    ) -> PromptTemplate:
        """Return a template as the model's chat has it. media: what the user's message holds before
        its text; published: the model's tokenizer or processor, which renders it.
        """
        shown = template.middle + SLOT + template.after
        text = [*media, {"type": "text", "text": shown}] if media else shown
        messages: list[dict[str, object]] = (
            [{"role": "system", "content": template.before}] if template.before else []
        )
        messages.append({"role": "user", "content": text})
        try:
            rendered = published.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # jinja's and the library's own, of many kinds
            reason = str(error).splitlines()[0]
            raise ConfigurationError(
                f"model.chat_template is on, but that of {self.settings.source} cannot be used "
                f"({reason}); set model.prompts"
            ) from error
        before, _, after = rendered.partition(SLOT)
        return PromptTemplate(before=before, after=after)
