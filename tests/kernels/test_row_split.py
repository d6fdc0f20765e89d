"""Tensor-parallel peers that share the rows return what one process returns, the same bits on
all of them, for 1/T of the work.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from sailplan_kernels import EXCHANGES, AllGather, Exchange, Local, RowSplit, infonce, sigmoid
from sailplan_kernels.arguments import grouped
from sailplan_kernels.testing import run_ranks

LEAVES = ("queries", "keys", "hard_negatives", "temperature", "bias")
OPTIONS = [
    {},
    {"positives": True, "ids": True, "masks": True, "per_row_temperature": True},
    {"hard": 2, "masks": True, "prefixes": (3, 7)},
    {
        "symmetric": True,
        "prefixes": (3, 7),
        "prefix_weights": (0.5, 1.0),
        "per_row_temperature": True,
    },
    {
        "by_id": True,
        "query_negatives": True,
        "prefixes": (3, 7),
        "margin_absolute": 0.1,
        "masks": True,
    },
    {
        "by_id": True,
        "symmetric": True,
        "key_negatives": True,
        "prefixes": (3, 7),
        "margin_absolute": 0.1,
        "masks": True,
        "per_row_temperature": True,
    },
    {
        "symmetric": True,
        "positives": True,
        "query_ids": True,
        "margin_absolute": 0.1,
        "per_row_threshold": True,
    },
    {
        "symmetric": True,
        "query_negatives": True,
        "key_negatives": True,
        "hard": 1,
        "shared_hard_negatives": True,
        "ids": True,
        "query_ids": True,
        "masks": True,
        "positives": True,
        "margin_absolute": 0.05,
        "prefixes": (2, 6),
        "sampling": True,
    },
]


def grid(rank: int, data: int, tensor: int, kind: str = "all_gather") -> RowSplit:
    """The exchange of this rank among data x tensor ranks, tensor-parallel peers being
    neighbours.
    """
    columns = [dist.new_group([d * tensor + t for d in range(data)]) for t in range(tensor)]
    rows = [dist.new_group([d * tensor + t for t in range(tensor)]) for d in range(data)]
    inner = Local() if data == 1 else EXCHANGES[kind](columns[rank % tensor])
    return RowSplit(inner, AllGather(rows[rank // tensor]))


def call(case: dict, frozen=(), loss=infonce, **more) -> dict[str, torch.Tensor]:
    case = {
        name: x.clone().requires_grad_(name not in frozen)
        if name in LEAVES and isinstance(x, torch.Tensor)
        else x
        for name, x in case.items()
    }
    out = loss(**grouped(case | more))
    out.loss.backward()
    found = {
        "loss": out.loss.detach(),
        "prefix_losses": out.prefix_losses,
        "positive_score": out.positive_score,
    }
    if loss is infonce:
        found["accuracy"] = out.accuracy
    return found | {
        name: case[name].grad
        for name in LEAVES
        if isinstance(case.get(name), torch.Tensor) and name not in frozen
    }


def check(found: list[dict], expected: dict, data: int, tensor: int) -> None:
    for first in range(0, data * tensor, tensor):
        for name, x in found[first].items():
            assert all(torch.equal(found[first + t][name], x) for t in range(tensor)), (
                f"{name}: peers differ"
            )
    parts, close = found[::tensor], {"rtol": 1e-12, "atol": 1e-12}
    for name, whole in expected.items():
        mine = [part[name] for part in parts]
        if name in ("prefix_losses", "accuracy"):
            together = torch.stack(mine).mean(0)
        elif name == "positive_score":
            together = torch.cat(mine)
        else:
            together = torch.cat(mine) / data if whole.dim() else torch.stack(mine).mean(0)
        torch.testing.assert_close(
            together, whole, **close, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    "data, tensor, kind",
    [
        (1, 2, "all_gather"),
        (1, 3, "all_gather"),
        (2, 2, "all_gather"),
        (2, 2, "ring"),
        (2, 2, "grid"),
    ],
)
def test_peers_equal_one_process(make_case, data, tensor, kind):
    shapes = ((5, 3)[:data], (7, 4)[:data])
    cases = [make_case(seed, *shapes, **options) for seed, options in enumerate(OPTIONS)]
    cases.append(
        make_case(7, (1, 2)[:data], (3, 2)[:data], symmetric=True, hard=1)
    )  # fewer rows than peers
    cases.append(
        make_case(8, (0, 3)[:data], (0, 4)[:data], query_negatives=True, prefixes=(3, 7))
    )  # a group without rows

    def work(rank, _):
        exchange = grid(rank, data, tensor, kind)
        assert isinstance(exchange, Exchange)
        # Two rounds over tiles, and one pass over chunks of rows where the exchange keeps all
        # shards.
        return [
            call(ranks[rank // tensor], exchange=exchange, backend="chunked", memory_budget=b)
            for ranks, _ in cases
            for b in (1500, None)
        ]

    results = list(zip(*run_ranks(work, data * tensor), strict=True))
    for i, found in enumerate(results):
        try:
            check(list(found), call(cases[i // 2][1], backend="reference"), data, tensor)
        except AssertionError as error:
            raise AssertionError(f"case {i // 2}: {error}") from error


def test_losses_that_know_no_shares_are_as_right(make_case):
    ranks, whole = make_case(0, (5, 3), (7, 4), masks=True)
    kinds = [("reference", infonce, {}), ("reference", sigmoid, {"bias": torch.tensor(-3.0)})]

    def work(rank, _):
        exchange = grid(rank, 2, 2)
        return [
            call(ranks[rank // 2], loss=loss, exchange=exchange, backend=backend, **more)
            for backend, loss, more in kinds
        ]

    for (_, loss, more), found in zip(kinds, zip(*run_ranks(work, 4), strict=True), strict=True):
        check(list(found), call(whole, loss=loss, backend="reference", **more), 2, 2)


@pytest.mark.parametrize(
    "data, tensor, kind", [(1, 3, "all_gather"), (2, 2, "all_gather"), (2, 2, "grid")]
)
def test_peers_share_the_sigmoid_loss(make_case, data, tensor, kind):
    options = (
        {},
        {
            "positives": True,
            "ids": True,
            "masks": True,
            "per_row_temperature": True,
            "prefixes": (3, 7),
        },
    )
    cases = [
        make_case(seed, (5, 3)[:data], (7, 4)[:data], **more) for seed, more in enumerate(options)
    ]
    cases.append(make_case(3, (1, 2)[:data], (3, 2)[:data]))  # fewer rows than peers
    bias = torch.tensor(-2.0, dtype=torch.float64)

    def work(rank, _):
        exchange = grid(rank, data, tensor, kind)
        return [
            call(
                {**ranks[rank // tensor], "bias": bias},
                loss=sigmoid,
                exchange=exchange,
                backend="chunked",
                memory_budget=900,
            )
            for ranks, _ in cases
        ]

    for found, (_, whole) in zip(
        zip(*run_ranks(work, data * tensor), strict=True), cases, strict=True
    ):
        check(
            list(found),
            call({**whole, "bias": bias}, loss=sigmoid, backend="reference"),
            data,
            tensor,
        )


def test_peers_may_freeze_inputs(make_case):
    ranks, whole = make_case(
        0, (5, 3), (7, 4), hard=2, symmetric=True, query_negatives=True, key_negatives=True
    )
    for frozen in (("queries",), ("keys", "temperature"), ("hard_negatives",)):
        found = run_ranks(
            lambda rank, _, f=frozen: call(
                ranks[rank // 2], f, exchange=grid(rank, 2, 2), backend="chunked"
            ),
            4,
        )
        check(found, call(whole, frozen, backend="reference"), 2, 2)


@pytest.mark.parametrize(
    "loss, options",
    [
        (infonce, {}),
        (infonce, {"symmetric": True, "prefixes": (4, 8)}),
        (infonce, {"query_negatives": True, "key_negatives": True}),
        (sigmoid, {"bias": -3.0}),
    ],
)
def test_each_peer_does_its_part_of_the_products(make_case, loss, options):
    ranks, whole = make_case(0, (48,), (64,), 8, **options)

    def flops(case, exchange):
        with FlopCounterMode(display=False) as counter:
            call(case, loss=loss, exchange=exchange, backend="chunked")
        return counter.get_total_flops()

    alone = flops(whole, Local())
    found = run_ranks(lambda rank, _: flops(ranks[0], grid(rank, 1, 3)), 3)
    assert (
        alone >= 48 * 64 * 8 * 2
    )  # the scores; the counter does not see products that add in place, which have the same shape
    assert [3 * x for x in found] == [alone] * 3
