"""Several ranks together give the loss and the gradients of one process that holds everything."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
import torch.distributed as dist

from sailplan_kernels import EXCHANGES, AllGather, Exchange, Grid, Local, infonce
from sailplan_kernels.arguments import grouped
from sailplan_kernels.exchange.grid import width_of_row
from sailplan_kernels.testing import RankFailure, run_ranks

LEAVES = ("queries", "keys", "hard_negatives", "temperature")
SHAPES = {2: ((5, 3), (7, 4)), 3: ((4, 6, 1), (5, 6, 3))}
OPTIONS = [
    {},
    {"positives": True},
    {"ids": True, "masks": True},
    {"query_ids": True},
    {"query_ids": True, "positives": True, "symmetric": True},
    {"hard": 2, "masks": True},
    {"hard": 2, "shared_hard_negatives": True, "masks": True},
    {"max_cosine": 0.3, "margin_absolute": 0.1},
    {"margin_relative": 0.95, "symmetric": True, "positives": True},
    {"symmetric": True, "positives": True, "per_row_threshold": True},
    {"by_id": True, "masks": True},
    {
        "by_id": True,
        "query_negatives": True,
        "sampling": True,
        "prefixes": (3, 7),
        "margin_absolute": 0.1,
        "query_ids": True,
    },
    {
        "by_id": True,
        "symmetric": True,
        "masks": True,
        "margin_absolute": 0.1,
        "per_row_threshold": True,
    },
    {"by_id": True, "key_negatives": True, "masks": True, "sampling": True, "hard": 1},
    {
        "by_id": True,
        "key_negatives": True,
        "symmetric": True,
        "query_ids": True,
        "prefixes": (3, 7),
        "prefix_weights": (0.5, 1.0),
    },
    {"symmetric": True},
    {"symmetric": True, "ids": True, "masks": True, "max_cosine": 0.3},
    {"query_negatives": True, "ids": True, "sampling": True},
    {"sampling": True, "symmetric": True, "masks": True},
    {"key_negatives": True, "masks": True},
    {"prefixes": (3, 7), "prefix_weights": (0.5, 1.0), "symmetric": True},
    {"prefixes": (3, 7), "max_cosine": {3: 0.5, 7: 0.2}, "symmetric": True, "positives": True},
    {"prefixes": (3, 7), "max_cosine": {3: 0.5, 7: 0.2}, "by_id": True, "symmetric": True},
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
    },
]


def call(case: dict, frozen=(), **more):
    """The output and each leaf's gradient."""
    case = dict(case)
    for name in LEAVES:
        if name in case:
            case[name] = case[name].clone().requires_grad_(name not in frozen)
    out = infonce(**grouped(case | more))
    out.loss.backward()
    return out, {name: case[name].grad for name in LEAVES if name in case}


