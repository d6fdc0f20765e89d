"""The columns of the symmetric loss, chunk by chunk over the rows.

Column j belongs to key j; the queries of all ranks are its candidates, the rows that point to it its positives, and
their own rank holds both. Pass one keeps a running (max, sum) per column over this rank's rows, merges it over ranks,
and knows from it the loss and the coefficient of every column; pass two adds each chunk's share of the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sailplan_kernels.exchange import Exchange
from sailplan_kernels.infonce.masks import best_per_key, drop_by_score, negatives
from sailplan_kernels.infonce.options import InfoNCEOptions
from sailplan_kernels.infonce.problem import Problem
from sailplan_kernels.infonce.products import product


@dataclass
class Columns:
    """Per column of all ranks' keys [C], and per row of this rank [N]."""

    options: InfoNCEOptions
    inverse_temperature: Tensor  # [C]
    best_positive: Tensor  # [C] where margins start
    log_negatives: Tensor  # [C] logsumexp over the column's negatives, 0 where there are none
    push: Tensor  # [C] sum of weight * sigmoid over the rows pointing to the column
    row_push: Tensor  # [N] this row's own weight * sigmoid in its positive's column
    row_inverse: Tensor  # [N] its positive's column's inverse temperature
    positive: Tensor  # [N]
    loss: Tensor  # 0-d, this rank's columns
    moment: Tensor  # [C] accumulates sum over rows of probability * cosine
    index: Tensor  # [N] the row's positive among this rank's keys

    def mask(self, keep: Tensor, query_valid: Tensor, cosine: Tensor) -> Tensor:
        """Rows that are negatives of each column, from ``keep``, the rows' own mask before any look at scores."""
        # The rows' mask has cleared invalid keys as well; their columns have no weight anyway.
        keep = keep & query_valid[:, None]
        drop_by_score(keep, cosine, self.best_positive, self.options, dim=1)
        return keep

    def add_gradient(self, target: Tensor, cosine: Tensor, keep: Tensor, rows: slice, temperature: bool) -> Tensor:
        """Add d loss / d cosine of a chunk to ``target``; return the pull [c] of its rows' positives."""
        scores = (cosine * self.inverse_temperature).masked_fill_(keep.logical_not_(), -torch.inf)
        scores = scores.sub_(self.log_negatives).exp_().mul_(self.push)
        if temperature:
            self.moment += torch.linalg.vecdot(scores, cosine, dim=0)
        target.addcmul_(scores, self.inverse_temperature[None])
        return self.row_push[rows] * self.row_inverse[rows]

    def inverse_temperature_gradient(self, exchange: Exchange, key_sizes: list[int]) -> Tensor:
        """[M] for this rank's keys."""
        gradient = exchange.reduce_scatter(self.moment, key_sizes).clone()
        return gradient.index_put_((self.index,), -self.row_push * self.positive, accumulate=True)


def column_statistics(
    problem: Problem,
    queries: Tensor,
    all_keys: Tensor,
    positive: Tensor,
    weight: Tensor,
    column_inverse: Tensor,
    chunks: list[slice],
) -> Columns:
    """Pass one. ``queries`` [N, D] of this rank, ``positive`` [N] cosines, ``weight`` [N] of each row's column loss."""
    exchange, options = problem.exchange, problem.options
    best = best_per_key(problem.positive, positive, problem.row_valid, len(column_inverse))
    inverse, best = exchange.gather(torch.stack([column_inverse, best], 1), problem.key_sizes).unbind(1)
    inverse, best = inverse.contiguous(), best.contiguous()

    top = torch.full_like(inverse, -torch.inf)
    total = torch.zeros_like(inverse)
    for rows in chunks:
        cosine = product(queries[rows], all_keys.T, positive.dtype)
        keep = negatives(problem.anchor_tags[rows], problem.all_keys, problem.tags_in_use)
        keep &= problem.query_valid[rows][:, None]
        drop_by_score(keep, cosine, best, options, dim=1)
        scores = cosine.mul_(inverse).masked_fill_(keep.logical_not_(), -torch.inf)
        higher = torch.maximum(top, scores.amax(0))
        shift = _finite(higher)
        total = total * (top - shift).exp() + scores.sub_(shift).exp_().sum(0)
        top = higher
    highest = exchange.max(top)
    total = exchange.sum(total * (top - _finite(highest)).exp())
    log_negatives = total.log() + _finite(highest)

    own = log_negatives[problem.own_keys][problem.positive]
    row_inverse = column_inverse[problem.positive]
    gap = own - positive * row_inverse
    row_push = weight * torch.sigmoid(gap)
    push = torch.zeros_like(column_inverse).index_put_((problem.positive,), row_push, accumulate=True)
    return Columns(
        options=options,
        inverse_temperature=inverse,
        best_positive=best,
        log_negatives=_finite(log_negatives),
        push=exchange.gather(push, problem.key_sizes),
        row_push=row_push,
        row_inverse=row_inverse,
        positive=positive,
        loss=(weight * -F.logsigmoid(-gap)).sum(),
        moment=torch.zeros_like(inverse),
        index=problem.positive,
    )


def _finite(x: Tensor) -> Tensor:
    """Minus infinity, the maximum or logsumexp of nothing, as 0, so that differences stay defined."""
    return torch.where(x.isinf(), 0.0, x)
