"""Memory follows the budget: what is alive at the same time, not only the largest tensor."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sailplan_kernels import AllGather, Grid, Ring, infonce, sigmoid
from sailplan_kernels.arguments import grouped
from sailplan_kernels.testing import run_ranks
from sailplan_kernels.tiling.products import WIDENED


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside that are alive together, at their peak; what existed
    before does not count.
    """

    def __init__(self, *before: torch.Tensor) -> None:
        super().__init__()
        self.alive: dict[int, weakref.ref] = {}
        self.known = [x.untyped_storage() for x in before]
        self.addresses = {storage.data_ptr() for storage in self.known}
        self.now = self.peak = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._see(x.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self.addresses or address in self.alive:
            return

        def gone(_: weakref.ref) -> None:
            del self.alive[address]
            self.now -= size

        self.alive[address] = weakref.ref(storage, gone)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)


@pytest.mark.parametrize(
    "options", [{}, {"symmetric": True}, {"query_negatives": True, "key_negatives": True}]
)
def test_chunked_never_holds_an_n_by_m_matrix(make_case, run, options):
    n, m, d, budget = 1024, 2048, 16, 1 << 20
    _, case = make_case(
        0,
        (n,),
        (m,),
        d,
        dtype=torch.float32,
        ids=True,
        query_ids=True,
        margin_absolute=0.1,
        **options,
    )
    with LiveBytes() as memory:
        run(case, "chunked", torch.float32, memory_budget=budget)
    assert memory.largest <= budget / 2 < n * m * 4 / 8


def test_live_bytes_counts_what_is_alive_together():
    with LiveBytes() as memory:
        a = torch.zeros(1000)
        b = a.view(10, 100)[1]
        del a
        c = torch.zeros(500)
        del b
        assert memory.now == 2000
        d = c + 1
        del c, d
    assert memory.now == 0 and memory.peak == 6000 and memory.largest == 4000


VECTOR = (
    300  # bytes of a row or key that are no embedding: tags, norms, limits, sums, of three prefixes
)


def peak_of(case: dict, leaves: dict, **more) -> LiveBytes:
    """Of forward and backward, beyond what was given."""
    with LiveBytes(*(x for x in case.values() if isinstance(x, torch.Tensor))) as memory:
        infonce(**grouped({**case, **leaves, "backend": "chunked", **more})).loss.backward()
    for x in leaves.values():
        x.grad = None
    return memory


@pytest.mark.parametrize("d", [16, 256], ids=["scores weigh more", "vectors weigh more"])
@pytest.mark.parametrize(
    "options, more_vectors",
    [
        ({}, 0),
        ({"symmetric": True, "ids": True, "query_ids": True, "margin_absolute": 0.1}, 0),
        ({"prefixes": (4, 8, 16)}, 0),
        ({"query_negatives": True, "key_negatives": True}, 3),
    ],
    ids=["rows", "symmetric", "prefixes", "more negatives"],
)
def test_the_peak_is_gradients_and_a_budget(make_case, options, more_vectors, d):
    """Forward and backward together, from 256 KiB to the N x M matrix's own size: the gradients
    once, and one budget.

    No normalised copy, no second gradient in the backward pass. ``more_vectors`` of size N x D: key
    negatives have the positives as anchors and their gradient, query negatives the queries'
    gradient as candidates.
    """
    n, m = 1024, 1024
    _, case = make_case(0, (n,), (m,), d, dtype=torch.float32, **options)
    leaves = {name: case[name].requires_grad_() for name in ("queries", "keys", "temperature")}
    peaks = {}
    for budget in (2**18, 2**20, 2**22):
        memory = peak_of(case, leaves, memory_budget=budget)
        peaks[budget] = memory.peak
        assert memory.peak <= (n + m + more_vectors * n) * d * 4 + budget + VECTOR * (n + m)
        assert memory.largest <= max(budget / 2, n * d * 4) < n * m * 4
    assert peaks[2**20] - peaks[2**18] <= 2**20 and peaks[2**22] - peaks[2**18] <= 2**22
    assert peaks[2**22] - peaks[2**18] > 2**20, "a larger budget is not used at all"


