"""The definition: every score is in memory at once and autograd does the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from sailplan_kernels.infonce.masks import negatives
from sailplan_kernels.infonce.problem import GatheredProblem
from sailplan_kernels.infonce.reference import gather_agreed
from sailplan_kernels.tiling.normalize import normalize
from sailplan_kernels.tiling.products import softplus


def reference_loss(problem: GatheredProblem, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's weighted loss (0-d), loss of each prefix [P] without gradient, and the positives' cosines [N] of the longest."""
    losses, options, queries, keys = [], problem.options, problem.queries, problem.keys
    for prefix in options.prefixes:
        loss, positive = _prefix_loss(problem, normalize(queries[:, :prefix]), normalize(keys[:, :prefix]), bias)
        losses.append(loss)
    total = torch.stack([weight * loss for weight, loss in zip(options.prefix_weights, losses, strict=True)]).sum()
    return total, torch.stack(losses).detach(), positive.detach()


def _prefix_loss(problem: GatheredProblem, queries: Tensor, keys: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's loss (0-d) and its positives' cosines [N], of one prefix. Arguments: normalised [N, d], [M, d]."""
    positive = (queries * keys[problem.positive]).sum(1)
    all_keys = gather_agreed(problem, keys, problem.key_sizes, problem.needs.keys)
    keep = negatives(problem.anchor_tags, problem.all_keys, problem.tags_in_use)
    inverse = problem.row_inverse_temperature
    scores = (queries @ all_keys.T) * inverse[:, None] + bias
    against = torch.where(keep, softplus(scores), 0.0).sum(1)
    losses = softplus(-(positive * inverse + bias)) + against
    return (problem.row_weight * losses).sum(), positive
