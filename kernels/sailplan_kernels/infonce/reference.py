"""The definition: every score is in memory at once and autograd does the rest.

Row loss: anchors are the queries; the denominators hold, side by side, all ranks' keys and whatever else the options
add. Column loss: anchors are the positives' keys, candidates all ranks' queries. Slow, O(N M) memory, differentiable
twice; what the other backends are tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sailplan_kernels.infonce.masks import best_per_key, limits, lowest_per_key, negatives
from sailplan_kernels.infonce.normalize import normalize
from sailplan_kernels.infonce.options import InfoNCEOptions
from sailplan_kernels.infonce.problem import Problem


def reference_loss(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's weighted loss (0-d), loss of each prefix [P] without gradient, and of the longest prefix the positives'
    cosines [N] and whether each row is right [N]."""
    losses, options = [], problem.options
    whole = problem.queries, problem.keys, problem.hard
    for prefix in options.prefixes:
        q, k, h = (normalize(x[..., :prefix]) for x in whole)
        loss, positive, correct = _prefix_loss(problem, q, k, h)
        losses.append(loss)
    total = torch.stack([weight * loss for weight, loss in zip(options.prefix_weights, losses, strict=True)]).sum()
    return total, torch.stack(losses).detach(), positive, correct


def _prefix_loss(problem: Problem, queries: Tensor, keys: Tensor, hard: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's loss (0-d), its positives' cosines [N] and whether each row is right [N], of one prefix.

    Arguments: normalised [N, d], [M, d], [N, H, d].
    """
    options, needs, tags = problem.options, problem.needs, problem.tags_in_use
    all_keys = gather_agreed(problem, keys, problem.key_sizes, needs.keys)
    pairs, share = problem.pairs, problem.row_weight
    if pairs is None:
        positive_keys, rows = keys[problem.positive], torch.arange(len(queries), device=queries.device)
        positive = pair_cosine = (queries * positive_keys).sum(1)
        pair_correction: Tensor | float = problem.positive_correction
    else:
        rows, share = pairs.rows, (share / pairs.counts.clamp_min(1))[pairs.rows]
        pair_cosine = (queries[rows] * all_keys[pairs.keys]).sum(1)
        positive = pairs.best(pair_cosine.detach()[None])[0]
        pair_correction = 0.0 if problem.key_correction is None else problem.key_correction[pairs.keys]
    all_queries = queries[:0]
    if options.query_negatives or options.symmetric:
        all_queries = gather_agreed(problem, queries, problem.query_sizes, needs.queries)

    key_mask = negatives(problem.anchor_tags, problem.all_keys, tags)
    blocks = [(queries @ all_keys.T, key_mask)]
    if options.query_negatives:
        blocks.append((queries @ all_queries.T, negatives(problem.anchor_tags, problem.all_queries, tags)))
    if options.key_negatives:
        blocks.append((positive_keys @ all_keys.T, key_mask))
    if options.shared_hard_negatives:
        all_hard = gather_agreed(problem, hard.flatten(0, 1), problem.hard_sizes, needs.hard)
        blocks.append((queries @ all_hard.T, problem.all_hard.valid.expand(len(queries), -1)))
    else:
        blocks.append((torch.einsum("nd,nhd->nh", queries, hard), problem.hard_valid))
    cosine = torch.cat([block for block, _ in blocks], 1)
    correction = _corrections(problem, blocks)
    keep = torch.cat([mask for _, mask in blocks], 1)
    keep &= _within(cosine, positive, problem.max_negative_score, options)
    own = pair_cosine * problem.inverse_temperature[rows] - pair_correction
    scores = (cosine * problem.inverse_temperature[:, None] - correction).masked_fill(~keep, -torch.inf)
    total = (share * _losses(scores, keep, own, rows)).sum()
    best_negative = F.pad(scores.detach(), (0, 1), value=-torch.inf).amax(1)
    best_own = own.detach() if pairs is None else pairs.best(own.detach()[None])[0]
    correct = problem.row_valid & (best_own > best_negative)
    if pairs is not None:
        return total, pairs.per_row(pair_cosine.detach()[None])[0] / pairs.counts.clamp_min(1), correct

    if options.symmetric:
        cosine = positive_keys @ all_queries.T
        own_tags = problem.all_keys.tags[problem.own_keys]
        keep = negatives(own_tags[problem.positive], problem.all_queries, tags)
        best = best_per_key(problem.positive, positive.detach(), problem.row_valid, len(keys))[problem.positive]
        highest = problem.max_negative_score
        if highest is not None:
            highest = lowest_per_key(problem.positive, highest, problem.row_valid, len(keys))[problem.positive]
        keep &= _within(cosine, best, highest, options)
        inverse = problem.column_inverse_temperature[problem.positive]
        scores = (cosine * inverse[:, None]).masked_fill(~keep, -torch.inf)
        total = (total + (problem.row_weight * _losses(scores, keep, positive * inverse, rows)).sum()) / 2
    return total, positive.detach(), correct


def _within(cosine: Tensor, positive: Tensor, highest: Tensor | None, options: InfoNCEOptions) -> Tensor:
    """bool, as ``cosine`` [n, C]: not so high that the pair must not be a negative."""
    limit = limits(positive.detach()[None], highest, options)
    return torch.ones_like(cosine, dtype=torch.bool) if limit is None else ~(cosine.detach() > limit[0][:, None])


def _corrections(problem: Problem, blocks: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[all candidates] log probability of each as a sampled key; 0 for queries and hard negatives, which are not."""
    correction = torch.zeros(sum(block.shape[1] for block, _ in blocks), dtype=blocks[0][0].dtype, device=blocks[0][0].device)
    if problem.key_correction is not None:
        keys, queries = len(problem.key_correction), blocks[1][0].shape[1] if problem.options.query_negatives else 0
        correction[:keys] = problem.key_correction
        if problem.options.key_negatives:
            correction[keys + queries : 2 * keys + queries] = problem.key_correction
    return correction


def _losses(scores: Tensor, keep: Tensor, positive: Tensor, rows: Tensor) -> Tensor:
    """[E] softplus(lse over the kept negatives of row rows[e] - positive[e]), of logits; 0 where none is kept."""
    some = keep.any(1)
    log_negatives = torch.logsumexp(torch.where(some[:, None], scores, 0.0), 1)
    # -logsigmoid(-x) is softplus(x) without softplus's cut-off at 20.
    losses = -F.logsigmoid(positive - log_negatives[rows])
    return torch.where(some[rows], losses, 0.0)


def gather_agreed(problem: Problem, x: Tensor, sizes: list[int], needed: bool) -> Tensor:
    """All ranks' rows. If any rank needs their gradient, every rank's backward must enter the collective."""
    if not needed:
        x = x.detach()
    elif not x.requires_grad:
        x = x.detach().requires_grad_()
    return problem.exchange.gather(x, sizes)
