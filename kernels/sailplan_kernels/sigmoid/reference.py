"""The definition: every score is in memory at once and autograd does the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from sailplan_kernels.infonce.loss_inputs import GatheredInputs
from sailplan_kernels.infonce.masks import negatives
from sailplan_kernels.infonce.reference import gather_agreed
from sailplan_kernels.tiling.normalize import normalize
from sailplan_kernels.tiling.products import softplus


def reference_loss(inputs: GatheredInputs, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's weighted loss (0-d), loss of each prefix [P] without gradient, and the
    positives' cosines [N] of the longest.
    """
    losses, options, queries, keys = [], inputs.options, inputs.queries, inputs.keys
    for prefix in options.prefixes:
        loss, positive = _prefix_loss(
            inputs, normalize(queries[:, :prefix]), normalize(keys[:, :prefix]), bias
        )
        losses.append(loss)
    total = torch.stack(
        [weight * loss for weight, loss in zip(options.prefix_weights, losses, strict=True)]
    ).sum()
    return total, torch.stack(losses).detach(), positive.detach()


def _prefix_loss(
    inputs: GatheredInputs, queries: Tensor, keys: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """This rank's loss (0-d) and its positives' cosines [N], of one prefix.

    Arguments: normalised [N, d], [M, d].
    """
    positive = (queries * keys[inputs.positive]).sum(1)
    all_keys = gather_agreed(inputs, keys, inputs.key_sizes, inputs.needs.keys)
    cached = negatives(inputs.anchor_tags, inputs.all_keys, inputs.tags_in_use)
    inverse = inputs.row_inverse_temperature
    scores = (queries @ all_keys.T) * inverse[:, None] + bias
    against = torch.where(cached, softplus(scores), 0.0).sum(1)
    losses = softplus(-(positive * inverse + bias)) + against
    return (inputs.row_weight * losses).sum(), positive
