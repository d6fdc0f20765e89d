"""Late interaction: a query finds its target by their tokens, each query token by the target's token
that is nearest to it.

    s_ij = mean over tokens a of query i of max over tokens b of target j of cos(W a, W b)
    L    = sum over patterns of weight * mean over valid rows i of
           -log e^{s_ii/t} / (e^{s_ii/t} + sum over negatives j e^{s_ij/t})

(ColBERT: Khattab & Zaharia, SIGIR 2020, arXiv 2004.12832, section 3.2, which sums over the query's
tokens; the mean has the range of a cosine, so that the pattern's learned temperature t fits it.) W
is a learned linear map to `dimension` numbers and belongs to this loss. In-batch negatives are the
targets of all data-parallel ranks, without those that InfoNCE masks; mined negatives and records'
own are the row's. One direction: MaxSim is not symmetric. Positions are what the encoder's blocks
read: tokens of prompt and text, and of a picture its latents (ColPali, arXiv 2407.01449).

Memory: every rank holds the mapped tokens of all targets, M x t x dimension numbers. Scores are made
and forgotten a block of targets at a time, and made again for the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad
from torch.utils.checkpoint import checkpoint

from sailplan.config.schema import DatasetConfig, PatternKey
from sailplan.data.record import HardNegatives
from sailplan.errors import ConfigurationError
from sailplan.objective.patterns import (
    Pattern,
    check_positive,
    has_history,
    pair_masks,
    patterns_of,
    without_low_grades,
    zero_loss,
)
from sailplan.objective.protocol import (
    EncodedStep,
    EncodedView,
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
)

SCORES = 1 << 24  # of pairs of tokens in memory at once
NOWHERE = -2.0  # below every cosine: of positions that are not there


def max_sim(queries: Tensor, query_mask: Tensor, keys: Tensor, key_mask: Tensor) -> Tensor:
    """Return the mean over each query's tokens of the largest cosine with a key's tokens, [n, m].

    queries [n, t, d] and keys [m, u, d] of length one, masks bool [n, t] and [m, u]. A query without
    tokens gets 0.
    """
    scores = torch.einsum("ntd,mud->nmtu", queries, keys)
    nearest = scores.masked_fill(~key_mask[None, :, None], NOWHERE).amax(3)
    nearest = nearest.masked_fill(~query_mask[:, None], 0.0)
    return nearest.sum(2) / query_mask.sum(1).clamp_min(1)[:, None].to(nearest.dtype)


class LateInteraction(Objective):
    """InfoNCE over MaxSim scores of tokens.

    dimension: of the mapped tokens.
    mask_same_ids: keys that are the same document as the positive, or belong to the same query, are
    no negatives.

    Raises ConfigurationError for a dimension that is not above 0.
    """

    per_token = True
    prefix_support = None  # W reads whole vectors

    def __init__(
        self,
        *,
        embedding: int,
        datasets: Mapping[str, DatasetConfig],
        dimension: int = 128,
        mask_same_ids: bool = True,
    ) -> None:
        super().__init__()
        check_positive("late_interaction.dimension", dimension)
        self.projection = nn.Linear(embedding, dimension, bias=False)
        self.mask_same_ids = mask_same_ids

    def applies(self, dataset: DatasetConfig) -> bool:
        return any(not has_history(dataset, pattern) for pattern in dataset.patterns)

    def forward(self, encoded: EncodedStep, context: ObjectiveContext) -> ObjectiveOutput:
        """Sum over patterns of weight times the loss; per pattern: accuracy, mean score of the
        positives.
        """
        total = zero_loss(encoded)
        metrics: dict[str, Tensor] = {}
        mapped: dict[int, Tensor] = {}  # a view's once, however many patterns it is in
        for pattern in patterns_of(encoded, context, histories=False):
            for view in (pattern.query, pattern.target):
                if id(view) not in mapped:
                    mapped[id(view)] = self.map(view)
            queries, keys = mapped[id(pattern.query)], mapped[id(pattern.target)]
            loss, correct, positive = self._rows(encoded, context, pattern, queries, keys)
            counted = self._counted(encoded, context, pattern)
            rows = context.exchange.sum(counted.sum())
            share = context.exchange.world_size / rows.clamp_min(1).to(loss.dtype)

            def mean(values: Tensor, counted: Tensor = counted, share: Tensor = share) -> Tensor:
                return torch.where(counted, values, 0.0).sum() * share

            total = total + pattern.weight * mean(loss)
            metrics[f"{pattern.name}/accuracy"] = mean(correct.to(loss.dtype))
            metrics[f"{pattern.name}/positive_score"] = mean(positive.detach())
        return ObjectiveOutput(total, metrics)

    def map(self, view: EncodedView) -> Tensor:
        """Return a view's tokens [r * g, t, dimension], of length one."""
        if view.tokens is None or view.token_mask is None:
            raise ConfigurationError(
                "objectives.late_interaction: found no vectors of tokens, expected an encoder that "
                "gives them; leave the loss out, or take another model"
            )
        mapped = self.projection(view.tokens.to(self.projection.weight.dtype))
        return normalize(mapped, dim=2)

    def _counted(self, encoded: EncodedStep, context: ObjectiveContext, pattern: Pattern) -> Tensor:
        """bool [r]: rows with both sides, a token in each, and not graded as unrelated."""
        masks = without_low_grades(encoded, context, pair_masks(pattern, same_ids=False))
        query, target = pattern.query, pattern.target
        assert masks.query_valid is not None
        assert query.token_mask is not None and target.token_mask is not None
        present = query.token_mask.any(1) & target.token_mask.any(1) & target.valid
        return masks.query_valid.to(present.device) & present

    def _rows(
        self,
        encoded: EncodedStep,
        context: ObjectiveContext,
        pattern: Pattern,
        queries: Tensor,
        keys: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, whether the positive beats every negative, and the positive's score, each [r]."""
        query, target, exchange = pattern.query, pattern.target, context.exchange
        assert query.token_mask is not None and target.token_mask is not None
        rows = len(queries)
        sizes = exchange.sizes(rows) if encoded.rank_rows is None else list(encoded.rank_rows)
        longest = int(exchange.max(torch.tensor(keys.shape[1], device=keys.device)))
        room = longest - keys.shape[1]
        flat = pad(keys, (0, 0, 0, room)).flatten(1)
        all_keys = exchange.gather(flat, sizes).unflatten(1, (longest, -1))
        all_masks = exchange.gather(pad(target.token_mask, (0, room)), sizes)
        valid = exchange.gather(target.valid & target.token_mask.any(1), sizes)
        first = sum(sizes[: exchange.rank])
        own = torch.arange(first, first + rows, device=keys.device)
        allowed = valid[None] & (torch.arange(len(valid), device=keys.device) != own[:, None])
        if self.mask_same_ids:
            for ids in (target.ids, query.ids):
                everyones = exchange.gather(ids, sizes)
                allowed = allowed & ((ids[:, None] != everyones) | (ids[:, None] < 0))
        scores = torch.cat(
            [
                self._scores(queries, query.token_mask, all_keys[part], all_masks[part])
                for part in self._blocks(queries, all_keys)
            ],
            1,
        )
        positive = scores.gather(1, own[:, None])
        against = [torch.where(allowed, scores, -torch.inf)]
        negatives = encoded.views.get(HardNegatives(pattern.name))
        if negatives is not None:
            against.append(self._hard(pattern, negatives, queries))
        logits = torch.cat([positive, *against], 1) / context.temperatures.get(
            PatternKey(encoded.dataset, pattern.name)
        )
        best = torch.cat(against, 1).detach().amax(1)
        return logits.logsumexp(1) - logits[:, 0], positive[:, 0] > best, positive[:, 0]

    def _blocks(self, queries: Tensor, keys: Tensor) -> list[slice]:
        """Keys whose scores are in memory together."""
        at_once = max(1, SCORES // max(1, queries.shape[0] * queries.shape[1] * keys.shape[1]))
        return [slice(start, start + at_once) for start in range(0, len(keys), at_once)]

    def _scores(
        self, queries: Tensor, query_mask: Tensor, keys: Tensor, key_mask: Tensor
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return max_sim(queries, query_mask, keys, key_mask)
        found: Tensor = checkpoint(
            max_sim, queries, query_mask, keys, key_mask, use_reentrant=False
        )
        return found

    def _hard(self, pattern: Pattern, negatives: EncodedView, queries: Tensor) -> Tensor:
        """Scores of each row's own negatives [r, g], -inf where there is none."""
        assert negatives.token_mask is not None and pattern.query.token_mask is not None
        shape = (len(queries), negatives.group)
        keys = self.map(negatives).unflatten(0, shape)
        present = negatives.token_mask.unflatten(0, shape)
        scores = torch.einsum("rtd,rgud->rgtu", queries, keys)
        nearest = scores.masked_fill(~present[:, :, None], NOWHERE).amax(3)
        mask = pattern.query.token_mask
        nearest = nearest.masked_fill(~mask[:, None], 0.0)
        found = nearest.sum(2) / mask.sum(1).clamp_min(1)[:, None].to(nearest.dtype)
        valid = negatives.valid.view(shape) & present.any(2)
        if self.mask_same_ids:
            ids = negatives.ids.view(shape)
            valid = valid & (ids != pattern.target.ids[:, None])
            valid = valid & (ids != pattern.query.ids[:, None])
        return torch.where(valid, found, -torch.inf)