@pytest.mark.parametrize(
    "options",
    [{}, {"symmetric": True}, {"prefixes": (4, 8, 16)}],
    ids=["rows", "symmetric", "prefixes"],
)
def test_the_peak_with_scores_in_float64(make_case, options):
    """At a low temperature: gradients stay float32, operands are widened a block at a time."""
    n, m, d = 1024, 1024, 256
    _, case = make_case(0, (n,), (m,), d, dtype=torch.float32, temperature=0.01, **options)
    leaves = {name: case[name].requires_grad_() for name in ("queries", "keys", "temperature")}
    for budget in (2**18, 2**20, 2**22):
        memory = peak_of(case, leaves, memory_budget=budget)
        assert memory.peak <= (n + m) * d * 4 + budget + 2 * VECTOR * (n + m) + 2 * WIDENED * d * 8


@pytest.mark.parametrize("prefixes", [None, (4, 8, 16)])
def test_the_sigmoid_loss_follows_the_budget(make_case, prefixes):
    n, m, d = 1024, 1024, 16
    _, case = make_case(
        0, (n,), (m,), d, dtype=torch.float32, ids=True, query_ids=True, prefixes=prefixes
    )
    leaves = {name: case[name].requires_grad_() for name in ("queries", "keys", "temperature")}
    peaks = {}
    for budget in (2**18, 2**20, 2**22):
        with LiveBytes(*(x for x in case.values() if isinstance(x, torch.Tensor))) as memory:
            sigmoid(
                **grouped(
                    {**case, **leaves, "bias": -3.0, "backend": "chunked", "memory_budget": budget}
                )
            ).loss.backward()
        for x in leaves.values():
            x.grad = None
        peaks[budget] = memory.peak
        assert (
            memory.peak <= (n + m) * d * 4 + budget + VECTOR * (n + m)
            and memory.largest < n * m * 4
        )
    assert 2**20 < peaks[2**22] - peaks[2**18] <= 2**22


def test_the_peak_without_a_budget_and_of_half_precision(make_case):
    n, m, d = 4096, 4096, 64
    _, case = make_case(0, (n,), (m,), d, dtype=torch.float32)
    leaves = {name: case[name].requires_grad_() for name in ("queries", "keys")}
    assert peak_of(case, leaves).peak <= (n + m) * d * 4 + 2**24 + VECTOR * (n + m) < n * m * 4 / 2
    halves = {name: x.detach().bfloat16().requires_grad_() for name, x in leaves.items()}
    # Normalised in float32, as a CPU multiplies; the gradient in float32, and what is handed out.
    assert peak_of({**case, **halves}, halves, memory_budget=2**20).peak <= (n + m) * d * (
        4 + 4 + 2
    ) + 2**20 + VECTOR * (n + m)


def test_the_reference_holds_more_than_a_matrix(make_case):
    """The measure is able to see what it rules out."""
    _, case = make_case(0, (1024,), (1024,), 16, dtype=torch.float32)
    case["queries"].requires_grad_()
    with LiveBytes(*(x for x in case.values() if isinstance(x, torch.Tensor))) as memory:
        infonce(**grouped(case | {"backend": "reference"})).loss.backward()
    assert memory.largest >= 1024 * 1024 * 4 and memory.peak > 3 * 1024 * 1024 * 4


def test_what_each_exchange_keeps():
    """A stream's round with gradients on six ranks, in shards: what exchange/grid.py says,
    gloo's copy, and a message that is under way.
    """
    rows, dim = 256, 64
    shard = rows * dim * 4

    def work(rank, world_size):
        peaks = []
        for exchange in (AllGather(), Ring(), Grid(columns=2), Grid(columns=3)):
            x = torch.ones(rows, dim)
            with LiveBytes(x) as memory:
                stream = exchange.stream(x, [rows] * world_size, torch.float32)
                for part in stream.shards(accumulate=True):
                    part.gradient.add_(part.vectors)
                    del part
                home = stream.finish()
            assert torch.equal(home, torch.full_like(x, world_size))
            peaks.append(memory.peak / shard)
        return peaks

    for whole, ring, two, three in run_ranks(work, 6):
        assert (
            whole >= 6 + 6
            and ring <= 2 + 3
            and two <= (2 + 2) + (2 + 3) + 2 + 1
            and three <= (3 + 2) + (3 + 3) + 3 + 1
        )
