"""Published models that read pictures or sound within their text, over layouts: the full batch's
gradients.

Their tensors are not rows that can be cut apart (the patches of all pictures lie behind each other),
so a rank's share is put together by the processor, as it is in a run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sailplan.config.schema import ViewConfig
from sailplan.data.record import ViewBatch
from sailplan.data.processor import Processor, ViewRow
from sailplan.data.record import NamedInputs
from sailplan.parity import testing
from sailplan.parity.layouts import compare

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "encoders"))
from single_stream import configured, rows

WEIGHTS = {"infonce": 1.0, "seq2item": 0.5}


@dataclass
class Collated(NamedInputs):
    """A batch that is put together anew of the rows that are taken from it."""

    processor: Any = None
    view: ViewConfig = field(default_factory=ViewConfig)
    items: list[ViewRow] = field(default_factory=list)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Any:
        return collated(
            self.processor,
            self.view,
            [self.items[row] for row in change(torch.arange(len(self.items)))],
        )


def collated(processor: Processor, view: ViewConfig, items: list[ViewRow]) -> NamedInputs:
    found: Any = processor.batch(items, processor.tokens(items, view), view)
    return NamedInputs(found.modalities, found.named)


@pytest.fixture(params=["qwen2_vl", "llava", "qwen2_audio"])
def single_stream(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> str:
    kind: str = request.param
    config = configured(tmp_path, kind)
    processor = config.model.component().processor(config)

    def batch(
        modalities: list[Any], count: int, group: int, seed: int, vision: str | None
    ) -> ViewBatch:
        view, items = ViewConfig(modalities=modalities), rows(kind, count * group, seed)
        made = collated(processor, view, items)
        whole = Collated(made.modalities, made.named, processor, view, items)
        generator = torch.Generator().manual_seed(seed)
        valid = torch.rand(count * group, generator=generator) < 0.9
        ids = torch.randint(0, 3 * count, (count * group,), generator=generator)
        return ViewBatch([whole], torch.arange(count * group), valid, ids, group)

    monkeypatch.setitem(testing.TINY, kind, (list(config.model.modalities), {}))
    monkeypatch.setattr(testing, "tiny_settings", lambda _: config.model)
    monkeypatch.setattr(testing, "_view", batch)
    return kind


def test_gradients_are_the_full_batchs(single_stream: str) -> None:
    """Two ranks, three micro-batches each, some replayed: some have no picture, or no row."""
    for row in compare(2, 1, ((3, 1),), weights=WEIGHTS, encoder=single_stream):
        assert row.error <= 1e-10, row
