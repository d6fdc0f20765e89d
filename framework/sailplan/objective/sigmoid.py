"""Sigmoid loss: whether a query and a target belong together is asked of every pair of the global
batch for itself.

    L = sum over patterns of weight * mean over valid rows i of
        softplus(-z_ii) + sum over negatives j of softplus(z_ij),    z = cos / t + b

(SigLIP, Zhai et al., arXiv 2303.15343, equation 1). t and b are learned and belong to this loss: a
softmax does not feel a bias, and its temperature is another one. SigLIP starts at t = 0.1 and
b = -10, at which the many negatives of a large batch cost nearly nothing at first. Not negatives of
a row are the same keys as in InfoNCE: those with the id of its positive, and of the same query.
Both directions are one sum, so that there is no `symmetric` here. Hard negatives have no part in it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sailplan.config.fields import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from sailplan.config.schema import DatasetConfig, PatternKey
from sailplan.data.config import Grouping
from sailplan.errors import ConfigurationError
from sailplan.objective.backends import described
from sailplan.objective.patterns import (
    Pattern,
    has_history,
    loss_options,
    pair_masks,
    patterns_of,
    without_low_grades,
    zero_loss,
)
from sailplan.objective.protocol import EncodedStep, Objective, ObjectiveContext, ObjectiveOutput
from sailplan.objective.temperature import Biases, Temperatures
from sailplan_kernels import sigmoid_sum

GROUPINGS = ("pattern", "modality")


class Sigmoid(Objective):
    """The sigmoid loss of SigLIP.

    temperature, bias: start values of t and b.
    by: one t and one b for each pattern of each data set, or for each pair of modalities.
    mask_same_ids: keys that are the same document as the positive, or belong to the same query, are
    no negatives.

    Raises ConfigurationError for a start value that could not be learned from.
    """

    calls_kernels = True
    prefix_support = "own"
    uses_hard_negatives = False

    def __init__(
        self,
        *,
        embedding: int,
        datasets: Mapping[str, DatasetConfig],
        temperature: float = 0.1,
        bias: float = -10.0,
        by: Grouping = "pattern",
        mask_same_ids: bool = True,
    ) -> None:
        super().__init__()
        if not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
            raise ConfigurationError(
                f"objectives.sigmoid.temperature={temperature}: expected {LOWEST_TEMPERATURE} to "
                f"{HIGHEST_TEMPERATURE}"
            )
        if by not in GROUPINGS:
            raise ConfigurationError(
                f"objectives.sigmoid.by={by}: expected one of {', '.join(GROUPINGS)}"
            )
        self.temperatures = Temperatures(datasets, by, temperature)
        self.biases = Biases(datasets, by, bias)
        self.mask_same_ids = mask_same_ids

    def applies(self, dataset: DatasetConfig) -> bool:
        return any(not has_history(dataset, pattern) for pattern in dataset.patterns)

    def forward(self, encoded: EncodedStep, context: ObjectiveContext) -> ObjectiveOutput:
        """Sum over patterns of weight times the loss; per pattern: mean cosine of the positives,
        t, b, loss of each prefix.
        """
        sizes = self.matryoshka_sizes(context.prefixes)
        patterns = patterns_of(encoded, context, histories=False)
        if not patterns:
            return ObjectiveOutput(zero_loss(encoded))
        calls = [self._call(pattern, sizes, encoded, context) for pattern in patterns]
        weights = [pattern.weight for pattern in patterns]
        total, found = sigmoid_sum(calls, weights, exchange=context.exchange)
        metrics: dict[str, Tensor] = {}
        for pattern, one in zip(patterns, found, strict=True):
            key = PatternKey(encoded.dataset, pattern.name)
            context.ran.add(described(one.backend, context.operands(pattern.query.fused).dtype))
            rows = one.valid_rows.clamp_min(1).to(one.positive_score.dtype)
            mean = one.positive_score.sum() * context.exchange.world_size / rows
            metrics |= {
                f"{pattern.name}/positive_score": mean,
                f"{pattern.name}/temperature": self.temperatures.get(key).detach(),
                f"{pattern.name}/bias": self.biases.get(key).detach(),
            }
            if sizes is not None and len(sizes) > 1:
                metrics |= {
                    f"{pattern.name}/loss@{size}": loss
                    for size, loss in zip(sizes, one.prefix_losses, strict=True)
                }
        return ObjectiveOutput(total, metrics)

    def _call(
        self,
        pattern: Pattern,
        sizes: dict[int, float] | None,
        encoded: EncodedStep,
        context: ObjectiveContext,
    ) -> dict[str, object]:
        key = PatternKey(encoded.dataset, pattern.name)
        masks = pair_masks(pattern, same_ids=self.mask_same_ids)
        return {
            "queries": context.operands(pattern.query.fused),
            "keys": context.operands(pattern.target.fused),
            "temperature": self.temperatures.get(key),
            "bias": self.biases.get(key),
            "masks": without_low_grades(encoded, context, masks),
            "prefixes": sizes,
            "options": loss_options(encoded, context),
        }
