"""Random InfoNCE problems, whole and cut into ranks, and a call with its gradients."""

from __future__ import annotations

import pytest
import torch

from sailplan_kernels import infonce
from sailplan_kernels.arguments import grouped

torch.set_num_threads(1)

LEAVES = ("queries", "keys", "hard_negatives", "temperature")


@pytest.fixture(scope="session")
def make_case():
    """The builder of random problems: see _make_case."""
    return _make_case


def _make_case(
    seed: int,
    rows=(6,),
    keys=(8,),
    dim=7,
    *,
    hard=0,
    ids=False,
    query_ids=False,
    masks=False,
    positives=False,
    per_row_temperature=False,
    sampling=False,
    per_row_threshold=False,
    by_id=False,
    temperature=0.1,
    noise=0.8,
    dtype=torch.float64,
    **options,
) -> tuple[list[dict], dict]:
    """Arguments of infonce for each rank, and for one process that holds everything.

    Trained-like: a positive key is its query plus noise. ``positives`` gives indices with
    repetitions and a -1; ``by_id`` wants ids that several keys of any rank, or none, carry.
    """
    g = torch.Generator().manual_seed(seed)
    ranks = []
    for n, m in zip(rows, keys, strict=True):
        index = torch.arange(n)
        if positives:
            index = torch.randint(0, m, (n,), generator=g) if m else index
            if n > 3:
                index[2] = -1
        case = {"queries": torch.randn(n, dim, generator=g, dtype=torch.float64)}
        key = torch.randn(m, dim, generator=g, dtype=torch.float64)
        for i in range(n):
            if index[i] >= 0:
                key[index[i]] = case["queries"][i] + noise * torch.randn(
                    dim, generator=g, dtype=torch.float64
                )
        case["keys"] = key
        if positives:
            case["positives"] = index
        if hard:
            case["hard_negatives"] = torch.randn(n, hard, dim, generator=g, dtype=torch.float64)
            if masks:
                case["hard_negative_valid"] = torch.rand(n, hard, generator=g) < 0.7
        if ids:
            case["key_ids"] = torch.randint(-1, 6, (m,), generator=g)
        if query_ids:
            case["query_ids"] = torch.randint(-1, 6, (n,), generator=g)
            if positives:
                case["key_query_ids"] = torch.randint(-1, 6, (m,), generator=g)
        if masks:
            case["query_valid"] = torch.rand(n, generator=g) < 0.8
            case["key_valid"] = torch.rand(m, generator=g) < 0.8
        if sampling:
            case["key_log_probability"] = (
                torch.rand(m, generator=g, dtype=torch.float64).add(0.01).log()
            )
        if per_row_temperature:
            case["temperature"] = temperature * (
                0.5 + torch.rand(n, generator=g, dtype=torch.float64)
            )
        if by_id:
            case["key_ids"] = torch.randint(-1, 5, (m,), generator=g)
            case["positive_ids"] = torch.randint(-1, 7, (n,), generator=g)
            if query_ids:
                case["key_query_ids"] = torch.randint(-1, 6, (m,), generator=g)
        if per_row_threshold:
            case["max_cosine"] = torch.rand(n, generator=g, dtype=torch.float64) + torch.where(
                torch.arange(n) % 3 == 1, torch.inf, 0.0
            )
        case = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.items()}
        ranks.append(case)
    whole = {name: torch.cat([case[name] for case in ranks]) for name in ranks[0]}
    if by_id:
        for case in [*ranks, whole]:
            case.setdefault("temperature", torch.tensor(temperature, dtype=dtype))
            case.update(options)
        return ranks, whole
    offsets = [sum(keys[:r]) for r in range(len(keys))]
    own = [case.get("positives", torch.arange(n)) for case, n in zip(ranks, rows, strict=True)]
    whole["positives"] = torch.cat(
        [torch.where(p >= 0, p + o, -1) for p, o in zip(own, offsets, strict=True)]
    )
    for case in [*ranks, whole]:
        case.setdefault("temperature", torch.tensor(temperature, dtype=dtype))
        case.update(options)
    return ranks, whole


@pytest.fixture(scope="session")
def run():
    """A call of a backend and its gradients: see _run."""
    return _run


def _run(case: dict, backend: str, dtype=torch.float64, upstream=1.0, frozen=(), **more):
    """The output and the gradients of all leaves."""
    case = dict(case)
    for name in LEAVES:
        if isinstance(case.get(name), torch.Tensor):
            case[name] = case[name].detach().to(dtype).clone().requires_grad_(name not in frozen)
    out = infonce(**grouped(case | more | {"backend": backend}))
    (out.loss * upstream).backward()
    return out, {
        name: case[name].grad for name in LEAVES if isinstance(case.get(name), torch.Tensor)
    }
