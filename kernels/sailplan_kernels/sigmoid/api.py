"""Every pair is a yes-or-no question: is this the query's key?

Row i with positive p pays softplus(-z_ip) + sum over its negatives j of softplus(z_ij), z = cos / t
+ bias; the loss is the mean over valid rows (SigLIP, arXiv 2303.15343, eq. 1). No softmax, so no
row waits for its whole denominator.
The convention across ranks is that of infonce: the mean over ranks of losses and gradients is the
full batch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sailplan_kernels.arguments import (
    Call,
    LossOptions,
    Masks,
    Negatives,
    Prefixes,
    call_weights,
    with_former,
)
from sailplan_kernels.exchange import Exchange, Local
from sailplan_kernels.infonce import checks
from sailplan_kernels.infonce.loss_inputs import LossInputs, build_inputs, gathered
from sailplan_kernels.infonce.options import InfoNCEOptions
from sailplan_kernels.sigmoid.reference import reference_loss
from sailplan_kernels.sigmoid.tiled import Found, tiled_losses
from sailplan_kernels.tiling.engines import make_engine


@dataclass(frozen=True)
class SigmoidOutput:
    """What a call gives back.

    Losses are this rank's shares: their mean over ranks is the full batch's.
    """

    loss: Tensor  # 0-d, differentiable
    prefix_losses: Tensor  # [P] detached, loss of each prefix, unweighted
    valid_rows: Tensor  # 0-d int64, over all ranks
    # [N] detached cosine with the positive, longest prefix; 0 for rows that do not count
    positive_score: Tensor
    backend: str  # the one that ran, as of infonce


def sigmoid(
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    bias: float | Tensor,
    *,
    positives: Tensor | None = None,
    masks: Masks | None = None,
    prefixes: Prefixes | None = None,
    exchange: Exchange | None = None,
    options: LossOptions | None = None,
    **former: object,
) -> SigmoidOutput:
    """Return the sigmoid loss of this rank's N queries against the keys of all ranks.

    bias: number or 0-d tensor, added to every logit (SigLIP starts at -10 with temperature 0.1);
    the gradient reaches a tensor. All other arguments mean what they mean for infonce;
    options.memory_budget bounds the tile at work, nothing waits for a second pass. Raises
    ValueError on a wrong call.
    """
    if former:
        call = with_former({"prefixes": prefixes, "masks": masks, "options": options}, former)
        prefixes, masks, options = call["prefixes"], call["masks"], call["options"]
    total, [found] = sigmoid_sum(
        [
            {
                "queries": queries,
                "keys": keys,
                "temperature": temperature,
                "bias": bias,
                "positives": positives,
                "masks": masks,
                "prefixes": prefixes,
                "options": options,
            }
        ],
        exchange=exchange,
    )
    return replace(found, loss=total)


def sigmoid_sum(
    calls: Sequence[Call],
    weights: Sequence[float] | None = None,
    *,
    exchange: Exchange | None = None,
) -> tuple[Tensor, list[SigmoidOutput]]:
    """Return the weighted sum of several losses, such as those of a step's patterns, whose ranks
    meet once for all of them.

    calls: arguments of ``sigmoid`` by name, without exchange, of one backend. weights: one a call;
    None: 1 each. Returns the sum, 0-d and differentiable once (the reference: always), and the
    outputs, whose losses are unweighted and detached. Raises ValueError on a wrong call.
    """
    weights = call_weights(calls, weights)
    exchange = Local() if exchange is None else exchange
    with torch.autocast(calls[0]["queries"].device.type, enabled=False):
        made = [_inputs(exchange=exchange, **call) for call in calls]
        backends = {chosen for _, _, chosen in made}
        if len(backends) > 1:
            raise ValueError(
                f"calls: found backends {', '.join(sorted(backends))}, expected one of all: name "
                "it in options"
            )
        all_inputs, biases, (chosen, *_) = zip(*made, strict=True)
        if chosen == "reference":
            total, found = _reference_losses(all_inputs, biases, weights)
        else:
            engine = make_engine(chosen)
            total, found = tiled_losses(all_inputs, engine, biases, weights)
            chosen = engine.name
    outputs = [_output(inputs, *one, chosen) for inputs, one in zip(all_inputs, found, strict=True)]
    return total.to(all_inputs[0].gradient_dtype), outputs


def _inputs(
    *,
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    bias: float | Tensor,
    exchange: Exchange,
    positives: Tensor | None = None,
    masks: Masks | None = None,
    prefixes: Prefixes | None = None,
    options: LossOptions | None = None,
) -> tuple[LossInputs, Tensor, str]:
    """Check a call; return its inputs, its bias 0-d in the scores' dtype, and the backend."""
    masks, options = masks or Masks(), options or LossOptions()
    checks.check_embeddings(queries, keys, None)
    chosen = checks.choose_backend(options.backend, queries, options.score_dtype)
    checks.check_pairing(queries, keys, temperature, positives, masks)
    if isinstance(bias, Tensor) and (bias.dim() != 0 or bias.dtype not in checks.FLOATS):
        raise ValueError(
            f"bias: found {bias.dtype} {tuple(bias.shape)}, expected a number or a 0-d float tensor"
        )
    inputs = build_inputs(
        queries,
        keys,
        temperature,
        positives=positives,
        masks=masks,
        negatives=Negatives(),
        options=InfoNCEOptions.checked(queries.shape[1], prefixes, options.memory_budget),
        exchange=exchange,
        backend=f"sigmoid {chosen}",
        score_dtype=options.score_dtype,
        sizes=options.sizes,
    )
    if not isinstance(bias, Tensor):
        bias = torch.tensor(bias, dtype=torch.float64)
    return inputs, bias.to(inputs.raw_queries.device, inputs.score_dtype), chosen


def _reference_losses(
    all_inputs: Sequence[LossInputs], biases: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, list[Found]]:
    totals, found = [], []
    for inputs, bias, weight in zip(all_inputs, biases, weights, strict=True):
        whole = gathered(inputs)
        total, losses, positive_score = reference_loss(whole, bias)
        totals.append(weight * total)
        found.append((losses, positive_score.where(whole.row_valid, 0.0), whole.valid_rows))
    return torch.stack(totals).sum(), found


def _output(
    inputs: LossInputs, losses: Tensor, positive_score: Tensor, valid_rows: Tensor, backend: str
) -> SigmoidOutput:
    dtype, weights = inputs.gradient_dtype, inputs.options.prefix_weights
    paid = losses.sum() if all(w == 1 for w in weights) else losses @ losses.new_tensor(weights)
    return SigmoidOutput(
        loss=paid.to(dtype),
        prefix_losses=losses.to(dtype),
        valid_rows=valid_rows,
        positive_score=positive_score.to(dtype),
        backend=backend,
    )
