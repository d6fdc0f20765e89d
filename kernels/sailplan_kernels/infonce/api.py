"""The call: check, agree with the other ranks, run a backend, report.

Row i with query q, positive key p and temperature t pays softplus(lse_neg - cos(q, p) / t), lse_neg
the logsumexp of cos / t over its negatives; that equals -log softmax, but stays exact when the loss
is tiny and is 0, not NaN, when nothing is left of the negatives. The loss is the mean over the
valid rows of all ranks.

Convention across ranks: the MEAN over ranks of the returned losses is that full-batch loss, and the
MEAN over ranks of parameter gradients is its gradient, which is what data-parallel training
computes anyway. So each rank returns world_size * (its rows' sum) / (valid rows of all ranks), and
its embeddings receive world_size * d(full loss), the terms in which its keys were other ranks'
negatives included. Call backward on every rank, with the same factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sailplan_kernels.arguments import (
    Call,
    LossOptions,
    Masks,
    Negatives,
    PositiveIds,
    Prefixes,
    call_weights,
    with_former,
)
from sailplan_kernels.exchange import Exchange, Local
from sailplan_kernels.infonce import checks
from sailplan_kernels.infonce.forward_context import numbers
from sailplan_kernels.infonce.fused import Found, fused_losses
from sailplan_kernels.infonce.loss_inputs import LossInputs, build_inputs, gathered
from sailplan_kernels.infonce.options import InfoNCEOptions
from sailplan_kernels.infonce.reference import reference_loss
from sailplan_kernels.tiling.engines import make_engine


@dataclass(frozen=True)
class InfoNCEOutput:
    """What a call gives back.

    Losses and accuracy are this rank's shares: their mean over ranks is the full batch's.
    """

    loss: Tensor  # 0-d, differentiable
    prefix_losses: Tensor  # [P] detached, loss of each prefix, unweighted
    valid_rows: Tensor  # 0-d int64, over all ranks
    # [N] detached cosine with the positive, longest prefix; 0 for rows that do not count
    positive_score: Tensor
    # 0-d detached, fraction of all valid rows whose positive beats every negative, longest prefix
    accuracy: Tensor
    # The one that ran; "chunked + triton" where Triton ran and a kernel was refused
    # (tiling/fallback.py)
    backend: str


def infonce(
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    *,
    positives: Tensor | PositiveIds | None = None,
    negatives: Negatives | None = None,
    masks: Masks | None = None,
    key_log_probability: Tensor | None = None,
    symmetric: bool = False,
    prefixes: Prefixes | None = None,
    exchange: Exchange | None = None,
    options: LossOptions | None = None,
    **former: object,
) -> InfoNCEOutput:
    """Return InfoNCE of this rank's N queries against the keys of all ranks.

    queries [N, D], keys [M, D]: any one float dtype, not normalised. The outputs are float32
    (float64 for float64).
    temperature: number or 0-d tensor, the same on all ranks, or [N] tensor, one a row; positive.
    The gradient reaches a tensor.
    positives: int64 [N] into this rank's keys, -1 for "this row has none"; None: key i belongs to
    query i (M >= N);
        PositiveIds: by id, several a row.
    negatives, masks, options: see Negatives, Masks, LossOptions (arguments.py).
    key_log_probability: float [M], log of the probability that the key is drawn as a candidate. It
    is subtracted from the
        key's logit, as a positive and as a negative, so that frequent keys are not pushed away for
        being drawn often (sampling-bias correction, Yi et al., RecSys 2019, eq. 3). No gradient;
        the symmetric part is not corrected.
    symmetric: the average of this loss and the loss of finding the query of each row's positive
    among all queries
        (hard, query and key negatives do not take part there). The column of a key that several
        rows share has the mean of their inverse temperatures and the lowest max_cosine, and its
        margins start from its best positive.
    prefixes: Matryoshka lengths, increasing; the first d dimensions are normalised anew and pay a
    loss of their own. A
        mapping gives their weights (else 1 each); the loss is the weighted sum. None: the whole
        embedding.
    exchange: how ranks see each other's keys; None: this rank alone. All ranks must call, with
    equal options.

    former: arguments of version 0.1.0, which had a name for each (``query_valid``, ``backend``, ...).

    With ``options.sizes``, and positives by index, the host waits for nothing on the device; values
    of device tensors are the caller's word. The gradients are computed in the forward pass and wait
    for the backward pass, which may come once (of the reference: always). Raises ValueError on a
    wrong call. No valid row anywhere gives loss 0 with zero gradients.
    """
    given = dict(locals())
    exchange = given.pop("exchange")
    if given.pop("former"):
        given = with_former(given, former)
    total, (output,) = infonce_sum([given], exchange=exchange)
    return replace(output, loss=total)


def infonce_sum(
    calls: Sequence[Call],
    weights: Sequence[float] | None = None,
    *,
    exchange: Exchange | None = None,
) -> tuple[Tensor, list[InfoNCEOutput]]:
    """Return the weighted sum of several losses, such as those of a step's patterns, whose ranks
    meet once for all of them.

    calls: arguments of ``infonce`` by name, without exchange. weights: one a call; None: 1 each. A
    tensor that several calls are given is shown to the other ranks once, and its gradient comes
    home once. Returns the sum, 0-d and differentiable once (the reference: always), and the
    outputs, whose losses are unweighted and detached. Raises ValueError on a wrong call.
    """
    weights = call_weights(calls, weights)
    exchange = Local() if exchange is None else exchange
    # Under autocast the matrix products would round the logits to half precision.
    kind = calls[0]["queries"].device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        made = [_problem(exchange=exchange, **call) for call in calls]
        total: Tensor | None = None
        outputs: dict[int, InfoNCEOutput] = {}
        for chosen in dict.fromkeys(name for _, name in made):
            mine = [i for i, (_, name) in enumerate(made) if name == chosen]
            all_inputs, factors = [made[i][0] for i in mine], [weights[i] for i in mine]
            if chosen == "reference":
                part, found = _reference_losses(all_inputs, factors)
            else:
                engine = make_engine(chosen)
                part, found = fused_losses(all_inputs, engine, factors)
                chosen = engine.name
            dtype = torch.promote_types(torch.float32, all_inputs[0].gradient_dtype)
            total = part.to(dtype) if total is None else total + part.to(dtype)
            known = part.detach() if len(calls) == 1 and weights[0] == 1 else None
            outputs |= {
                i: _output(inputs, known, *one, chosen)
                for i, inputs, one in zip(mine, all_inputs, found, strict=True)
            }
    assert total is not None
    return total, [outputs[i] for i in range(len(calls))]


def _reference_losses(
    all_inputs: Sequence[LossInputs], weights: Sequence[float]
) -> tuple[Tensor, list[Found]]:
    totals, found = [], []
    for inputs, weight in zip(all_inputs, weights, strict=True):
        whole = gathered(inputs)
        loss, losses, score, correct = reference_loss(whole)
        totals.append(weight * loss)
        accuracy = (
            correct.sum()
            * inputs.exchange.world_size
            / whole.valid_rows.clamp_min(1).to(score.dtype)
        )
        found.append(
            (losses, score.detach().where(whole.row_valid, 0.0), accuracy, whole.valid_rows)
        )
    return torch.stack(totals).sum(), found


def _output(
    inputs: LossInputs,
    loss: Tensor | None,
    losses: Tensor,
    score: Tensor,
    accuracy: Tensor,
    valid_rows: Tensor,
    backend: str,
) -> InfoNCEOutput:
    """loss: the weighted sum of ``losses``, where it is known already."""
    dtype, options = inputs.gradient_dtype, inputs.options
    if loss is None:
        loss = (
            losses.sum()
            if all(w == 1 for w in options.prefix_weights)
            else (losses * numbers(options.prefix_weights, losses.dtype, losses.device)).sum()
        )
    return InfoNCEOutput(
        loss.to(dtype), losses.to(dtype), valid_rows, score.to(dtype), accuracy.to(dtype), backend
    )


def _problem(
    *,
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    exchange: Exchange,
    positives: Tensor | PositiveIds | None = None,
    negatives: Negatives | None = None,
    masks: Masks | None = None,
    key_log_probability: Tensor | None = None,
    symmetric: bool = False,
    prefixes: Prefixes | None = None,
    options: LossOptions | None = None,
) -> tuple[LossInputs, str]:
    """A call's problem, checked, and the backend that will run."""
    negatives, masks, options = negatives or Negatives(), masks or Masks(), options or LossOptions()
    checks.check_embeddings(queries, keys, negatives.hard)
    chosen = checks.choose_backend(options.backend, queries, options.score_dtype)
    checks.check_pairing(queries, keys, temperature, positives, masks)
    checks.check_log_probability(key_log_probability, len(keys), queries.device)
    checks.check_negatives(negatives, len(queries), queries.device)
    kind = InfoNCEOptions.checked(
        queries.shape[1], prefixes, options.memory_budget, negatives, symmetric
    )
    inputs = build_inputs(
        queries,
        keys,
        temperature,
        positives=positives,
        masks=masks,
        negatives=negatives,
        key_log_probability=key_log_probability,
        options=kind,
        exchange=exchange,
        backend=chosen,
        score_dtype=options.score_dtype,
        sizes=options.sizes,
    )
    return inputs, chosen
