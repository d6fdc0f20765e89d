"""The vectors of tokens pass through the gradient cache as the pooled ones do: exact for rows of any
number on any rank, an encoder of ours and a published one, and only where they were asked for.
"""

from __future__ import annotations

import pytest
import torch

from sailplan.model.testing import join_layout, random_inputs, small_config
from sailplan.model.tower import OmniEncoder
from sailplan.parity.layouts import compare
from sailplan.parity.matrix import LIMITS
from sailplan.parity.testing import OMNI, ROWS
from sailplan_kernels.testing import run_ranks

ALONE = {"weights": {"late_interaction": 1.0}, "datasets": ("items",)}
CASES = [(1, 0), (3, 0), (3, 2)]  # (micro-batches a view, kept graphs)


@pytest.mark.parametrize(
    ("world", "tensor", "encoder"), [(1, 1, OMNI), (2, 1, OMNI), (2, 1, "bert"), (4, 2, OMNI)]
)
def test_gradients_are_those_of_the_full_batch(world: int, tensor: int, encoder: str) -> None:
    cases = CASES if encoder == OMNI and (world, tensor) == (2, 1) else CASES[1:2]
    for row in compare(world, tensor, cases, encoder=encoder, **ALONE):
        assert row.error <= LIMITS[torch.float64], row


def test_ranks_with_other_numbers_of_rows_and_without_any() -> None:
    for rows in ((ROWS["items"] - 5, 5), (0, ROWS["items"])):
        for row in compare(2, 1, [(2, 0)], rows={"items": rows}, **ALONE):
            assert row.error <= LIMITS[torch.float64], row


def _positions(rank: int, world_size: int) -> None:
    join_layout(1)
    encoder = OmniEncoder(small_config(), dtype=torch.float64)
    inputs = random_inputs(("vision", "text"), 6, seed=1).mapped(
        lambda each: each.double() if each.is_floating_point() else each
    )
    found = encoder(inputs, tokens=True)
    assert found.tokens.shape[:2] == found.token_mask.shape
    assert not found.tokens[~found.token_mask].any()
    counts = found.token_mask.sum(1, keepdim=True)
    assert len(set(counts.flatten().tolist())) > 1  # rows of several lengths
    mean = found.tokens.sum(1) / counts.clamp(min=1)
    torch.testing.assert_close(mean, found.fused)  # of which the pooled vector is the mean
    plain = encoder(inputs)
    assert plain.tokens is None and torch.equal(plain.fused, found.fused)
    assert list(plain.named()) == ["fused"] and list(found.named()) == ["fused", "tokens"]
    empty = encoder(inputs.mapped(lambda each: each[:0]), tokens=True)
    assert empty.tokens.shape[0] == empty.token_mask.shape[0] == 0 and empty.tokens.requires_grad


def test_positions_are_those_that_the_pooled_vector_is_the_mean_of() -> None:
    run_ranks(_positions, 1)
