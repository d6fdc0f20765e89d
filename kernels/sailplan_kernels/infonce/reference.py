"""The definition: every score is in memory at once and autograd does the rest.

One term a pair of a row and its positive. Row loss: the anchor is the query (with key negatives also the positive itself);
the denominators hold, side by side, all ranks' keys and whatever else the options add. Column loss: the anchor is the
positive's key, candidates are all ranks' queries. Slow, O(N M) memory, differentiable twice; what the other backends are
tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sailplan_kernels.infonce.masks import limits, negatives
from sailplan_kernels.infonce.pairs import best_at
from sailplan_kernels.infonce.problem import GatheredProblem
from sailplan_kernels.tiling.normalize import normalize


def reference_loss(problem: GatheredProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _prefix_loss(problem: GatheredProblem, queries: Tensor, keys: Tensor, hard: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's loss (0-d), its positives' mean cosines [N] and whether each row is right [N], of one prefix.

    Arguments: normalised [N, d], [M, d], [N, H, d].
    """
    options, needs, tags, pairs = problem.options, problem.needs, problem.tags_in_use, problem.pairs
    rows = pairs.rows
    all_keys = gather_agreed(problem, keys, problem.key_sizes, needs.keys)
    positive_keys = all_keys[pairs.keys]
    own_cosine = (queries[rows] * positive_keys).sum(1)
    share = (problem.row_weight / pairs.counts.clamp_min(1))[rows]
    all_queries = queries[:0]
    if options.query_negatives or options.symmetric:
        all_queries = gather_agreed(problem, queries, problem.query_sizes, needs.queries)

    key_mask = negatives(problem.anchor_tags, problem.all_keys, tags)[rows]
    blocks = [((queries @ all_keys.T)[rows], key_mask, problem.key_correction)]
    if options.query_negatives:
        blocks.append(((queries @ all_queries.T)[rows], negatives(problem.anchor_tags, problem.all_queries, tags)[rows], None))
    if options.key_negatives:
        blocks.append((positive_keys @ all_keys.T, key_mask, problem.key_correction))
    if options.shared_hard_negatives:
        all_hard = gather_agreed(problem, hard.flatten(0, 1), problem.hard_sizes, needs.hard)
        blocks.append(((queries @ all_hard.T)[rows], problem.all_hard.valid.expand(len(rows), -1), None))
    else:
        blocks.append((torch.einsum("nd,nhd->nh", queries, hard)[rows], problem.hard_valid[rows], None))
    cosine = torch.cat([block for block, _, _ in blocks], 1)
    keep = torch.cat([mask for _, mask, _ in blocks], 1)
    correction = torch.cat([block.new_zeros(block.shape[1]) if shift is None else shift for block, _, shift in blocks])
    best = pairs.best(own_cosine.detach()[None])[0]
    highest = problem.row_highest
    keep &= _within(cosine, limits(best[None], highest, options), rows)
    inverse = problem.row_inverse_temperature[rows]
    own = own_cosine * inverse - (0.0 if problem.key_correction is None else problem.key_correction[pairs.keys])
    scores = (cosine * inverse[:, None] - correction).masked_fill(~keep, -torch.inf)
    total = (share * _losses(scores, keep, own)).sum()
    best_negative = pairs.best(F.pad(scores.detach(), (0, 1), value=-torch.inf).amax(1)[None])[0]
    correct = problem.row_valid & (pairs.best(own.detach()[None])[0] > best_negative)
    positive = pairs.per_row(own_cosine.detach()[None])[0] / pairs.counts.clamp_min(1)

    if options.symmetric:
        cosine = positive_keys @ all_queries.T
        keep = negatives(problem.all_keys.tags[pairs.keys], problem.all_queries, tags)
        keep &= _within(cosine, column_limits(problem, own_cosine.detach()[None], problem.exchange.max), pairs.keys)
        inverse = _column_inverse_temperature(problem)[pairs.keys]
        scores = (cosine * inverse[:, None]).masked_fill(~keep, -torch.inf)
        total = (total + (share * _losses(scores, keep, own_cosine * inverse)).sum()) / 2
    return total, positive, correct


def column_limits(problem: GatheredProblem, cosine: Tensor, highest_of) -> Tensor | None:
    """[P, all keys] ``limits`` of the columns, from the pairs' ``cosine`` [P, E].

    Where several rows, of any rank, share a key, its margins start from its best positive, and it has the lowest
    max_cosine. ``highest_of`` takes the maximum over all who hold rows.
    """
    pairs, options = problem.pairs, problem.options
    if not options.filters:
        return None
    below = cosine.new_full((1, len(pairs.rows)), torch.inf)
    if problem.row_highest is not None:
        below = problem.row_highest[pairs.rows][None]
    found = highest_of(best_at(pairs.keys, torch.cat([cosine, -below]), sum(problem.key_sizes)))
    return limits(found[:-1], -found[-1] if problem.max_cosine is not None else None, options)


def _column_inverse_temperature(problem: GatheredProblem) -> Tensor:
    """[all keys] mean of the inverse temperatures of the rows, of any rank, that share a key; 0 where there is none."""
    pairs, ranks = problem.pairs, problem.exchange.world_size
    none = torch.zeros(sum(problem.key_sizes), dtype=problem.row_weight.dtype, device=problem.row_weight.device)
    total = none.index_add(0, pairs.keys, problem.row_inverse_temperature[pairs.rows])
    total = gather_agreed(problem, total[None], [1] * ranks, problem.needs.temperature).sum(0)
    return total / problem.exchange.sum(none.index_add(0, pairs.keys, torch.ones_like(none[:1]).expand(len(pairs.keys)))).clamp_min(1)


def _within(cosine: Tensor, limit: Tensor | None, anchors: Tensor) -> Tensor:
    """bool, as ``cosine`` [E, C]: not so high that the pair must not be a negative; limit [1, ...] by anchor."""
    return torch.ones_like(cosine, dtype=torch.bool) if limit is None else ~(cosine.detach() > limit[0][anchors][:, None])


def _losses(scores: Tensor, keep: Tensor, positive: Tensor) -> Tensor:
    """[E] softplus(lse over the kept negatives - positive), of logits; 0 where none is kept."""
    some = keep.any(1)
    log_negatives = torch.logsumexp(torch.where(some[:, None], scores, 0.0), 1)
    # -logsigmoid(-x) is softplus(x) without softplus's cut-off at 20.
    losses = -F.logsigmoid(positive - log_negatives)
    return torch.where(some, losses, 0.0)


def gather_agreed(problem: GatheredProblem, x: Tensor, sizes: list[int], needed: bool) -> Tensor:
    """All ranks' rows. If any rank needs their gradient, every rank's backward must enter the collective."""
    if not needed:
        x = x.detach()
    elif not x.requires_grad:
        x = x.detach().requires_grad_()
    return problem.exchange.gather(x, sizes)
