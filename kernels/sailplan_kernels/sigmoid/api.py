"""Every pair is a yes-or-no question: is this the query's key?

Row i with positive p pays softplus(-z_ip) + sum over its negatives j of softplus(z_ij), z = cos / t
+ bias; the loss is the mean over valid rows (SigLIP, arXiv 2303.15343, eq. 1). No softmax, so no
row waits for its whole denominator.
The convention across ranks is that of infonce: the mean over ranks of losses and gradients is the
full batch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sailplan_kernels.arguments import LossOptions, Masks, Negatives, Prefixes, with_former
from sailplan_kernels.exchange import Exchange, Local
from sailplan_kernels.infonce import checks
from sailplan_kernels.infonce.loss_inputs import build_inputs, gathered
from sailplan_kernels.infonce.options import InfoNCEOptions
from sailplan_kernels.sigmoid.reference import reference_loss
from sailplan_kernels.sigmoid.tiled import tiled_loss
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
    **former: Any,
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
    masks, options = masks or Masks(), options or LossOptions()
    checks.check_embeddings(queries, keys, None)
    chosen = checks.choose_backend(options.backend, queries, options.score_dtype)
    checks.check_pairing(queries, keys, temperature, positives, masks)
    if isinstance(bias, Tensor) and (bias.dim() != 0 or bias.dtype not in checks.FLOATS):
        raise ValueError(
            f"bias: found {bias.dtype} {tuple(bias.shape)}, expected a number or a 0-d float tensor"
        )
    with torch.autocast(queries.device.type, enabled=False):
        inputs = build_inputs(
            queries,
            keys,
            temperature,
            positives=positives,
            masks=masks,
            negatives=Negatives(),
            options=InfoNCEOptions.checked(queries.shape[1], prefixes, options.memory_budget),
            exchange=Local() if exchange is None else exchange,
            backend=f"sigmoid {chosen}",
            score_dtype=options.score_dtype,
            sizes=options.sizes,
        )
        if not isinstance(bias, Tensor):
            bias = torch.tensor(bias, dtype=torch.float64)
        bias = bias.to(inputs.raw_queries.device, inputs.score_dtype)
        if chosen == "reference":
            whole = gathered(inputs)
            total, losses, positive_score = reference_loss(whole, bias)
            positive_score, valid_rows = (
                positive_score.where(whole.row_valid, 0.0),
                whole.valid_rows,
            )
        else:
            engine = make_engine(chosen)
            total, losses, positive_score, valid_rows = tiled_loss(inputs, engine, bias)
            chosen = engine.name
    return SigmoidOutput(
        loss=total.to(inputs.gradient_dtype),
        prefix_losses=losses.to(inputs.gradient_dtype),
        valid_rows=valid_rows,
        positive_score=positive_score.to(inputs.gradient_dtype),
        backend=chosen,
    )
