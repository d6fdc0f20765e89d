"""Losses that meet once: several calls over shared tensors, on ranks of uneven and no rows,
against one process and one loss at a time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sailplan_kernels import EXCHANGES, AllGather, Exchange, Local, RowSplit, infonce, infonce_sum
from sailplan_kernels.arguments import grouped
from sailplan_kernels.testing import run_ranks

ROWS, D, HARD, WEIGHTS = (5, 0, 3), 16, 2, (1.0, 0.5, 2.0, 0.25)
BARS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-3}
Leaves = dict[str, Tensor]


def leaves_of(rows: slice, dtype: torch.dtype) -> Leaves:
    """Three views, hard negatives of the first, and a temperature, as they are in ``dtype``."""
    g = torch.Generator().manual_seed(3)
    base = torch.randn(sum(ROWS), D, generator=g)
    drawn = {name: base + 0.6 * torch.randn(sum(ROWS), D, generator=g) for name in "abc"} | {
        "hard": torch.randn(sum(ROWS), HARD, D, generator=g)
    }
    # Rounded to bfloat16, so that all dtypes are given the same numbers.
    found = {name: x[rows].bfloat16().to(dtype).requires_grad_() for name, x in drawn.items()}
    return found | {
        "temperature": torch.tensor(
            0.0625, dtype=torch.float64 if dtype is torch.float64 else torch.float32
        ).requires_grad_()
    }


def calls_of(leaves: Leaves, rows: slice) -> list[dict[str, Any]]:
    """What several patterns ask for: views shared in other roles, with other masks, options and
    prefixes.
    """
    a, b, c, hard, temperature = leaves.values()
    g = torch.Generator().manual_seed(4)
    flags = [torch.rand(sum(ROWS), generator=g)[rows] < 0.8 for _ in range(3)]
    ids = torch.randint(0, 5, (sum(ROWS),), generator=g)[rows]
    masks = {
        "query_valid": flags[0],
        "key_valid": flags[1],
        "query_ids": ids,
        "key_query_ids": ids,
        "key_ids": torch.arange(sum(ROWS))[rows] % 6,
    }
    return [
        {
            "queries": a,
            "keys": b,
            "temperature": temperature,
            "symmetric": True,
            "prefixes": (4, D),
            "hard_negatives": hard,
            **masks,
        },
        {
            "queries": b,
            "keys": c,
            "temperature": 0.1,
            "query_negatives": True,
            "key_valid": flags[2],
        },
        {
            "queries": c,
            "keys": a,
            "temperature": temperature,
            "symmetric": True,
            "prefixes": (4, D),
            "margin_absolute": 0.1,
        },
        {
            "queries": a,
            "keys": b,
            "temperature": 0.05,
            "key_negatives": True,
            "positive_ids": ids,
            "key_ids": ids,
        },
    ]


def rows_of(rank: int) -> slice:
    return slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1]))


def expected() -> tuple[Tensor, Leaves]:
    """The definition, in float64, of one process, one loss at a time."""
    leaves = leaves_of(slice(None), torch.float64)
    calls = calls_of(leaves, slice(None))
    total = torch.stack(
        [
            w * infonce(**grouped(call | {"backend": "reference"})).loss
            for w, call in zip(WEIGHTS, calls, strict=True)
        ]
    ).sum()
    total.backward()
    return total.detach(), {name: x.grad for name, x in leaves.items() if x.grad is not None}


def together(
    rank: int, dtype: torch.dtype, exchange: Exchange, ranks: int, known: bool
) -> tuple[Tensor, Leaves]:
    leaves = leaves_of(rows_of(rank), dtype)
    sizes = {"sizes": [(rows, rows) for rows in ROWS[:ranks]]} if known else {}
    calls = [
        grouped(call | sizes | {"backend": "chunked"}) for call in calls_of(leaves, rows_of(rank))
    ]
    total, outputs = infonce_sum(calls, WEIGHTS, exchange=exchange)
    total.backward()
    torch.testing.assert_close(
        total.detach(),
        torch.stack([w * one.loss for w, one in zip(WEIGHTS, outputs, strict=True)]).sum(),
    )
    return total.detach(), {name: x.grad for name, x in leaves.items()}


def check(parts: list[tuple[Tensor, Leaves]], dtype: torch.dtype) -> None:
    loss, gradients = expected()
    apart = lambda x, y: float((x.double() - y).norm() / y.norm())  # noqa: E731
    assert apart(torch.stack([part[0] for part in parts]).mean(), loss) <= BARS[dtype]
    for name, gradient in gradients.items():
        each = [part[1][name].double() for part in parts]
        found = torch.cat(each) / len(parts) if gradient.dim() else torch.stack(each).mean()
        assert apart(found, gradient) <= BARS[dtype], name


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("kind", EXCHANGES)
def test_losses_of_one_exchange_equal_one_process(kind, dtype):
    """One rank has no rows; sizes known and asked for."""

    def work(rank: int, ranks: int) -> list[tuple[Tensor, Leaves]]:
        exchange = EXCHANGES[kind]()
        return [together(rank, dtype, exchange, ranks, known) for known in (False, True, True)]

    for parts in zip(*run_ranks(work, len(ROWS), timeout=60), strict=True):
        check(list(parts), dtype)


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("kind", ["all_gather", "ring"])
def test_tensor_parallel_peers_share_the_rows_of_all_losses(kind, dtype):
    """Two peers on each of three; one pair has no rows, and peers return the same bits."""

    def work(rank: int, _: int) -> tuple[Tensor, Leaves]:
        columns = [dist.new_group([2 * d + t for d in range(len(ROWS))]) for t in range(2)]
        rows = [dist.new_group([2 * d, 2 * d + 1]) for d in range(len(ROWS))]
        exchange = RowSplit(EXCHANGES[kind](columns[rank % 2]), AllGather(rows[rank // 2]))
        return together(rank // 2, dtype, exchange, len(ROWS), True)

    found = run_ranks(work, 2 * len(ROWS), timeout=60)
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(one[0], other[0]) and all(
            torch.equal(x, other[1][name]) for name, x in one[1].items()
        )
    check(found[::2], dtype)


def test_one_process_needs_no_exchange():
    leaves = leaves_of(slice(None), torch.float64)
    total, _ = infonce_sum(
        [grouped(call | {"backend": "chunked"}) for call in calls_of(leaves, slice(None))],
        WEIGHTS,
        exchange=Local(),
    )
    total.backward()
    check(
        [(total.detach(), {name: x.grad for name, x in leaves.items() if x.grad is not None})],
        torch.float64,
    )