def check(parts: list, expected) -> None:
    """``parts``: every rank's (loss, prefix losses, valid rows, accuracy, score, gradients);
    ``expected``: one process.
    """
    out, gradients = expected
    w, close = len(parts), {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(
        torch.stack([part[0] for part in parts]).mean(), out.loss.detach(), **close
    )
    torch.testing.assert_close(
        torch.stack([part[1] for part in parts]).mean(0), out.prefix_losses, **close
    )
    torch.testing.assert_close(
        torch.stack([part[3] for part in parts]).mean(), out.accuracy, **close
    )
    assert all(part[2] == out.valid_rows for part in parts)
    torch.testing.assert_close(torch.cat([part[4] for part in parts]), out.positive_score, **close)
    for name, gradient in gradients.items():
        mine = [part[5][name] for part in parts]
        together = torch.cat(mine) / w if gradient.dim() else torch.stack(mine).mean(0)
        torch.testing.assert_close(
            together, gradient, **close, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "backend, exchange_name",
    [("reference", "all_gather"), *(("chunked", name) for name in EXCHANGES)],
)
def test_ranks_equal_one_process(make_case, world_size, backend, exchange_name):
    cases = []
    for (seed, options), per_row in itertools.product(enumerate(OPTIONS), (False, True)):
        cases.append(make_case(seed, *SHAPES[world_size], per_row_temperature=per_row, **options))
    cases.append(
        make_case(1, (4, 0, 3)[:world_size], (4, 0, 4)[:world_size], symmetric=True)
    )  # a rank without rows
    cases.append(make_case(1, (4, 2, 3)[:world_size], (4, 6, 4)[:world_size], masks=True))
    for case in [*cases[-1][0], cases[-1][1]]:
        case["query_valid"] = torch.zeros_like(case["query_valid"])  # no valid row anywhere

    def work(rank, _):
        exchange = EXCHANGES[exchange_name]()
        results = []
        for ranks, _ in cases:
            out, gradients = call(
                ranks[rank], exchange=exchange, backend=backend, memory_budget=1500
            )
            results.append(
                (
                    out.loss.detach(),
                    out.prefix_losses,
                    out.valid_rows,
                    out.accuracy,
                    out.positive_score,
                    gradients,
                )
            )
        return results

    for i, parts in enumerate(zip(*run_ranks(work, world_size), strict=True)):
        try:
            check(parts, call(cases[i][1], backend="reference"))
        except AssertionError as error:
            raise AssertionError(f"case {i}: {error}") from error


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_ranks_may_freeze_different_inputs(make_case, backend):
    """Collectives stay the same on all ranks, so nothing hangs, and what is not frozen is right."""
    ranks, whole = make_case(
        0, *SHAPES[2], hard=2, shared_hard_negatives=True, query_negatives=True, symmetric=True
    )
    frozen = [("queries", "hard_negatives"), ("keys", "temperature")]
    parts = run_ranks(
        lambda rank, _: call(ranks[rank], frozen[rank], exchange=AllGather(), backend=backend)[1],
        2,
        timeout=20,
    )
    _, expected = call(whole, backend="reference")
    for name in ("queries", "keys", "hard_negatives"):
        pieces = expected[name].split([len(case[name]) for case in ranks])
        for rank in range(2):
            if name in frozen[rank]:
                assert parts[rank][name] is None
            else:
                torch.testing.assert_close(parts[rank][name] / 2, pieces[rank])


@pytest.mark.parametrize("exchange_name", EXCHANGES)
def test_a_low_temperature_of_one_rank_is_everybodys_float64(make_case, exchange_name):
    """Per-row temperatures differ by rank; all of them must send and add in the same dtypes."""
    ranks, whole = make_case(
        0,
        *SHAPES[2],
        hard=2,
        shared_hard_negatives=True,
        query_negatives=True,
        symmetric=True,
        dtype=torch.float32,
    )
    whole["temperature"] = torch.cat(
        [
            torch.full((len(case["queries"]),), t)
            for case, t in zip(ranks, (0.05, 0.005), strict=True)
        ]
    )
    for case, t in zip(ranks, (0.05, 0.005), strict=True):
        case["temperature"] = torch.full((len(case["queries"]),), t)
    parts = run_ranks(
        lambda rank, _: call(ranks[rank], exchange=EXCHANGES[exchange_name](), memory_budget=1500)[
            1
        ],
        2,
        timeout=20,
    )
    _, expected = call(
        {
            name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in whole.items()
        },
        backend="reference",
    )
    for name, gradient in expected.items():
        found = torch.cat([part[name] for part in parts]).double() / 2
        assert float((found - gradient).norm() / gradient.norm()) <= 1e-6, name


def test_ranks_called_differently_are_an_error_not_a_hang(make_case):
    ranks, _ = make_case(0, *SHAPES[2])

    def work(rank, _):
        with pytest.raises(ValueError, match="ranks differ"):
            infonce(**grouped(ranks[rank] | {"symmetric": rank == 0, "exchange": AllGather()}))
        return True

    assert run_ranks(work, 2, timeout=20) == [True, True]


def test_gather_of_uneven_rows_and_its_gradient():
    sizes = [3, 0, 2]

    def work(rank, world_size):
        exchange = AllGather()
        assert isinstance(exchange, Exchange)
        assert exchange.sizes(sizes[rank]) == sizes
        x = (torch.arange(sizes[rank] * 2.0).view(-1, 2) + 10 * rank).requires_grad_()
        everyone = exchange.gather(x)
        # An upstream gradient that is not contiguous: the transposed copy of a product.
        weight = torch.arange(5.0 * 2).view(2, 5) * (rank + 1)
        upstream = weight.T
        assert not upstream.is_contiguous()
        everyone.backward(upstream)
        flags = exchange.gather(torch.tensor([rank > 0] * sizes[rank], dtype=torch.bool))
        half = exchange.gather(torch.full((sizes[rank], 1), rank, dtype=torch.bfloat16))
        total = exchange.sum(torch.tensor([1.0, rank])), exchange.max(torch.tensor([1.0, rank]))
        return everyone.detach(), x.grad, flags, half, total

    results = run_ranks(work, 3)
    own = [torch.arange(n * 2.0).view(-1, 2) + 10 * rank for rank, n in enumerate(sizes)]
    gradient = (torch.arange(10.0).view(2, 5) * (1 + 2 + 3)).T.split(sizes)
    for rank, (everyone, mine, flags, half, (total, top)) in enumerate(results):
        assert torch.equal(everyone, torch.cat(own))
        assert torch.equal(mine, gradient[rank])
        assert flags.tolist() == [False, False, False, True, True]
        assert half.flatten().tolist() == [0, 0, 0, 2, 2]
        assert total.tolist() == [3, 3] and top.tolist() == [1, 2]


@pytest.mark.parametrize("exchange_name", EXCHANGES)
def test_exchange_over_a_subgroup(make_case, exchange_name):
    """Group ranks are not global ranks: ranks 1 and 2 of three share their negatives, rank 0
    stays alone.
    """
    ranks, whole = make_case(4, *SHAPES[2], symmetric=True)

    def work(rank, _):
        group = dist.new_group([1, 2])
        if rank == 0:
            return None
        out, gradients = call(ranks[rank - 1], exchange=EXCHANGES[exchange_name](group))
        return (
            out.loss.detach(),
            out.prefix_losses,
            out.valid_rows,
            out.accuracy,
            out.positive_score,
            gradients,
        )

    check(run_ranks(work, 3)[1:], call(whole, backend="reference"))


def test_exchanges_agree_on_four_uneven_ranks(make_case):
    """Loss and gradients of every exchange, one rank at a time, to 1e-12 in float64; ranks in an
    order that is not theirs.
    """
    shapes = ((5, 3, 0, 4), (7, 4, 2, 4))
    cases = [
        make_case(i, *shapes, **options)
        for i, options in enumerate(
            ({}, {"symmetric": True, "prefixes": (3, 7)}, {"query_negatives": True})
        )
    ]

    def work(rank, _):
        group = dist.new_group([3, 1, 0, 2], sort_ranks=False)
        place = [3, 1, 0, 2].index(rank)
        results = []
        for ranks, _ in cases:
            found = {
                name: call(ranks[place], exchange=exchange(group), memory_budget=1500)
                for name, exchange in EXCHANGES.items()
            }
            results.append(
                {name: (out.loss.detach(), gradients) for name, (out, gradients) in found.items()}
            )
        return results

    for results in run_ranks(work, 4):
        for found in results:
            loss, gradients = found["all_gather"]
            for other, other_gradients in found.values():
                torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-13)
                for name, gradient in gradients.items():
                    torch.testing.assert_close(
                        other_gradients[name], gradient, rtol=1e-12, atol=1e-13
                    )


