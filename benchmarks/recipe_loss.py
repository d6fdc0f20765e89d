"""The loss that a training step of the recipe asks for, and the nearest that each peer has.

In both directions, ids that mask what is no negative, three Matryoshka prefixes, hard negatives of
each row. No peer has all of
it: a contender's name says what it leaves out, and its gradient is compared with the definition
that leaves out the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sailplan_kernels import infonce
from sailplan_kernels.arguments import grouped
from sailplan_kernels.tiling.engines import triton_schedule

Case = dict[str, Any]
HARD = 4
ALL = frozenset({"ids", "hard", "symmetric"})


def prefixes(dimension: int) -> tuple[int, int, int]:
    return dimension // 4, dimension // 2, dimension


@lru_cache(maxsize=2)
def _extras(
    rows: int, dimension: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Ids that repeat (eight of a kind) and hard negatives, the same for everybody."""
    g = torch.Generator().manual_seed(1)
    query_ids, key_ids = (
        torch.randint(0, max(rows // 8, 2), (rows,), generator=g).to(device) for _ in range(2)
    )
    hard = torch.randn(rows, HARD, dimension, generator=g).to(device, dtype)
    return {"query_ids": query_ids, "key_ids": key_ids, "hard": hard}


def arguments(q: Tensor, case: Case, parts: frozenset[str]) -> dict[str, Any]:
    """Of `infonce`, for the parts of the loss that a contender has."""
    extras = _extras(
        len(q),
        q.shape[1],
        q.device,
        q.dtype if q.dtype is not torch.float64 else getattr(torch, case["dtype"]),
    )
    call: dict[str, Any] = {"symmetric": "symmetric" in parts, "prefixes": prefixes(q.shape[1])}
    if "ids" in parts:
        call |= {
            "query_ids": extras["query_ids"],
            "key_query_ids": extras["query_ids"],
            "key_ids": extras["key_ids"],
        }
    if "hard" in parts:
        call["hard_negatives"] = extras["hard"].to(q.dtype).detach().requires_grad_()
    return call


def definition(q: Tensor, k: Tensor, case: Case, parts: frozenset[str]) -> None:
    infonce(
        q, k, case["temperature"], **grouped(arguments(q, case, parts) | {"backend": "reference"})
    ).loss.backward()


def ours(backend: str, schedule: str = "auto") -> Callable[[Tensor, Tensor, Case], None]:
    def step(q: Tensor, k: Tensor, case: Case) -> None:
        with triton_schedule(schedule):
            loss = infonce(
                q, k, case["temperature"], **grouped(arguments(q, case, ALL) | {"backend": backend})
            ).loss
        loss.backward()

    return step


def plain(q: Tensor, k: Tensor, case: Case) -> None:
    definition(q, k, case, ALL)


def memeff_both_directions(q: Tensor, k: Tensor, case: Case) -> None:
    from memeff import MemoryEfficientMatryoshkaCLIPLoss

    MemoryEfficientMatryoshkaCLIPLoss(
        prefixes(q.shape[1]), temperature=case["temperature"], stable=False
    )(q, k).backward()


def memeff_hard_negatives(q: Tensor, k: Tensor, case: Case) -> None:
    from memeff import MemoryEfficientMatryoshkaQwen3Loss

    loss = MemoryEfficientMatryoshkaQwen3Loss(
        prefixes(q.shape[1]), temperature=case["temperature"], stable=False, margin=2.0
    )
    loss(q, k, arguments(q, case, frozenset({"hard"}))["hard_negatives"]).backward()


def sentence_transformers(rows: int) -> Callable[[Tensor, Tensor, Case], None]:
    """Its loss stage, once for each prefix, as its MatryoshkaLoss runs it; the embeddings are
    cut and not encoded anew.
    """

    def step(q: Tensor, k: Tensor, case: Case) -> None:
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
        )

        encoder = torch.nn.Sequential(torch.nn.Identity())  # the loss stage never calls it
        loss = CachedMultipleNegativesRankingLoss(
            encoder,
            scale=1 / case["temperature"],
            mini_batch_size=rows,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )
        reps = [[part.detach().requires_grad_() for part in x.split(rows)] for x in (q, k)]
        for prefix in prefixes(q.shape[1]):
            loss.calculate_loss(
                [[F.normalize(part[:, :prefix], dim=1) for part in parts] for parts in reps],
                with_backward=True,
            )
        q.grad, k.grad = (torch.cat([part.grad for part in parts]) for parts in reps)

    return step


# name: (step, module that it needs, whether it needs CUDA, parts of the loss that it has)
CONTENDERS: dict[str, tuple[Callable[..., None], str | None, bool, frozenset[str]]] = {
    "ours, chunked": (ours("chunked"), None, False, ALL),
    "ours, triton": (ours("triton"), "triton", True, ALL),
    "ours, triton, without persistent kernels": (ours("triton", "tiles"), "triton", True, ALL),
    "plain torch (the definition)": (plain, None, False, ALL),
    "memeff, without ids and hard negatives": (
        memeff_both_directions,
        "memeff",
        True,
        frozenset({"symmetric"}),
    ),
    "memeff, rows alone, without ids": (memeff_hard_negatives, "memeff", True, frozenset({"hard"})),
    "sentence-transformers, cached, mini-batch 512, without ids and hard negatives": (
        sentence_transformers(512),
        "sentence_transformers",
        False,
        frozenset({"symmetric"}),
    ),
}
