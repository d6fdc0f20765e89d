"""Batches that a rank's own processor puts together, for the proofs over layouts of
`sailplan.parity`.

A published model's tensors need not be rows that can be cut apart: the patches of all pictures may
lie behind each other, and rows of another batch are padded otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from sailplan.config.schema import Config, ViewConfig
from sailplan.data.processor import Processor, ViewRow
from sailplan.data.record import NamedInputs, ViewBatch
from sailplan.parity import testing

Rows = Callable[[Processor, ViewConfig, int, int], list[ViewRow]]  # of a view: count, seed


@dataclass
class Collated(NamedInputs):
    """A batch that is put together anew of the rows that are taken from it."""

    processor: Any = None
    view: ViewConfig = field(default_factory=ViewConfig)
    items: list[ViewRow] = field(default_factory=list)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Any:
        chosen = change(torch.arange(len(self.items)))
        return collated(self.processor, self.view, [self.items[row] for row in chosen])


def collated(processor: Processor, view: ViewConfig, items: list[ViewRow]) -> NamedInputs:
    """Return the inputs of rows, as a run makes them."""
    found: Any = processor.batch(items, processor.tokens(items, view), view)
    return NamedInputs(found.modalities, found.named)


def prove(monkeypatch: pytest.MonkeyPatch, kind: str, config: Config, rows: Rows) -> None:
    """Let `sailplan.parity` take `kind` for a configuration's encoder, and its views' rows from
    `rows`.
    """
    model: Any = config.model
    processor = model.component().processor(config)
    modalities = list(getattr(model, "towers", None) or model.modalities)

    def batch(shown: list[Any], count: int, group: int, seed: int, vision: str | None) -> ViewBatch:
        view = ViewConfig(modalities=shown)
        items = rows(processor, view, count * group, seed)
        made = collated(processor, view, items)
        whole = Collated(made.modalities, made.named, processor, view, items)
        generator = torch.Generator().manual_seed(seed)
        valid = torch.rand(count * group, generator=generator) < 0.9
        ids = torch.randint(0, 3 * count, (count * group,), generator=generator)
        return ViewBatch([whole], torch.arange(count * group), valid, ids, group)

    monkeypatch.setitem(testing.TINY, kind, (modalities, {}))
    monkeypatch.setattr(testing, "tiny_settings", lambda _: model)
    monkeypatch.setattr(testing, "_view", batch)
