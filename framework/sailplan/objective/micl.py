"""mICL: InfoNCE on each modality's own vectors, so that the fused vector cannot let one modality
go lazy.

    L = w_vision * InfoNCE(n_v, n_v+) + w_text * InfoNCE(n_t, n_t+)

n_v and n_t are the read-outs of the vision and text positions (NoteLLM-2, arXiv 2405.16789, section
4.2, which weighs text to vision 9:1). A modality counts in a pattern where both sides were declared
with it and at least one side has another modality too; where both are unimodal the fused vector is
that modality already. Same temperature as the pattern's InfoNCE, full size only.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sailplan.config.schema import DatasetConfig, ViewConfig
from sailplan.errors import ConfigurationError
from sailplan.objective.patterns import contrast, contrast_sum, has_history, patterns_of
from sailplan.objective.protocol import EncodedStep, Objective, ObjectiveContext, ObjectiveOutput
from sailplan_kernels import Masks

MODALITIES = ("text", "vision")


def shared_modalities(query: ViewConfig, target: ViewConfig) -> list[str]:
    """The modalities that both sides have, where their own vectors say more than the fused ones."""
    if len(query.modalities) == 1 and len(target.modalities) == 1:
        return []
    return [
        modality
        for modality in MODALITIES
        if modality in query.modalities and modality in target.modalities
    ]


class MICL(Objective):
    """Per-modality InfoNCE.

    text_weight, vision_weight: of the two terms; 0.9 and 0.1 after NoteLLM-2.
    symmetric: True, False, or None for each data set's own switch.

    Raises ConfigurationError for weights below 0 or both 0.
    """

    per_modality = True
    calls_kernels = True
    uses_hard_negatives = False

    def __init__(
        self,
        *,
        embedding: int,
        datasets: Mapping[str, DatasetConfig],
        text_weight: float = 0.9,
        vision_weight: float = 0.1,
        symmetric: bool | None = None,
    ) -> None:
        super().__init__()
        if min(text_weight, vision_weight) < 0 or text_weight + vision_weight == 0:
            found = f"text_weight={text_weight}, vision_weight={vision_weight}"
            raise ConfigurationError(
                f"objectives.micl: found {found}, expected at least 0, not both 0"
            )
        self.weights = {"text": text_weight, "vision": vision_weight}
        self.symmetric = symmetric

    def applies(self, dataset: DatasetConfig) -> bool:
        return any(
            shared_modalities(dataset.views[pattern.query], dataset.views[pattern.target])
            for name, pattern in dataset.patterns.items()
            if not has_history(dataset, name)
        )

    def forward(self, encoded: EncodedStep, context: ObjectiveContext) -> ObjectiveOutput:
        """Sum over patterns and shared modalities of pattern weight times modality weight times
        InfoNCE.
        """
        contrasts = []
        for pattern in patterns_of(encoded, context, histories=False):
            for modality in shared_modalities(pattern.query_view, pattern.target_view):
                if self.weights[modality] == 0:
                    continue
                queries = pattern.query.by_modality.get(modality)
                keys = pattern.target.by_modality.get(modality)
                if queries is None or keys is None:
                    raise ConfigurationError(
                        f"objectives.micl: found no {modality} vectors, expected an encoder that has "
                        "them apart from the row's (per_modality); leave micl out of this stage"
                    )
                found = contrast(
                    encoded,
                    context,
                    pattern,
                    queries,
                    keys,
                    masks=Masks(
                        query_ids=pattern.query.ids,
                        key_ids=pattern.target.ids,
                        query_valid=pattern.query.valid & present(queries),
                        key_valid=pattern.target.valid & present(keys),
                    ),
                    symmetric=self.symmetric,
                    prefixes=None,
                    name=modality,
                    weight=self.weights[modality],
                )
                contrasts.append(found)
        return contrast_sum(contrasts, encoded, context)


def present(vectors: Tensor) -> Tensor:
    """bool [n]: rows whose item has the modality; the encoder gives a zero vector where it is
    absent.
    """
    return (vectors.detach() != 0).any(1)
