"""The definition: every score is in memory at once and autograd does the rest.

One term a pair of a row and its positive. Row loss: the anchor is the query (with key negatives
also the positive itself); the denominators hold, side by side, all ranks' keys and whatever else
the options add. Column loss: the anchor is the positive's key, candidates are all ranks' queries.
Slow, O(N M) memory, differentiable twice; what the other backends are tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sailplan_kernels.infonce.loss_inputs import GatheredInputs
from sailplan_kernels.infonce.masks import limits, negatives
from sailplan_kernels.infonce.pairs import best_at
from sailplan_kernels.tiling.normalize import normalize


def reference_loss(inputs: GatheredInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's weighted loss (0-d), loss of each prefix [P] without gradient, and of the
    longest prefix the positives'
    cosines [N] and whether each row is right [N]."""
    losses, options = [], inputs.options
    whole = inputs.queries, inputs.keys, inputs.hard
    for number, prefix in enumerate(options.prefixes):
        q, k, h = (normalize(x[..., :prefix]) for x in whole)
        loss, positive, correct = _prefix_loss(inputs, number, q, k, h)
        losses.append(loss)
    total = torch.stack(
        [weight * loss for weight, loss in zip(options.prefix_weights, losses, strict=True)]
    ).sum()
    return total, torch.stack(losses).detach(), positive, correct


