"""Tensor-parallel peers that share out the rows of the vision and audio encoders: exact, any
number of rows, 1/T of the work.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from sailplan.config.schema import ParallelConfig
from sailplan.data.packing import pack
from sailplan.model.build import build_encoder
from sailplan.model.sharing import encode_own_rows
from sailplan.model.testing import join_layout, random_inputs, rows_of, small_config
from sailplan.model.tower import ENCODERS, OmniEncoder
from sailplan.parity.layouts import cached_step, compare, gathered_gradients, relative_errors
from sailplan.parity.testing import WEIGHTS
from sailplan_kernels.testing import run_ranks

EVERYTHING = ("text", "vision", "audio")


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (2, {"share_encoders": False}),
        (2, {"checkpointing": True}),
        # Nine rows on one data-parallel rank, odd micro-batches; on the other one none, so that its
        # micro-batches are empty.
        (4, {"rows": {"pairs": [16, 0], "items": [23, 9]}}),
    ],
    ids=["cut", "checkpointing", "uneven"],
)
def test_the_gradients_are_the_full_batchs(world_size: int, options: dict[str, Any]) -> None:
    """The plain case, shared and sharded, is that of the parity matrix."""
    for row in compare(world_size, 2, ((3, 1),), **options):
        assert row.error <= 1e-10, row


def _function(rank: int, world_size: int, rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    inputs = torch.randn(rows, 3, dtype=torch.float64, generator=generator)
    present = torch.ones(rows, dtype=torch.bool)
    weight = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.randn(
        4, rows, dtype=torch.float64, generator=generator
    ).T  # a gradient that is not contiguous

    def encode(own: torch.Tensor, own_present: torch.Tensor) -> list[torch.Tensor]:
        return [torch.tanh(own @ weight) * own_present[:, None]]

    (found,) = encode_own_rows(encode, dist.group.WORLD, inputs, present)
    found.backward(target)
    dist.all_reduce(weight.grad)
    shared, weight.grad = weight.grad, None
    (expected,) = encode(inputs, present)
    expected.backward(target)
    return [found, expected, shared, weight.grad]


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_any_number_of_rows_on_three_peers(rows: int) -> None:
    for found, expected, shared, gradient in run_ranks(_function, 3, rows):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)  # products of other shapes
        torch.testing.assert_close(shared, gradient, rtol=0, atol=1e-13)


def _encoder_flops(rank: int, world_size: int, rows: int, share: bool) -> dict[str, int]:
    """Counted operations of a forward and backward pass on this rank, by part of the encoder."""
    parallel = join_layout(world_size)
    encoder = build_encoder(
        small_config(),
        ParallelConfig(tensor=world_size, encoders="share" if share else "tensor"),
        parallel,
        seed=1,
    )
    found = {}
    for modality, parts in (
        ("vision", ("vision", "perceiver", "tower")),
        ("audio", ("audio.encoder",)),
    ):  # the counter mixes up their backwards
        inputs = random_inputs((modality, "text"), rows, 3, dtype=torch.float32, absent=False)
        with FlopCounterMode(display=False) as counter:
            encoder(inputs).fused.sum().backward()
        counts = {
            name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()
        }
        root = next(name for name in counts if name.endswith("OmniEncoder"))
        found |= {part: counts[f"{root}.{part}"] for part in parts}
    return found


@pytest.mark.parametrize("rows", [8, 7])
def test_a_peer_counts_its_share_of_the_operations(rows: int) -> None:
    alone = run_ranks(_encoder_flops, 1, rows, True)[0]
    most = (rows + 1) // 2
    for own, found in zip(
        (most, rows - most), run_ranks(_encoder_flops, 2, rows, True), strict=True
    ):
        assert found["vision"] == pytest.approx(
            own / rows * alone["vision"], rel=0.02
        )  # pictures of rows that fill up are not encoded
        assert (
            own / rows * alone["perceiver"] * 0.98
            <= found["perceiver"]
            <= most / rows * alone["perceiver"] * 1.02
        )
        assert found["audio.encoder"] == pytest.approx(
            most / rows * alone["audio.encoder"], rel=0.02
        )
        assert found["tower"] == pytest.approx(alone["tower"] / 2, rel=0.02)
    for found in run_ranks(_encoder_flops, 2, rows, False):  # cut: the stems still run on every row
        assert found["vision"] > 0.6 * alone["vision"]


def _dropout(rank: int, world_size: int) -> tuple[float, float, torch.Tensor, bool]:
    parallel = join_layout(2)
    gradients = []
    for kept_graphs in (-1, 0):  # the second replays every micro-batch
        step, _ = cached_step(parallel, 3, kept_graphs, WEIGHTS, dropout=0.3)
        gradients.append(gathered_gradients(step, parallel))
    encoder = OmniEncoder(small_config(dropout=0.3), dtype=torch.float64, seed=1)
    one = random_inputs(("vision",), 1, 5, absent=False)
    twice = rows_of(one, 0, 1)
    for name in ("token_ids", "token_mask", "text_mask", "images", "image_mask"):
        setattr(twice, name, getattr(one, name).repeat_interleave(2, 0))
    torch.manual_seed(4)
    packing = pack(twice, encoder.layout)
    latents = encoder._shared(partial(encoder._see, packing, packing.lists()), twice.images)[
        0
    ].detach()
    plain = {
        name: parameter.tensor_parallel_partial
        for name, parameter in encoder.named_parameters()
        if name.startswith(ENCODERS)
    }
    return (
        max(relative_errors(gradients[1], gradients[0]).values()),
        float((latents[0] - latents[1]).abs().max()),
        torch.rand(2),
        all(plain.values()),
    )


def test_dropout_differs_between_peers_is_replayed_and_leaves_the_generators_alike() -> None:
    (error, apart, after, noted), (_, same_apart, same_after, _) = run_ranks(_dropout, 2)
    assert error <= 1e-10 and noted
    assert apart == same_apart > 1e-3  # one row on each peer: equal rows, other units dropped
    assert torch.equal(after, same_after)
