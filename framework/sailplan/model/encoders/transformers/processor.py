"""Rows as a published model's tensors: texts through its tokenizer, pictures through its own processor.

Shape legend: b rows, t tokens, f pictures a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sailplan.config.schema import Config, ViewConfig
from sailplan.data.config import MODALITIES
from sailplan.data.processor import Processor, ViewRow
from sailplan.data.record import NamedInputs
from sailplan.model.encoders.transformers.config import TransformersConfig
from sailplan.model.encoders.transformers.files import open_tokenizer
from sailplan.model.encoders.transformers.prompts import PublishedTokenizer

PRESENT = {modality: f"{modality}_present" for modality in MODALITIES}  # ours, beside the model's own tensors: what a row has


class TransformersProcessor(Processor):
    """Tensors named as the model's forward names them."""

    tokenizer: PublishedTokenizer

    def __init__(self, settings: TransformersConfig, config: Config) -> None:
        """Raises ConfigurationError where the model's tokenizer cannot be had."""
        self.settings, self.data = settings, config.data
        self.max_tokens, self.frames = config.data.max_tokens, config.data.frames
        self.tokenizer = PublishedTokenizer(open_tokenizer(settings), settings, self.max_tokens)

    def overhead(self, view: ViewConfig) -> int:
        return self.tokenizer.overhead(view.prompt) if "text" in view.modalities else 0

    def tokens(self, rows: Sequence[ViewRow], view: ViewConfig) -> list[list[int]]:
        """Return the ids of whole rows, prompt and special tokens included."""
        return self.tokenizer.texts([row.text for row in rows], view.prompt) if "text" in view.modalities else [[] for _ in rows]

    def cost(self, row: ViewRow, tokens: int, view: ViewConfig) -> int:
        return super().cost(row, tokens - self.overhead(view), view)

    def batch(self, rows: Sequence[ViewRow], tokens: Sequence[list[int]], view: ViewConfig) -> NamedInputs:
        named: dict[str, Tensor] = {}
        if "text" in view.modalities:
            named |= self._texts(tokens)
        return NamedInputs(tuple(view.modalities), named)

    def largest(self, modalities: Sequence[str], rows: int) -> NamedInputs:
        named: dict[str, Tensor] = {}
        if "text" in modalities:
            named["input_ids"] = torch.zeros(rows, self.max_tokens, dtype=torch.int64)  # every token is there: no mask
        return NamedInputs(tuple(modalities), named)

    def _texts(self, tokens: Sequence[list[int]]) -> dict[str, Tensor]:
        """input_ids and attention_mask int64 [b, t]; a row without a token has one, as attention needs something to look at."""
        width = max(1, max(map(len, tokens), default=1)) if self.settings.padding == "longest" else self.max_tokens
        ids = torch.full((len(tokens), width), self.tokenizer.pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, own in enumerate(tokens):
            ids[row, : len(own)] = torch.tensor(own, dtype=torch.int64)
            mask[row, : max(1, len(own))] = 1
        return {"input_ids": ids, "attention_mask": mask} if self.tokenizer.masked else {"input_ids": ids}
