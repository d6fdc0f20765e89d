"""InfoNCE over every pattern of the step, at every Matryoshka prefix, with mined hard negatives
and three kinds of masks against false negatives.

    L = sum over patterns of weight * sum over prefixes d of mean over valid rows i of
        -log e^{s_ii/t} / (e^{s_ii/t} + sum over hard negatives e^{s_ih/t} + sum over in-batch
        negatives e^{s_ij/t})

with s the cosine of the first d dimensions, each prefix normalised anew (Kusupati et al.,
"Matryoshka Representation Learning", arXiv 2205.13147), and t the pattern's learnable temperature.
In-batch negatives are the keys of all data-parallel ranks. Not negatives of a row: keys with the id
of its positive, keys of the same query, keys whose cosine reaches the pattern's lambda* of that prefix
(recipe 2.1), and, by option, keys above a margin over the positive (Qwen3-Embedding: s_ij > s_ii + 0.1;
NV-Retriever: s_ij > 0.95 s_ii).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sailplan.config.schema import DatasetConfig, StageConfig
from sailplan.data.record import HardNegatives
from sailplan.errors import ConfigurationError
from sailplan.objective.patterns import (
    Pattern,
    check_margins,
    contrast,
    contrast_sum,
    has_history,
    negatives_of,
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
from sailplan_kernels import Negatives


class InfoNCE(Objective):
    """The main loss.

    symmetric: True, False, or None for each data set's own switch.
    mask_same_ids: keys that are the same document as the positive, or belong to the same query, are
    no negatives.
    margin_absolute, margin_relative: drop negatives above s_ii + margin, above s_ii * margin; None:
    off.
    shared_hard_negatives: a row's mined negatives serve every row of its rank's exchange.
    query_negatives, key_negatives: query-query and key-key similarities join the denominator.

    Raises ConfigurationError for options that mean nothing.
    """

    calls_kernels = True
    prefix_support = "own"
    matryoshka = True

    def __init__(
        self,
        *,
        embedding: int,
        datasets: Mapping[str, DatasetConfig],
        symmetric: bool | None = None,
        mask_same_ids: bool = True,
        margin_absolute: float | None = None,
        margin_relative: float | None = None,
        shared_hard_negatives: bool = False,
        query_negatives: bool = False,
        key_negatives: bool = False,
    ) -> None:
        super().__init__()
        check_margins("infonce", margin_absolute, margin_relative)
        self.symmetric = symmetric
        self.mask_same_ids = mask_same_ids
        self.shared_hard_negatives = shared_hard_negatives
        self.negatives = Negatives(
            queries=query_negatives,
            keys=key_negatives,
            margin_absolute=margin_absolute,
            margin_relative=margin_relative,
        )

    def applies(self, dataset: DatasetConfig) -> bool:
        return any(not has_history(dataset, pattern) for pattern in dataset.patterns)

    def check_use(self, key: str, stages: Sequence[StageConfig], datasets: Datasets) -> None:
        """Raise ConfigurationError for shared negatives where there are none to share."""
        if self.shared_hard_negatives and not any(
            stage.hard_negatives is not None or any(datasets[name].negatives for name in stage.data)
            for stage in stages
        ):
            raise ConfigurationError(
                f"{key}.shared_hard_negatives=True: has no effect, as no stage mines negatives and "
                "no data set brings its own; leave it out, or give a stage hard_negatives"
            )

    def forward(self, encoded: EncodedStep, context: ObjectiveContext) -> ObjectiveOutput:
        """Sum over patterns of weight times InfoNCE; per pattern: accuracy, mean cosine of the
        positives, loss of each prefix.
        """
        contrasts = [
            contrast(
                encoded,
                context,
                pattern,
                pattern.query.fused,
                pattern.target.fused,
                masks=pair_masks(pattern, same_ids=self.mask_same_ids),
                negatives=self._negatives(encoded, pattern, context),
                symmetric=self.symmetric,
                prefixes=self.matryoshka_sizes(context.prefixes),
            )
            for pattern in patterns_of(encoded, context, histories=False)
        ]
        return contrast_sum(contrasts, encoded, context)

    def _negatives(
        self, encoded: EncodedStep, pattern: Pattern, context: ObjectiveContext
    ) -> Negatives:
        found = negatives_of(encoded, pattern, context)
        valid, shared = found.hard_valid, found.hard is not None and self.shared_hard_negatives
        if valid is not None and self.mask_same_ids:
            # The kernel's masks know ids of keys only; a mined negative may be the positive under
            # another record, and in item-to-item patterns the query's own item.
            ids = encoded.views[HardNegatives(pattern.name)].known_ids.view_as(valid)
            valid = (
                valid
                & (ids != pattern.target.known_ids[:, None])
                & (ids != pattern.query.known_ids[:, None])
            )
        prefixes = self.matryoshka_sizes(context.prefixes)
        highest = context.max_cosine(encoded.dataset, pattern.name, prefixes)
        return replace(
            self.negatives, hard=found.hard, hard_valid=valid, shared=shared, max_cosine=highest
        )