def test_grids_of_every_shape_on_six_uneven_ranks(make_case):
    """1 x 6 to 6 x 1, with a rank and with a whole node that has no rows, against all-gather;
    groups are made once.
    """
    shapes = ((5, 3, 0, 4, 2, 3), (7, 4, 2, 4, 3, 3)), ((5, 3, 0, 0, 2, 3), (6, 3, 0, 0, 3, 3))
    cases = [
        make_case(i, *shape, symmetric=True, prefixes=(3, 7), query_negatives=i == 0)[0]
        for i, shape in enumerate(shapes)
    ]

    def work(rank, _):
        grids = {columns: Grid(columns=columns) for columns in (1, 2, 3, 6)}
        assert Grid(columns=3).row is grids[3].row and Grid().row is grids[2].row
        results = []
        for ranks in cases:
            for exchange in (AllGather(), *grids.values()):
                out, gradients = call(ranks[rank], exchange=exchange, memory_budget=1500)
                results.append({"loss": out.loss.detach(), **gradients})
        return results

    for results in run_ranks(work, 6):
        for start in (0, 5):
            for found in results[start + 1 : start + 5]:
                for name, expected in results[start].items():
                    torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-13)


def test_a_row_of_the_grid_is_a_node_or_near_the_root():
    one = lambda ranks: width_of_row([7] * ranks)  # noqa: E731
    assert [one(ranks) for ranks in (1, 2, 3, 4, 6, 7, 8, 64)] == [1, 1, 1, 2, 2, 1, 2, 8]
    assert width_of_row([5, 5, 5, 5, 3, 3, 3, 3]) == 4 and width_of_row([1, 2, 3]) == 1
    assert width_of_row([5, 5, 5, 3, 3, 3, 3, 3]) == 2  # nodes of different sizes
    assert width_of_row([5, 3, 5, 3]) == 1  # neighbours in the group are on different nodes

    def work(rank, _):
        with pytest.raises(
            ValueError, match=r"columns: found 2, expected a divisor of the group's 3 ranks"
        ):
            Grid(columns=2)

    run_ranks(work, 3)


