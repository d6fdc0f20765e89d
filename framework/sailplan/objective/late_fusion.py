"""Late fusion: a gate mixes the vision read-out back into the fused vector, for training only.

    g = sigmoid(W [v, n_m] + b)     n = g * v + (1 - g) * n_m     L = InfoNCE over n

v is the vision vector and n_m the fused one (NoteLLM-2, arXiv 2405.16789, section 4.3). It gives
the picture a short way to the loss; what is exported and evaluated is n_m. A row or side without a
picture keeps n = n_m. It applies to patterns in which a side has pictures beside another modality;
pictures alone have nothing to be fused with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sailplan.config.schema import DatasetConfig, ViewConfig
from sailplan.errors import ConfigurationError
from sailplan.objective.micl import present
from sailplan.objective.patterns import contrast, contrast_sum, has_history, patterns_of
from sailplan.objective.protocol import (
    EncodedStep,
    EncodedView,
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
)
from sailplan_kernels import Masks


def is_fused(view: ViewConfig) -> bool:
    """Whether the view has pictures and something beside them."""
    return "vision" in view.modalities and len(view.modalities) > 1


class LateFusion(Objective):
    """InfoNCE over gated vectors.

    symmetric: True, False, or None for each data set's own switch.
    matryoshka: the loss at every prefix, summed; False: at the full size.
    """

    per_modality = True
    calls_kernels = True
    uses_hard_negatives = False

    def __init__(
        self,
        *,
        embedding: int,
        datasets: Mapping[str, DatasetConfig],
        symmetric: bool | None = None,
        matryoshka: bool = False,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * embedding, embedding)
        self.symmetric = symmetric
        self.matryoshka = matryoshka

    def applies(self, dataset: DatasetConfig) -> bool:
        return any(
            is_fused(dataset.views[pattern.query]) or is_fused(dataset.views[pattern.target])
            for name, pattern in dataset.patterns.items()
            if not has_history(dataset, name)
        )

    def forward(self, encoded: EncodedStep, context: ObjectiveContext) -> ObjectiveOutput:
        """Sum over the patterns with a fused side of weight times InfoNCE over n."""
        fused: dict[int, Tensor] = {}  # a view's once, however many patterns it is in
        contrasts = []
        for pattern in patterns_of(encoded, context, histories=False):
            if not (is_fused(pattern.query_view) or is_fused(pattern.target_view)):
                continue
            for view, declared in (
                (pattern.query, pattern.query_view),
                (pattern.target, pattern.target_view),
            ):
                if id(view) not in fused:
                    fused[id(view)] = self.fuse(view, declared)
            found = contrast(
                encoded,
                context,
                pattern,
                fused[id(pattern.query)],
                fused[id(pattern.target)],
                masks=Masks(
                    query_ids=pattern.query.known_ids,
                    key_ids=pattern.target.known_ids,
                    query_valid=pattern.query.known_valid,
                    key_valid=pattern.target.known_valid,
                ),
                symmetric=self.symmetric,
                prefixes=context.prefixes if self.matryoshka else None,
            )
            contrasts.append(found)
        return contrast_sum(contrasts, encoded, context)

    def fuse(self, view: EncodedView, declared: ViewConfig) -> Tensor:
        """n [r, D] of a view; its fused vectors themselves where it is not declared with
        pictures beside something else.
        """
        if not is_fused(declared):
            return view.fused
        vision = view.by_modality.get("vision")
        if vision is None:
            raise ConfigurationError(
                "objectives.late_fusion: found no vision vectors, expected an encoder that has them "
                "apart from the row's (per_modality); leave late_fusion out of this stage"
            )
        gate = torch.sigmoid(self.gate(torch.cat([vision, view.fused], 1)))
        mixed = gate * vision + (1 - gate) * view.fused
        return torch.where(present(vision)[:, None], mixed, view.fused)