def _prefix_loss(
    inputs: GatheredInputs, number: int, queries: Tensor, keys: Tensor, hard: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's loss (0-d), its positives' mean cosines [N] and whether each row is right [N],
    of the prefix of this number.

    Arguments: normalised [N, d], [M, d], [N, H, d].
    """
    options, needs, tags, pairs = inputs.options, inputs.needs, inputs.tags_in_use, inputs.pairs
    rows = pairs.rows
    all_keys = gather_agreed(inputs, keys, inputs.key_sizes, needs.keys)
    positive_keys = all_keys[pairs.keys]
    own_cosine = (queries[rows] * positive_keys).sum(1)
    share = (inputs.row_weight / pairs.counts.clamp_min(1))[rows]
    all_queries = queries[:0]
    if options.query_negatives or options.symmetric:
        all_queries = gather_agreed(inputs, queries, inputs.query_sizes, needs.queries)

    key_mask = negatives(inputs.anchor_tags, inputs.all_keys, tags)[rows]
    blocks = [((queries @ all_keys.T)[rows], key_mask, inputs.key_correction)]
    if options.query_negatives:
        blocks.append(
            (
                (queries @ all_queries.T)[rows],
                negatives(inputs.anchor_tags, inputs.all_queries, tags)[rows],
                None,
            )
        )
    if options.key_negatives:
        blocks.append((positive_keys @ all_keys.T, key_mask, inputs.key_correction))
    if options.shared_hard_negatives:
        all_hard = gather_agreed(inputs, hard.flatten(0, 1), inputs.hard_sizes, needs.hard)
        blocks.append(
            ((queries @ all_hard.T)[rows], inputs.all_hard.valid.expand(len(rows), -1), None)
        )
    else:
        blocks.append(
            (torch.einsum("nd,nhd->nh", queries, hard)[rows], inputs.hard_valid[rows], None)
        )
    cosine = torch.cat([block for block, _, _ in blocks], 1)
    cached = torch.cat([mask for _, mask, _ in blocks], 1)
    correction = torch.cat(
        [block.new_zeros(block.shape[1]) if shift is None else shift for block, _, shift in blocks]
    )
    best = pairs.best(own_cosine.detach()[None])[0]
    highest = inputs.row_highest(number)
    cached &= _within(cosine, limits(best[None], highest, options), rows)
    inverse = inputs.row_inverse_temperature[rows]
    own = own_cosine * inverse - (
        0.0 if inputs.key_correction is None else inputs.key_correction[pairs.keys]
    )
    scores = (cosine * inverse[:, None] - correction).masked_fill(~cached, -torch.inf)
    total = (share * _losses(scores, cached, own)).sum()
    best_negative = pairs.best(F.pad(scores.detach(), (0, 1), value=-torch.inf).amax(1)[None])[0]
    correct = inputs.row_valid & (pairs.best(own.detach()[None])[0] > best_negative)
    positive = pairs.per_row(own_cosine.detach()[None])[0] / pairs.counts.clamp_min(1)

    if options.symmetric:
        cosine = positive_keys @ all_queries.T
        cached = negatives(inputs.all_keys.tags[pairs.keys], inputs.all_queries, tags)
        cached &= _within(
            cosine,
            column_max_cosines(inputs, own_cosine.detach()[None], highest),
            pairs.keys,
        )
        inverse = _column_inverse_temperature(inputs)[pairs.keys]
        scores = (cosine * inverse[:, None]).masked_fill(~cached, -torch.inf)
        total = (total + (share * _losses(scores, cached, own_cosine * inverse)).sum()) / 2
    return total, positive, correct


def column_max_cosines(
    inputs: GatheredInputs, cosine: Tensor, highest: Tensor | None
) -> Tensor | None:
    """[1, all keys] ``limits`` of the columns, from the pairs' ``cosine`` [1, E] and the rows'
    max_cosine [N].

    Where several rows, of any rank, share a key, its margins start from its best positive, and it
    has the lowest max_cosine.
    """
    pairs, options = inputs.pairs, inputs.options
    if not options.filters:
        return None
    below = cosine.new_full((1, len(pairs.rows)), torch.inf)
    if highest is not None:
        below = highest[pairs.rows][None]
    found = best_at(pairs.keys, torch.cat([cosine, -below]), sum(inputs.key_sizes))
    found = inputs.exchange.max(found)
    return limits(found[:-1], None if highest is None else -found[-1], options)


def _column_inverse_temperature(inputs: GatheredInputs) -> Tensor:
    """[all keys] mean of the inverse temperatures of the rows, of any rank, that share a key; 0
    where there is none.
    """
    pairs, ranks = inputs.pairs, inputs.exchange.world_size
    none = torch.zeros(
        sum(inputs.key_sizes), dtype=inputs.row_weight.dtype, device=inputs.row_weight.device
    )
    total = none.index_add(0, pairs.keys, inputs.row_inverse_temperature[pairs.rows])
    total = gather_agreed(inputs, total[None], [1] * ranks, inputs.needs.temperature).sum(0)
    return total / inputs.exchange.sum(
        none.index_add(0, pairs.keys, torch.ones_like(none[:1]).expand(len(pairs.keys)))
    ).clamp_min(1)


def _within(cosine: Tensor, max_cosine: Tensor | None, anchors: Tensor) -> Tensor:
    """bool, as ``cosine`` [E, C]: not so high that the pair must not be a negative; limit [1,
    ...] by anchor.
    """
    return (
        torch.ones_like(cosine, dtype=torch.bool)
        if max_cosine is None
        else ~(cosine.detach() > max_cosine[0][anchors][:, None])
    )


def _losses(scores: Tensor, cached: Tensor, positive: Tensor) -> Tensor:
    """[E] softplus(lse over the kept negatives - positive), of logits; 0 where none is kept."""
    some = cached.any(1)
    log_negatives = torch.logsumexp(torch.where(some[:, None], scores, 0.0), 1)
    # -logsigmoid(-x) is softplus(x) without softplus's cut-off at 20.
    losses = -F.logsigmoid(positive - log_negatives)
    return torch.where(some, losses, 0.0)


def gather_agreed(inputs: GatheredInputs, x: Tensor, sizes: list[int], needed: bool) -> Tensor:
    """All ranks' rows.

    If any rank needs their gradient, every rank's backward must enter the collective.
    """
    if not needed:
        x = x.detach()
    elif not x.requires_grad:
        x = x.detach().requires_grad_()
    return inputs.exchange.gather(x, sizes)
