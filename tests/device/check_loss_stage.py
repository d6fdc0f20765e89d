"""What the losses ask of the device: operations, waits of the host and collectives, of one call
and of a step's patterns.

Not collected by name: test_stand_in_device.py runs this file in a process of its own. The counting
is that of benchmarks/counting.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stand_in_device import DEVICE, serve, stand_in_device
from torch import Tensor

from sailplan.config.schema import DatasetConfig, PatternConfig, ViewConfig
from sailplan.objective.infonce import InfoNCE
from sailplan.objective.protocol import EncodedStep, EncodedView, ObjectiveContext
from sailplan.objective.temperature import Temperatures
from sailplan_kernels import AllGather, LossOptions, infonce
from sailplan_kernels.arguments import grouped
from sailplan_kernels.testing import RankFailure, run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from counting import Counting, Counts

torch.set_num_threads(1)
ROWS, D, HARD, PREFIXES = 32, 64, 3, (16, 32, 64)
# Operations of forward and backward as they are now: fewer are welcome, more are not.
MOST = {
    ("rows", torch.float32): 54,
    ("rows", torch.bfloat16): 57,
    ("recipe", torch.float32): 97,
    ("recipe", torch.bfloat16): 100,
}


def call_of(kind: str, dtype: torch.dtype, rank: int, ranks: int) -> dict[str, Any]:
    """Of the row-only loss without an option, or of the recipe's: symmetric, ids, masks,
    prefixes, hard negatives of each row.
    """
    g = torch.Generator().manual_seed(rank)
    vectors = lambda *shape: torch.randn(*shape, generator=g).to(dtype).to(DEVICE).requires_grad_()  # noqa: E731
    flags = lambda *shape: torch.rand(*shape, generator=g) < 0.9  # noqa: E731
    call = {
        "queries": vectors(ROWS, D),
        "keys": vectors(ROWS, D),
        "temperature": torch.tensor(0.05).to(DEVICE).requires_grad_(),
    }
    if kind == "recipe":
        ids = torch.arange(ROWS) + rank * ROWS
        call |= {
            "query_ids": ids,
            "key_query_ids": ids,
            "key_ids": ids % 50,
            "query_valid": flags(ROWS),
            "key_valid": flags(ROWS),
        }
        call |= {
            "hard_negatives": vectors(ROWS, HARD, D),
            "hard_negative_valid": flags(ROWS, HARD),
            "symmetric": True,
            "prefixes": PREFIXES,
        }
    return call | {"sizes": [(ROWS, ROWS)] * ranks, "backend": "chunked"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind, collectives", [("rows", 2), ("recipe", 3)])
def test_a_loss_waits_for_nothing_and_meets_as_seldom_as_it_can(kind, collectives, dtype):
    """The second call of a kind: the first agrees on it. One upload carries all ids and masks."""

    def work(rank: int, ranks: int) -> tuple[Counts, Counts]:
        serve(dist.distributed_c10d._get_default_group())
        exchange, found = AllGather(), []
        with stand_in_device():
            for _ in range(2):
                call = call_of(kind, dtype, rank, ranks)
                with Counting() as counting:
                    infonce(**grouped(call), exchange=exchange).loss.backward()
                found.append(counting.counts)
        return found[0], found[1]

    for first, counts in run_ranks(work, 2):
        assert first.collectives == collectives + 1
        assert counts.waits == 0, counts.waited
        assert counts.collectives == collectives and counts.uploads <= 1
        assert counts.operations <= MOST[kind, dtype], counts.names.most_common()


VIEWS = {name: ViewConfig(modalities=["text"]) for name in ("a", "b", "c")}
PATTERNS = {
    "a_b": PatternConfig("a", "b"),
    "b_c": PatternConfig("b", "c", 0.5),
    "c_a": PatternConfig("c", "a", 2.0),
    "c_b": PatternConfig("c", "b"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("symmetric, collectives", [(False, 2), (True, 3)])
def test_patterns_that_share_views_meet_once(symmetric, collectives, dtype):
    """Collectives do not grow with patterns, a shared view is sent once, and nothing waits;
    losses are those of patterns one by one.
    """

    def work(rank: int, ranks: int) -> tuple[list[Counts], list[Tensor], list[Tensor]]:
        serve(dist.distributed_c10d._get_default_group())
        sets = {"items": DatasetConfig(views=VIEWS, patterns=PATTERNS, symmetric=symmetric)}
        exchange, g, counts = AllGather(), torch.Generator().manual_seed(rank), []
        with stand_in_device():
            objective, temperatures = (
                InfoNCE(embedding=D, datasets=sets),
                Temperatures(sets).to(DEVICE),
            )

            def run(names: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
                context = ObjectiveContext(
                    sets, exchange, temperatures, PREFIXES, "chunked", compute_dtype=dtype
                )
                leaves, views = {}, {}
                for place, name in enumerate(VIEWS):
                    host = {"host_valid": valid[name], "host_ids": torch.arange(ROWS) + 100 * place}
                    leaves[name] = vectors[name].to(DEVICE).requires_grad_()
                    views[name] = EncodedView(
                        leaves[name], valid[name].to(DEVICE), host["host_ids"].to(DEVICE), **host
                    )
                step = EncodedStep(
                    "items",
                    views,
                    {name: PATTERNS[name].weight for name in names},
                    rank_rows=(ROWS,) * ranks,
                )
                with Counting() as counting:
                    output = objective(step, context)
                    output.loss.backward()
                counts.append(counting.counts)
                return output.loss.detach().cpu(), {
                    name: leaf.grad.cpu() for name, leaf in leaves.items() if leaf.grad is not None
                }

            vectors = {name: torch.randn(ROWS, D, generator=g) for name in VIEWS}
            valid = {name: torch.rand(ROWS, generator=g) < 0.9 for name in VIEWS}
            run(list(PATTERNS))
            together = run(list(PATTERNS))
            apart = [run([name]) for name in PATTERNS]
            apart = [run([name]) for name in PATTERNS]
        summed = [sum(found[name] for _, found in apart if name in found) for name in VIEWS]
        return (
            [counts[1], counts[-1]],
            [together[0], *together[1].values()],
            [sum(loss for loss, _ in apart), *summed],
        )

    near = {"rtol": 1e-4, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 3e-2, "atol": 3e-3}
    for (several, one), together, apart in run_ranks(work, 2):
        assert several.waits == one.waits == 0, (several.waited, one.waited)
        assert several.collectives == one.collectives == collectives
        assert (
            several.collective_bytes < 3.5 * one.collective_bytes
        )  # three views, though four patterns look at four keys
        for a, b in zip(together, apart, strict=True):
            torch.testing.assert_close(a, b, **near)


def test_a_rank_that_deviates_after_the_agreement_is_an_error():
    """Its call is of a new kind, about which it asks ranks that do not answer: they are in
    another collective.
    """

    def work(rank: int, ranks: int) -> None:
        exchange, vectors = AllGather(), torch.randn(ROWS, D)
        for symmetric in (False, rank == 0):
            infonce(
                vectors,
                vectors,
                0.05,
                symmetric=symmetric,
                exchange=exchange,
                options=LossOptions(sizes=[(ROWS, ROWS)] * ranks),
            )

    with pytest.raises(RankFailure, match="failed"):
        run_ranks(work, 2, timeout=30)
