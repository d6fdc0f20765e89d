"""Encodings of small batches, float64, and the data sets that they are of: what the tests of losses
share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sailplan.config.schema import DatasetConfig, PatternConfig, ViewConfig
from sailplan.objective.protocol import EncodedStep, EncodedView, ObjectiveContext
from sailplan.objective.temperature import Temperatures
from sailplan_kernels.exchange import Local

D, ROWS = 8, 6
BOTH = ["vision", "text"]
ITEMS = DatasetConfig(
    views={
        "image": ViewConfig(modalities=["vision"]),
        "name": ViewConfig(modalities=["text"]),
        "item": ViewConfig(modalities=BOTH),
    },
    patterns={
        "image_to_name": PatternConfig("image", "name", 2.0),
        "name_to_item": PatternConfig("name", "item", 0.5),
    },
    temperature=0.1,
    symmetric=False,
)
PAIRS = DatasetConfig(
    kind="pairs",
    views={"query": ViewConfig("query", BOTH), "item": ViewConfig("target", BOTH)},
    patterns={"item_to_item": PatternConfig("query", "item")},
    temperature=0.1,
    symmetric=False,
)
SEQUENCES = DatasetConfig(
    kind="sequences",
    views={"history": ViewConfig("history", BOTH), "item": ViewConfig("target", BOTH)},
    patterns={"history_to_item": PatternConfig("history", "item")},
    history_length=3,
    temperature=0.1,
    symmetric=False,
)
DATASETS = {"items": ITEMS, "pairs": PAIRS, "sequences": SEQUENCES}


def context(**changes: Any) -> ObjectiveContext:
    return ObjectiveContext(
        DATASETS, Local(), Temperatures(DATASETS).double(), (4, D), "reference", **changes
    )


def view(seed: int, group: int = 1, **changes: Any) -> EncodedView:
    generator = torch.Generator().manual_seed(seed)

    def vectors() -> Tensor:
        return torch.randn(ROWS * group, D, generator=generator, dtype=torch.float64)

    rows = ROWS * group
    given = {
        "valid": torch.ones(rows, dtype=torch.bool),
        "ids": torch.arange(rows) + 100 * seed,
        "group": group,
    } | changes
    return EncodedView(
        fused=vectors(), by_modality={"vision": vectors(), "text": vectors()}, **given
    )


def step(dataset: str, views: dict[str, EncodedView], **changes: Any) -> EncodedStep:
    return EncodedStep(
        dataset,
        views,
        {name: pattern.weight for name, pattern in DATASETS[dataset].patterns.items()},
        **changes,
    )