def test_bytes_between_nodes(monkeypatch):
    """What grid.py says: (r-1) shards out and r gradients back over every rank's own link to the
    next node.
    """
    rows, dim = 4, 8

    def work(rank, _):
        sent = []
        batch = dist.batch_isend_irecv

        def counting(messages):
            sent.extend(
                message.tensor.nbytes
                for message in messages
                if message.op is dist.isend and message.peer // 3 != rank // 3
            )
            return batch(messages)

        monkeypatch.setattr(dist, "batch_isend_irecv", counting)
        found = []
        for exchange in (Grid(columns=3), EXCHANGES["ring"]()):
            for accumulate in (False, True):
                sent.clear()
                for _ in exchange.stream(
                    torch.ones(rows, dim, dtype=torch.bfloat16), [rows] * 6, torch.float32
                ).shards(accumulate):
                    pass
                found.append(sum(sent) // (rows * dim * 2))
        return found

    found = run_ranks(work, 6)
    assert [x[:2] for x in found] == [[1, 1 + 2 * 2]] * 6  # r = 2; a gradient has twice the bytes
    assert [x[2:] for x in found] == [
        [5, 5 + 2 * 6] if rank in (2, 5) else [0, 0] for rank in range(6)
    ]


def test_local_exchange_is_the_default(make_case):
    _, case = make_case(0)
    assert isinstance(Local(), Exchange)
    assert torch.equal(
        infonce(**grouped(case)).loss, infonce(**grouped(case), exchange=Local()).loss
    )


def test_run_ranks_returns_in_rank_order_and_reports_the_failing_rank():
    assert run_ranks(lambda rank, world_size, x: rank * world_size + x, 3, 5) == [5, 8, 11]

    def one_fails(rank, _):
        if rank == 1:
            raise KeyError("the shard of rank one")
        dist.barrier()

    with pytest.raises(
        RankFailure, match=r"(?s)rank 1 failed.*one_fails.*the shard of rank one"
    ) as caught:
        run_ranks(one_fails, 2)
    assert isinstance(caught.value.__cause__, KeyError)


def test_run_ranks_kills_a_hang():
    start = time.monotonic()
    with pytest.raises(RankFailure, match="did not finish"):
        run_ranks(lambda rank, _: time.sleep(60 * (rank == 0)), 2, timeout=1)
    assert time.monotonic() - start < 10
