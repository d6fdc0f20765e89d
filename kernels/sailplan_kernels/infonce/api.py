"""The call: check, agree with the other ranks, run a backend, report.

Row i with query q, positive key p and temperature t pays softplus(lse_neg - cos(q, p) / t), lse_neg the logsumexp of
cos / t over its negatives; that equals -log softmax, but stays exact when the loss is tiny and is 0, not NaN, when
nothing is left of the negatives. The loss is the mean over the valid rows of all ranks.

Convention across ranks: the MEAN over ranks of the returned losses is that full-batch loss, and the MEAN over ranks
of parameter gradients is its gradient, which is what data-parallel training computes anyway. So each rank returns
world_size * (its rows' sum) / (valid rows of all ranks), and its embeddings receive world_size * d(full loss), the
terms in which its keys were other ranks' negatives included. Call backward on every rank, with the same factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sailplan_kernels.exchange import Exchange, Local
from sailplan_kernels.infonce import checks
from sailplan_kernels.infonce.fused import Found, fused_losses
from sailplan_kernels.infonce.options import InfoNCEOptions
from sailplan_kernels.infonce.problem import Problem, build_problem, gathered
from sailplan_kernels.infonce.reference import reference_loss
from sailplan_kernels.infonce.setting import numbers
from sailplan_kernels.tiling.engines import make_engine


@dataclass(frozen=True)
class InfoNCEOutput:
    """What a call gives back. Losses and accuracy are this rank's shares: their mean over ranks is the full batch's."""

    loss: Tensor  # 0-d, differentiable
    prefix_losses: Tensor  # [P] detached, loss of each prefix, unweighted
    valid_rows: Tensor  # 0-d int64, over all ranks
    positive_score: Tensor  # [N] detached cosine with the positive, longest prefix; 0 for rows that do not count
    accuracy: Tensor  # 0-d detached, fraction of all valid rows whose positive beats every negative, longest prefix
    backend: str  # the one that ran; "chunked + triton" where Triton ran and a kernel was refused (tiling/fallback.py)


def infonce(
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    *,
    positives: Tensor | None = None,
    positive_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_query_ids: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    hard_negative_valid: Tensor | None = None,
    shared_hard_negatives: bool = False,
    query_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
    key_log_probability: Tensor | None = None,
    max_negative_score: float | Tensor | None = None,
    margin_absolute: float | None = None,
    margin_relative: float | None = None,
    symmetric: bool = False,
    query_negatives: bool = False,
    key_negatives: bool = False,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Sequence[float] | None = None,
    exchange: Exchange | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
    score_dtype: torch.dtype | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> InfoNCEOutput:
    """InfoNCE of this rank's N queries against the keys of all ranks.

    queries [N, D], keys [M, D]: any one float dtype, not normalised. The outputs are float32 (float64 for float64).
    temperature: number or 0-d tensor, the same on all ranks, or [N] tensor, one a row; positive. The gradient reaches a tensor.
    positives: int64 [N] into this rank's keys, -1 for "this row has none"; None: key i belongs to query i (M >= N).
    positive_ids: int64 [N] instead of positives, -1 for none: every valid key of ANY rank whose key_ids entry equals it is a
        positive. The row pays the mean over its positives p of softplus(lse_neg - cos(q, p) / t), its other positives
        neither pulling p's denominator up nor being pushed (supervised contrastive, Khosla et al., NeurIPS 2020, eq. 2,
        with the positives left out of the denominator). A row without a positive does not count. Margins start from
        the row's best positive, which also decides the accuracy; positive_score is the mean. With symmetric the mean is
        over the pairs' two losses; queries that want the key's id are no negatives of its column, and the column's
        temperature, margins and threshold come from all rows of all ranks that want it. With key_negatives each pair has a
        denominator of its own: the row's negatives and the keys scored against this positive. With query_ids it needs
        key_query_ids.
    query_ids [N], key_ids [M], key_query_ids [M]: int64, -1 for none. A key with the id of the row's positive, or
        whose paired query has the row's query id, is no negative of that row. key_query_ids says each key's paired
        query id; by default the query that points to the key (the highest id where several do).
    hard_negatives [N, H, D], hard_negative_valid bool [N, H]: the row's own negatives; with shared_hard_negatives
        everybody's. They carry no ids. Those of an invalid query do not count.
    query_valid [N], key_valid [M]: bool; False is padding, whatever it holds. A row counts if it and its positive
        are valid.
    key_log_probability: float [M], log of the probability that the key is drawn as a candidate. It is subtracted from the
        key's logit, as a positive and as a negative, so that frequent keys are not pushed away for being drawn often
        (sampling-bias correction, Yi et al., RecSys 2019, eq. 3). No gradient; the symmetric part is not corrected.
    max_negative_score, margin_absolute, margin_relative: drop negatives that look like false ones, by cosine (see
        InfoNCEOptions). max_negative_score: a number, or a float tensor [N], one a row (infinity: no limit), where rows come
        from several data sets; ranks may then differ in values, not in whether it is a tensor.
    symmetric: the average of this loss and the loss of finding the query of each row's positive among all queries
        (hard, query and key negatives do not take part there). The column of a key that several rows share has the
        mean of their inverse temperatures and the lowest max_negative_score, and its margins start from its best positive.
    query_negatives, key_negatives: other queries, scored against the query, and other keys, scored against the
        positive, join the row's denominator.
    prefixes, prefix_weights: Matryoshka; the first d dimensions are normalised anew and pay a loss of their own; the
        loss is the weighted sum (weights 1).
    exchange: how ranks see each other's keys; None: this rank alone. All ranks must call, with equal options.
    backend: "reference" (the definition, N x M memory), "chunked" (torch, gradient in the forward), "triton"; "auto"
        takes triton for half-precision inputs on CUDA where it can run, else chunked. The output says which one ran.
    memory_budget: bytes that the scores in memory may take (chunked, triton): rows of a chunk, and how many tiles wait
        for their gradient instead of being computed again. None: half of what the gradients of the queries and of the keys
        in memory take, at least 16 MiB; a loss that fits into 32 MiB is then one tile. The gradients are computed in the
        forward pass and wait for the backward pass, which may come once.
    score_dtype: float32 or float64, of scores until they are probabilities; matrix products of gradients stay in the inputs'
        dtype. None: float64 for float64 inputs, and for float32 inputs with any temperature below 0.02 on a CPU or a CUDA
        device with full-rate float64, as float32 logits may then cost the gradient more than 1e-5; else float32. Triton's are float32.

    sizes: (N, M) of every rank, in rank order, where all ranks know them; None: the ranks ask each other in each call, which is a
        collective and a wait of the host.

    Integers and masks may be on the CPU whatever the device of the embeddings: they are combined there and uploaded in one copy. With
    ``sizes``, and positives by index, the host waits for nothing on the device; values of device tensors are the caller's word.
    Raises ValueError on a wrong call. No valid row anywhere gives loss 0 with zero gradients.
    """
    given = dict(locals())
    shared = {name: given.pop(name) for name in ("exchange", "backend")}
    total, (output,) = infonce_sum([given], **shared)
    return replace(output, loss=total)


def infonce_sum(
    calls: Sequence[Mapping[str, Any]], weights: Sequence[float] | None = None, *, exchange: Exchange | None = None, backend: str = "auto"
) -> tuple[Tensor, list[InfoNCEOutput]]:
    """The weighted sum of several losses, such as those of a step's patterns, whose ranks meet once for all of them.

    calls: arguments of ``infonce`` by name, without exchange and backend. weights: one a call; None: 1 each. A tensor that several
    calls are given is shown to the other ranks once, and its gradient comes home once. Returns the sum, 0-d and differentiable once
    (the reference: always), and the outputs, whose losses are unweighted and detached. Raises ValueError on a wrong call.
    """
    if not calls or (weights is not None and len(weights) != len(calls)):
        raise ValueError(f"calls: found {len(calls)} with {'no' if weights is None else len(weights)} weights, expected one a call, at least one")
    exchange = Local() if exchange is None else exchange
    weights = [1.0] * len(calls) if weights is None else [float(weight) for weight in weights]
    if any(not weight >= 0 for weight in weights):
        raise ValueError(f"weights: found {weights}, expected none below 0")
    # Under autocast the matrix products would round the logits to half precision.
    with torch.autocast(calls[0]["queries"].device.type, enabled=False):
        made = [_problem(exchange=exchange, backend=backend, **call) for call in calls]
        total: Tensor | None = None
        outputs: dict[int, InfoNCEOutput] = {}
        for chosen in dict.fromkeys(name for _, name in made):
            mine = [i for i, (_, name) in enumerate(made) if name == chosen]
            problems, factors = [made[i][0] for i in mine], [weights[i] for i in mine]
            if chosen == "reference":
                part, found = _reference_losses(problems, factors)
            else:
                engine = make_engine(chosen)
                part, found = fused_losses(problems, engine, factors)
                chosen = engine.name
            dtype = torch.promote_types(torch.float32, problems[0].gradient_dtype)
            total = part.to(dtype) if total is None else total + part.to(dtype)
            known = part.detach() if len(calls) == 1 and weights[0] == 1 else None
            outputs |= {i: _output(problem, known, *one, chosen) for i, problem, one in zip(mine, problems, found, strict=True)}
    assert total is not None
    return total, [outputs[i] for i in range(len(calls))]


def _reference_losses(problems: Sequence[Problem], weights: Sequence[float]) -> tuple[Tensor, list[Found]]:
    totals, found = [], []
    for problem, weight in zip(problems, weights, strict=True):
        whole = gathered(problem)
        loss, losses, score, correct = reference_loss(whole)
        totals.append(weight * loss)
        accuracy = correct.sum() * problem.exchange.world_size / whole.valid_rows.clamp_min(1).to(score.dtype)
        found.append((losses, score.detach().where(whole.row_valid, 0.0), accuracy, whole.valid_rows))
    return torch.stack(totals).sum(), found


def _output(
    problem: Problem, loss: Tensor | None, losses: Tensor, score: Tensor, accuracy: Tensor, valid_rows: Tensor, backend: str
) -> InfoNCEOutput:
    """loss: the weighted sum of ``losses``, where it is known already."""
    dtype, options = problem.gradient_dtype, problem.options
    if loss is None:
        loss = losses.sum() if all(w == 1 for w in options.prefix_weights) else (losses * numbers(options.prefix_weights, losses.dtype, losses.device)).sum()
    return InfoNCEOutput(loss.to(dtype), losses.to(dtype), valid_rows, score.to(dtype), accuracy.to(dtype), backend)


def _problem(
    *,
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    exchange: Exchange,
    backend: str,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Sequence[float] | None = None,
    memory_budget: int | None = None,
    score_dtype: torch.dtype | None = None,
    symmetric: bool = False,
    query_negatives: bool = False,
    key_negatives: bool = False,
    shared_hard_negatives: bool = False,
    margin_absolute: float | None = None,
    margin_relative: float | None = None,
    **given: Any,
) -> tuple[Problem, str]:
    """A call's problem, checked, and the backend that will run."""
    hard, highest, valid = (given.get(name) for name in ("hard_negatives", "max_negative_score", "hard_negative_valid"))
    checks.check_embeddings(queries, keys, hard)
    chosen = checks.choose_backend(backend, queries, score_dtype)
    named = ("positives", "query_ids", "key_ids", "key_query_ids", "query_valid", "key_valid", "positive_ids")
    checks.check_pairing(queries, keys, temperature, *(given.get(name) for name in named))
    checks.check_log_probability(given.get("key_log_probability"), len(keys), queries.device)
    checks.check_highest(highest, len(queries), queries.device)
    if hard is not None:
        checks.check_vector("hard_negative_valid", valid, hard.shape[:2], torch.bool, queries.device)
    elif valid is not None:
        raise ValueError("hard_negative_valid: found without hard_negatives, expected both")
    elif shared_hard_negatives:
        raise ValueError("shared_hard_negatives: found True without hard_negatives, expected both")
    options = InfoNCEOptions.checked(
        queries.shape[1],
        prefixes,
        prefix_weights,
        memory_budget,
        max_negative_score=True if isinstance(highest, Tensor) else highest,
        margin_absolute=margin_absolute,
        margin_relative=margin_relative,
        symmetric=symmetric,
        query_negatives=query_negatives,
        key_negatives=key_negatives,
        shared_hard_negatives=shared_hard_negatives,
    )
    arguments = {name: None for name in (*named, "hard_negatives", "hard_negative_valid")} | given
    return build_problem(queries, keys, temperature, **arguments, options=options, exchange=exchange, backend=chosen, score_dtype=score_dtype), chosen
