"""Two published towers over layouts: the full batch's gradients, with BatchNorm in one tower,
whole and with frozen towers.

Risks: BatchNorm's statistics of a micro-batch (a gradient that depends on how rows are cut), a part
that is frozen with another.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sailplan.model.encoders.transformers import TransformersConfig
from sailplan.model.encoders.two_towers import TwoTowersConfig
from sailplan.parity import testing
from sailplan.parity.layouts import compare, reference
from sailplan.parity.published import BOTH, tiny_inputs, tiny_settings
from sailplan_kernels.testing import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
from test_published_encoders import _apart, _bfloat16

LIMIT = 1e-10
SHAPE: dict[str, Any] = {
    "width_coefficient": 0.0125,
    "depth_coefficient": 1.0,
    "hidden_dim": 16,
    "in_channels": [32, 16],
    "out_channels": [16, 1280],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 2],
    "expand_ratios": [1, 2],
    "drop_connect_rate": 0.0,
    "initializer_range": 0.4,
}


def settings() -> TwoTowersConfig:
    folder = tempfile.mkdtemp(prefix="sailplan-towers-")
    transformers.EfficientNetConfig(**SHAPE).save_pretrained(folder)
    vision = TransformersConfig(source=folder, weights="drawn", pooling="mean")
    return TwoTowersConfig(
        embedding=16, prefixes=[4, 8, 16], text=tiny_settings("bert"), vision=vision
    )


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> str:
    made = settings()
    monkeypatch.setitem(testing.TINY, "two_towers", (BOTH, {}))
    monkeypatch.setattr(testing, "tiny_settings", lambda _: made)
    return "two_towers"


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (2, 3), (4, 3)])
def test_gradients_are_the_full_batchs(towers: str, world: int, micro: int) -> None:
    for row in compare(world, 1, ((micro, 0),), encoder=towers):
        assert row.error <= LIMIT, row


def test_bfloat16_trains_beside_statistics_in_float32(towers: str) -> None:
    """BatchNorm's statistics stay float32 where its inputs and weights are bfloat16."""
    _, exact = reference({"infonce": 1.0}, ("items",), encoder=towers)
    plain, found = (
        run_ranks(_bfloat16, world, towers, world == 1, timeout=120)[0] for world in (1, 2)
    )
    assert found.keys() == exact.keys() == plain.keys()
    assert 0 < _apart(plain, exact) < 0.1
    assert _apart(found, exact) <= 1.25 * _apart(plain, exact) + 5e-3


def test_parts_are_the_towers_and_their_projections() -> None:
    with torch.random.fork_rng():
        encoder = dataclasses.replace(settings()).component().module(torch.float32)
    parts = encoder.parts()
    assert {name: bool(found) for name, found in parts.items()} == dict.fromkeys(
        ("text", "vision", "text_projection", "vision_projection"), True
    )
    assert sum(map(len, parts.values())) == len(list(encoder.parameters()))
    assert encoder.used_parts(["text"]) == {"lora", "text", "text_projection"}


def test_a_rows_vector_does_not_depend_on_its_batch_in_training() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = settings().component().module(torch.float64).train()
    inputs = tiny_inputs(["vision"], 6, 1)
    whole = encoder(inputs).fused
    parts = [
        encoder(inputs.mapped(lambda tensor, row=row: tensor[row : row + 1])).fused
        for row in range(6)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(int(module.num_batches_tracked) == 0 for module in norms)
    assert whole.abs().max() > 1e-6
