"""Score distillation: a record's target and its own negatives should be scored as a teacher, such
as a cross-encoder, scores them.

With s_0 the cosine of query and target, s_1 .. s_n those with the record's negatives, T the
temperature, and t_0 .. t_n the teacher's scores over its own temperature:

    kl          sum over c of p_c (log p_c - log q_c),  p = softmax(t), q = softmax(s / T)
    margin_mse  mean over negatives c of ((s_0 - s_c) / T - (t_0 - t_c))^2

kl is what sentence-transformers calls DistillKLDivLoss, and the distillation of dense retrievers
from rerankers (RocketQAv2, arXiv 2110.07367, equation 3; BGE-M3); margin_mse is Hofstaetter et al.,
arXiv 2010.02666, equation 3. The teacher's scores stand in the records, under the key
`data.sets.NAME.teacher_scores`. Candidates without a score, and those that are absent, are left
out; a row with a score of the target and of at least one negative counts, and the mean is over such
rows of all ranks. Negatives that were mined here have no score, and take no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sailplan.config.schema import DatasetConfig
from sailplan.data.record import HardNegatives
from sailplan.errors import ConfigurationError
from sailplan.objective.patterns import check_positive, patterns_of, zero_loss
from sailplan.objective.protocol import EncodedStep, Objective, ObjectiveContext, ObjectiveOutput

Form = Literal["kl", "margin_mse"]
FORMS = ("kl", "margin_mse")


class ScoreDistillation(Objective):
    """Distillation of a teacher's scores of each record's target and negatives.

    form: kl or margin_mse.
    temperature: what cosines are divided by; fixed, as a learned one could make any student right.
    teacher_temperature: what the teacher's scores are divided by.

    Raises ConfigurationError for a form that there is not, and temperatures that are not above 0.
    """

    uses_hard_negatives = False
    reads = ("teacher_scores",)

    def __init__(
        self,
        *,
        embedding: int,
        datasets: Mapping[str, DatasetConfig],
        form: Form = "kl",
        temperature: float = 0.05,
        teacher_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ConfigurationError(
                f"objectives.score_distillation.form={form}: expected one of {', '.join(FORMS)}"
            )
        check_positive("score_distillation.temperature", temperature)
        check_positive("score_distillation.teacher_temperature", teacher_temperature)
        self.form, self.temperature, self.teacher_temperature = (
            form,
            temperature,
            teacher_temperature,
        )

    def applies(self, dataset: DatasetConfig) -> bool:
        return dataset.kind == "pairs" and dataset.teacher_scores is not None

    def forward(self, encoded: EncodedStep, context: ObjectiveContext) -> ObjectiveOutput:
        """Sum over patterns to a record's target of weight times the loss; per pattern: rows that
        count, and the share of these in which student and teacher rank the same candidate first.
        """
        total = zero_loss(encoded)
        metrics: dict[str, Tensor] = {}
        if encoded.teacher_scores is None:
            raise ConfigurationError(
                f"data.sets.{encoded.dataset}.teacher_scores: the step's records came without "
                "scores, expected those of this key; name it"
            )
        teacher = encoded.teacher_scores.to(total) / self.teacher_temperature
        for pattern in patterns_of(encoded, context, histories=False):
            if pattern.target_view.of != "target":
                continue
            negatives = encoded.views[HardNegatives(pattern.name)]
            own = teacher.shape[1] - 1  # the last ones of each row's group; mined ones lie before
            rows = (len(teacher), negatives.group)
            keys = torch.cat(
                [
                    pattern.target.fused[:, None],
                    negatives.fused.unflatten(0, rows)[:, rows[1] - own :],
                ],
                1,
            )
            present = torch.cat(
                [pattern.target.valid[:, None], negatives.valid.view(rows)[:, rows[1] - own :]], 1
            )
            known = present & ~teacher.isnan()
            counted = pattern.query.valid & known[:, 0] & known[:, 1:].any(1)
            # A row that does not count gets any support, so that no NaN arises.
            known = known | ~counted[:, None]
            cosines = cosine_similarity(pattern.query.fused[:, None], keys, dim=2)
            expected = torch.where(known, teacher.nan_to_num(), 0.0)
            values = self._row_losses(cosines / self.temperature, expected, known)
            count = context.exchange.sum(counted.sum())
            share = context.exchange.world_size / count.clamp_min(1).to(values.dtype)
            total = total + pattern.weight * torch.where(counted, values, 0.0).sum() * share
            best = [
                torch.where(known, scores.detach(), -torch.inf).argmax(1)
                for scores in (cosines, expected)
            ]
            agreed = (counted & (best[0] == best[1])).sum().to(values.dtype)
            metrics[f"{pattern.name}/scored_rows"] = count.to(values.dtype)
            metrics[f"{pattern.name}/teacher_agreement"] = agreed * share
        return ObjectiveOutput(total, metrics)

    def _row_losses(self, student: Tensor, teacher: Tensor, known: Tensor) -> Tensor:
        """Loss of each row [r]; all [r, c], the first candidate the target."""
        if self.form == "kl":
            logs = [
                torch.where(known, scores, -torch.inf).log_softmax(1)
                for scores in (student, teacher)
            ]
            difference = torch.where(known, logs[1] - logs[0], 0.0)
            return (logs[1].exp() * difference).sum(1)
        margins = [scores[:, :1] - scores[:, 1:] for scores in (student, teacher)]
        squares = torch.where(known[:, 1:], (margins[0] - margins[1]).square(), 0.0)
        return squares.sum(1) / known[:, 1:].sum(1).clamp_min(1)
