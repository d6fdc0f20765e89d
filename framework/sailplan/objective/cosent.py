"""CoSENT: graded pairs should have cosines in the order of their scores.

    L = log(1 + sum over pairs (i, k) with score_i > score_k of e^{(cos_k - cos_i)/t})

over the graded pairs of all ranks (Su, "CoSENT", 2022; AnglE, arXiv 2309.12871, equation 1). The
sum has N^2 terms but factors once the pairs are sorted by score: for each i the inner sum is
e^{-cos_i/t} times a running sum of e^{cos_k/t} over the lower scores. So a sort and one running
logsumexp give the exact value in O(N log N) time and O(N) memory, and no tiling is needed at any
batch size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sailplan.config.schema import DatasetConfig
from sailplan.objective.patterns import check_positive, has_history, patterns_of, zero_loss
from sailplan.objective.protocol import EncodedStep, Objective, ObjectiveContext, ObjectiveOutput


def cosent(cosines: Tensor, scores: Tensor, temperature: float | Tensor) -> Tensor:
    """CoSENT of N graded pairs; cosines and scores [N], any order.

    0-d; 0 where no two scores differ.
    """
    ordered, order = scores.sort()
    scaled = cosines[order] / temperature
    lower = torch.searchsorted(ordered, ordered, right=False)  # how many scores are strictly lower
    has_lower = lower > 0
    running = torch.logcumsumexp(scaled, 0)
    terms = running[lower[has_lower] - 1] - scaled[has_lower]
    return torch.logsumexp(torch.cat([scaled.new_zeros(1), terms]), 0)


class CoSENT(Objective):
    """CoSENT over the graded pairs of all ranks, weighted by the patterns' weights.

    temperature: of this loss, fixed; the patterns' learnable temperatures belong to InfoNCE and
    would shrink without end here once all pairs are in order.

    Rows without a score (`scores` missing or NaN) or without a side do not count. Raises
    ConfigurationError for a temperature that is not above 0.
    """

    uses_hard_negatives = False

    def __init__(
        self,
        *,
        embedding: int,
        datasets: Mapping[str, DatasetConfig],
        temperature: float = 0.05,
    ) -> None:
        super().__init__()
        check_positive("cosent.temperature", temperature)
        self.temperature = temperature

    def applies(self, dataset: DatasetConfig) -> bool:
        return dataset.kind == "pairs" and any(
            not has_history(dataset, pattern) for pattern in dataset.patterns
        )

    def forward(self, encoded: EncodedStep, context: ObjectiveContext) -> ObjectiveOutput:
        """Sum over patterns of weight times CoSENT; metrics: graded pairs in use, per pattern."""
        total = zero_loss(encoded)
        metrics: dict[str, Tensor] = {}
        for pattern in patterns_of(encoded, context, histories=False):
            query, target = pattern.query, pattern.target
            scores = (
                query.fused.new_full((len(query.ids),), torch.nan)
                if encoded.scores is None
                else encoded.scores.to(query.fused)
            )
            scores = torch.where(query.valid & target.valid, scores, torch.nan)
            scores = context.exchange.gather(scores)
            graded = ~scores.isnan()
            cosines = context.exchange.gather(cosine_similarity(query.fused, target.fused, dim=1))
            total = total + pattern.weight * cosent(
                cosines[graded], scores[graded], self.temperature
            )
            metrics[f"{pattern.name}/graded_pairs"] = graded.sum().to(total.dtype)
        return ObjectiveOutput(total, metrics)
