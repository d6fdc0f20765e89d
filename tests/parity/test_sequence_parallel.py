"""Sequence parallelism of the tower: the full batch's gradients, and each rank saves a part of
the positions.

megatron-core asks the GPU for its number where it makes buffers, and for a random state that
nothing draws from. On a CPU both are stood in for; the collectives are gloo's own. On a GPU nothing
of this was run.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel as megatron
from megatron.core.transformer.transformer_layer import TransformerLayer

from sailplan.config.compose import compose
from sailplan.config.rules import check, check_device
from sailplan.errors import ConfigurationError
from sailplan.model.testing import join_layout, random_inputs, small_config
from sailplan.model.tower import OmniEncoder
from sailplan.parity.layouts import compare
from sailplan_kernels.testing import run_ranks


@pytest.fixture
def megatron_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked ranks inherit it."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(megatron, "get_cuda_rng_tracker", lambda: SimpleNamespace(fork=nullcontext))


@pytest.mark.parametrize(
    ("world_size", "options"),
    [(2, {}), (4, {"checkpointing": True})],
    ids=["2", "4, checkpointing"],
)
def test_the_gradients_are_the_full_batchs(
    megatron_on_a_cpu: None, world_size: int, options: dict[str, Any]
) -> None:
    """Sequences of odd and even lengths, with masks; query and key norms."""
    for row in compare(world_size, 2, ((3, 1),), sequence_parallel=True, **options):
        assert row.error <= 1e-10, row


def _positions(rank: int, world_size: int, sequence_parallel: bool) -> set[int]:
    """Positions of what enters the tower's layers on this rank, for three rows of five tokens."""
    join_layout(world_size)
    encoder = OmniEncoder(
        small_config(), dtype=torch.float64, seed=1, sequence_parallel=sequence_parallel
    )
    seen: set[int] = set()
    for layer in encoder.tower.modules():
        if isinstance(layer, TransformerLayer):
            layer.register_forward_pre_hook(
                lambda _, inputs, named: seen.add(named["hidden_states"].size(0)), with_kwargs=True
            )
    encoder(random_inputs(("text",), 3, 1, tokens=5, absent=False))
    return seen


def test_a_rank_holds_its_part_of_the_positions(megatron_on_a_cpu: None) -> None:
    assert run_ranks(_positions, 2, False) == [{15}] * 2
    assert run_ranks(_positions, 2, True) == [{8}] * 2  # fifteen filled up to sixteen


def test_where_it_cannot_be_is_one_line() -> None:
    for overrides, words in (
        ([], "parallel.tensor is 1: expected 2 or more"),
        (
            ["parallel.tensor=2", "parallel.compile=blocks"],
            "parallel.compile is blocks: expected none",
        ),
        (
            ["parallel.tensor=2", "model.tower.dropout=0.1"],
            "model.tower.dropout is 0.1: expected 0",
        ),
        (["parallel.tensor=2", "model.lora.rank=4"], "model.lora.rank is 4: expected 0, or"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            check(compose(["experiment=quickstart", "parallel.sequence=true", *overrides]), 2)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="no GPU here: expected GPUs, which"):
            check_device(
                compose(["experiment=quickstart", "parallel.sequence=true", "parallel.tensor=2"])
            )
