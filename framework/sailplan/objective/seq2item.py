"""seq2item: the items that a user has used should point to the next one.

    L = InfoNCE(representation of the history, target item)

The history's items are encoded like any item; their vectors, each L2-normalised so that no item
outweighs the others, become one: their mean (default), or a small transformer over them with a
special token. The transformer's output is added to the mean through a projection that starts at
zero, so training starts from mean pooling.

Targets are drawn as often as users use them, so the other rows' targets are popular items, and
plain InfoNCE learns association net of popularity. The sampling correction takes that back (Yi et
al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019,
section 3): logit s_ij / t - gamma * log p_j, with p_j the probability that a record has target j.

Items that are nobody's target never are a negative that way, and fill the answers of a search in
the whole catalogue.
Records may bring such items as `negatives`, drawn at random; every row then has all rows' negatives
beside the targets (Yang et al., "Mixed Negative Sampling for Learning Two-tower Neural Networks in
Recommendations", WWW 2020). p_j is then relative to a negative's own probability, and both kinds
together stand for the whole catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sailplan.config.schema import DatasetConfig
from sailplan.errors import ConfigurationError
from sailplan.objective.patterns import (
    contrast,
    contrast_sum,
    has_history,
    negatives_of,
    patterns_of,
)
from sailplan.objective.protocol import (
    EncodedStep,
    HistoryObjective,
    ObjectiveContext,
    ObjectiveOutput,
)
from sailplan_kernels import Masks

POOLINGS = ("mean", "encoder")


class Seq2Item(HistoryObjective):
    """InfoNCE from a history of items to a target item.

    pooling: mean, or encoder: `layers` pre-norm transformer layers of `heads` heads with a special
    token.
    positions: learned positions of the history's items (encoder only); leave off where histories
    have no time order.
    dropout: of the encoder.
    symmetric: True, False, or None for each data set's own switch.
    sampling_correction: gamma, 0 (none) to 1 (full); needs records with `target_probability`, as
    the artifact `interests` has.

    Raises ConfigurationError for options that mean nothing together.
    """

    calls_kernels = True
    prefix_support = "own"
    matryoshka = True

    def __init__(
        self,
        *,
        embedding: int,
        datasets: Mapping[str, DatasetConfig],
        pooling: str = "mean",
        layers: int = 3,
        heads: int = 4,
        dropout: float = 0.0,
        positions: bool = False,
        symmetric: bool | None = None,
        sampling_correction: float = 0.0,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ConfigurationError(
                f"objectives.seq2item.pooling={pooling}: expected one of {', '.join(POOLINGS)}"
            )
        if pooling == "mean" and (positions or dropout or (layers, heads) != (3, 4)):
            raise ConfigurationError(
                "objectives.seq2item: found layers, heads, dropout or positions with pooling=mean, "
                "which has none, expected pooling=encoder"
            )
        if pooling == "encoder" and (layers < 1 or embedding % heads):
            raise ConfigurationError(
                f"objectives.seq2item: found layers={layers}, heads={heads}, expected at least 1, "
                f"and a divisor of {embedding} (embedding)"
            )
        if not 0 <= dropout < 1:
            raise ConfigurationError(
                f"objectives.seq2item.dropout={dropout}: expected at least 0 and below 1"
            )
        if not 0 <= sampling_correction <= 1:
            raise ConfigurationError(
                f"objectives.seq2item.sampling_correction={sampling_correction}: expected 0 (none) "
                "to 1 (full)"
            )
        self.sampling_correction = sampling_correction
        self.symmetric = symmetric
        self.encoder: nn.TransformerEncoder | None = None
        self.positions: nn.Parameter | None = None
        if pooling == "encoder":
            layer = nn.TransformerEncoderLayer(
                embedding,
                heads,
                4 * embedding,
                dropout=dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            self.encoder = nn.TransformerEncoder(
                layer, layers, norm=nn.LayerNorm(embedding), enable_nested_tensor=False
            )
            self.token = nn.Parameter(torch.randn(embedding) * 0.02)
            self.projection = nn.Linear(embedding, embedding, bias=False)
            nn.init.zeros_(self.projection.weight)
            if positions:
                longest = max(
                    (
                        config.history_length
                        for config in datasets.values()
                        if config.kind == "sequences"
                    ),
                    default=10,
                )
                self.positions = nn.Parameter(torch.randn(longest, embedding) * 0.02)

    def applies(self, dataset: DatasetConfig) -> bool:
        return any(has_history(dataset, pattern) for pattern in dataset.patterns)

    def represent(self, history: Tensor, valid: Tensor, group: int) -> Tensor:
        """Return sequence vectors [n, D] of fused item vectors `history` [n * group, D] with
        `valid` bool [n * group].

        Not normalised; zero for a history without any valid item under mean pooling. Also used by
        evaluation.
        """
        if self.encoder is not None and not len(valid):
            # torch's attention refuses no rows: one absent history, cut away again, keeps the graph
            # as other ranks have it.
            one = torch.cat([history, history.new_zeros(group, history.shape[1])])
            return self.represent(one, valid.new_zeros(group), group)[:0]
        mask = valid.view(-1, group, 1)
        items = normalize(history, dim=-1).view(-1, group, history.shape[-1])
        items = torch.where(mask, items, 0.0)
        mean = items.sum(1) / mask.sum(1).clamp_min(1)
        if self.encoder is None:
            return mean
        # Unit vectors have elements of size 1/sqrt(D); the transformer wants them near 1.
        tokens = items * items.shape[-1] ** 0.5
        if self.positions is not None:
            if group > len(self.positions):
                raise ConfigurationError(
                    f"objectives.seq2item.positions: found {group} items, expected at most "
                    f"{len(self.positions)}; raise history_length"
                )
            tokens = tokens + self.positions[:group]
        tokens = torch.cat([self.token.expand(len(tokens), 1, -1), tokens], 1)
        absent = torch.cat([mask.new_zeros(len(tokens), 1), ~mask[..., 0]], 1)
        return mean + self.projection(self.encoder(tokens, src_key_padding_mask=absent)[:, 0])

    def forward(self, encoded: EncodedStep, context: ObjectiveContext) -> ObjectiveOutput:
        """Sum over the patterns from a history of weight times InfoNCE; absent history items are
        masked.
        """
        contrasts = []
        for pattern in patterns_of(encoded, context, histories=True):
            history, target = pattern.query, pattern.target
            negatives = negatives_of(encoded, pattern, context)
            prefixes = self.matryoshka_sizes(context.prefixes)
            found = contrast(
                encoded,
                context,
                pattern,
                self.represent(history.fused, history.valid, history.group),
                target.fused,
                masks=Masks(
                    key_ids=target.known_ids,
                    query_valid=history.known_valid.view(-1, history.group).any(1),
                    key_valid=target.known_valid,
                ),
                negatives=replace(
                    negatives,
                    shared=negatives.hard is not None,
                    max_cosine=context.max_cosine(encoded.dataset, pattern.name, prefixes),
                ),
                symmetric=self.symmetric,
                prefixes=prefixes,
                key_log_probability=self._correction(encoded),
            )
            contrasts.append(found)
        return contrast_sum(contrasts, encoded, context)

    def _correction(self, encoded: EncodedStep) -> Tensor | None:
        """gamma times the log probability of each row's target [r]; None without a correction."""
        if not self.sampling_correction:
            return None
        if encoded.target_log_probability is None:
            raise ConfigurationError(
                f"objectives.seq2item.sampling_correction={self.sampling_correction}: records of "
                f"'{encoded.dataset}' have no "
                "`target_probability`, expected it in all of them; add it, or set the correction "
                "to 0"
            )
        return self.sampling_correction * encoded.target_log_probability
