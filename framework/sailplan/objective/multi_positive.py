"""Multi-positive contrast: all rows of the global batch that have a row's label are its positives.

    L = sum over patterns of weight * mean over labelled rows i of
        1 / |P(i)| * sum over p in P(i) of -log e^{s_ip/t} / (e^{s_ip/t} + sum over n e^{s_in/t})

P(i): the targets of all ranks with the label of query i, its own among them; n: those of other
labels. It is the form of supervised contrastive learning with the sum over positives outside of the
logarithm (L_out: Khosla et al., NeurIPS 2020, arXiv 2004.11362, equation 2), which they found better
than the other one (equation 3), with one difference: i's other positives are left out of the
denominator, where they would be pushed away. Khosla et al. compare two views of every picture; so
does a pattern of two views that show the same thing, augmented differently.

A label is the value of a key of the record (`data.sets.NAME.label`): a class, a group, an author. A
record without one does not take part, not as a negative either: it may be of any class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sailplan.config.schema import DatasetConfig, StageConfig
from sailplan.errors import ConfigurationError
from sailplan.objective.patterns import (
    both,
    contrast,
    contrast_sum,
    has_history,
    pair_masks,
    patterns_of,
)
from sailplan.objective.protocol import (
    Datasets,
    EncodedStep,
    Objective,
    ObjectiveContext,
    ObjectiveOutput,
)
from sailplan_kernels import PositiveIds


class MultiPositive(Objective):
    """Contrast with all rows of the same label as positives.

    symmetric: True, False, or None for each data set's own switch.
    """

    calls_kernels = True
    prefix_support = "own"
    uses_hard_negatives = False
    reads = ("label",)

    def __init__(
        self,
        *,
        embedding: int,
        datasets: Mapping[str, DatasetConfig],
        symmetric: bool | None = None,
    ) -> None:
        super().__init__()
        self.symmetric = symmetric

    def applies(self, dataset: DatasetConfig) -> bool:
        return dataset.label is not None and any(
            not has_history(dataset, pattern) for pattern in dataset.patterns
        )

    def check_use(self, key: str, stages: Sequence[StageConfig], datasets: Datasets) -> None:
        """Raise ConfigurationError also for a pattern whose rows would find themselves."""
        for stage in stages:
            for name in filter(lambda name: self.applies(datasets[name]), stage.data):
                for pattern in stage.patterns.get(name) or datasets[name].patterns:
                    declared = datasets[name].patterns.get(pattern)
                    if declared is not None and declared.query == declared.target:
                        raise ConfigurationError(
                            f"data.sets.{name}.patterns.{pattern}: found the view "
                            f"'{declared.query}' on both sides, of which a row's nearest is the "
                            f"row itself, expected two views in a set that {key} is used for; "
                            "declare the view again under another name"
                        )

    def forward(self, encoded: EncodedStep, context: ObjectiveContext) -> ObjectiveOutput:
        """Sum over patterns of weight times the loss; metrics as InfoNCE's, and labelled rows."""
        labels = encoded.labels
        if labels is None:
            raise ConfigurationError(
                f"data.sets.{encoded.dataset}.label: the step's records came without labels, "
                "expected those of this key; name it"
            )
        known = labels >= 0
        contrasts = []
        for pattern in patterns_of(encoded, context, histories=False):
            masks = pair_masks(pattern, same_ids=False)
            assert masks.query_valid is not None and masks.key_valid is not None
            found = contrast(
                encoded,
                context,
                pattern,
                pattern.query.fused,
                pattern.target.fused,
                positives=PositiveIds(labels),
                masks=replace(
                    masks,
                    key_ids=labels,
                    query_valid=both(masks.query_valid, known),
                    key_valid=both(masks.key_valid, known),
                ),
                symmetric=self.symmetric,
                prefixes=self.matryoshka_sizes(context.prefixes),
            )
            contrasts.append(found)
        output = contrast_sum(contrasts, encoded, context)
        rows = known.sum().to(output.loss) * context.exchange.world_size  # whose mean is the sum
        return replace(output, metrics=output.metrics | {"labelled_rows": rows})
