"""id2item: distil what a recommender knows of an item, its ID embeddings, into the content
embedding.

Each teacher is a table of ID embeddings (from a factorisation of interactions, say). A projection
maps the item's L2-normalised fused vector to the teacher's space, where it is compared with the
teacher's vector e of the item:

    cosine      1 - cos(f(z), e)
    mse         mean over dimensions of (f(z) - e)^2
    relational  KL between the rows of the two similarity matrices of the batch (all ranks), each
    row a softmax of
                cosines / tau over the other items (Passalis & Tefas, "Probabilistic Knowledge
                Transfer", ECCV 2018)

The recipe leaves the form open; cosine is the default. Items that a teacher does not know are
masked, the mean is over known rows of all ranks, and the loss is the mean over (view, teacher)
pairs. The recipe's auxiliary item-to-item loss is the objective `infonce` in the same stage.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from sailplan.config.schema import DatasetConfig
from sailplan.errors import ConfigurationError
from sailplan.objective.patterns import check_positive, zero_loss
from sailplan.objective.protocol import EncodedStep, Objective, ObjectiveContext, ObjectiveOutput

TEMPERATURE = 0.1  # of the relational form
FORMS = ("cosine", "mse", "relational")


class ID2Item(Objective):
    """Distillation of ID embeddings.

    teachers: name -> dimension of its vectors.
    form: cosine, mse or relational.
    hidden: width of a GELU layer in each projection; None: one linear map.
    similarity_temperature: tau of the relational form.
    sets: data sets with teachers; None: every data set. On a set without known items the loss is 0.

    Raises ConfigurationError for an empty or senseless option; at the first step for teachers that
    do not fit the batch.
    """

    artifact = "teachers"
    uses_hard_negatives = False
    prefix_support = None  # projections are of the whole vector

    def __init__(
        self,
        *,
        embedding: int,
        datasets: Mapping[str, DatasetConfig],
        teachers: Mapping[str, int] | None = None,
        form: str = "cosine",
        hidden: int | None = None,
        similarity_temperature: float = TEMPERATURE,
        sets: list[str] | None = None,
    ) -> None:
        super().__init__()
        if not teachers or any(not isinstance(size, int) or size < 1 for size in teachers.values()):
            raise ConfigurationError(
                f"objectives.id2item.teachers={dict(teachers or {})}: expected name: dimension, at "
                "least one"
            )
        if any("." in name for name in teachers):
            raise ConfigurationError(
                f"objectives.id2item.teachers={dict(teachers)}: found a dot in a name; rename the "
                "teacher"
            )
        if form not in FORMS:
            raise ConfigurationError(
                f"objectives.id2item.form={form}: expected one of {', '.join(FORMS)}"
            )
        if form != "relational" and similarity_temperature != TEMPERATURE:
            raise ConfigurationError(
                f"objectives.id2item.similarity_temperature={similarity_temperature}: has no "
                f"effect with form={form}; leave it out, or set form=relational"
            )
        if hidden is not None:
            check_positive("id2item.hidden", hidden)
        check_positive("id2item.similarity_temperature", similarity_temperature)
        unknown = [name for name in sets or [] if name not in datasets]
        if unknown:
            raise ConfigurationError(
                f"objectives.id2item.sets: found {', '.join(unknown)}, expected some of "
                f"{', '.join(datasets)}"
            )
        self.form = form
        self.similarity_temperature = similarity_temperature
        self.sets = None if sets is None else [datasets[name] for name in sets]
        self.projections = nn.ModuleDict(
            {name: _projection(embedding, size, hidden) for name, size in teachers.items()}
        )
        self.sizes = dict(teachers)

    def applies(self, dataset: DatasetConfig) -> bool:
        return self.sets is None or any(dataset is own or dataset == own for own in self.sets)

    def forward(self, encoded: EncodedStep, context: ObjectiveContext) -> ObjectiveOutput:
        """Mean over the batch's (view, teacher) pairs; metrics: rows known and mean cosine, per
        pair.
        """
        losses, metrics = [], {}
        for key in sorted(encoded.teachers):
            view_name, teacher = key
            if teacher not in self.projections:
                continue
            view = encoded.views[view_name]
            vectors = encoded.teachers[key].to(view.fused)
            if vectors.shape != (len(view.fused), self.sizes[teacher]):
                raise ConfigurationError(
                    f"objectives.id2item.teachers.{teacher}={self.sizes[teacher]}: found vectors "
                    f"{tuple(vectors.shape)}, expected "
                    f"{self.sizes[teacher]} values for each of the {len(view.fused)} rows of "
                    f"'{view_name}'; set the table's dimension"
                )
            projected = self.projections[teacher](normalize(view.fused, dim=1))
            known = view.valid & (vectors != 0).any(1)
            cosines = cosine_similarity(projected, vectors, dim=1)
            if self.form == "relational":
                values, known = self._relational(projected, vectors, known, view.ids, context)
            else:
                values = (
                    1 - cosines if self.form == "cosine" else (projected - vectors).square().mean(1)
                )
            rows = context.exchange.sum(known.sum())
            share = context.exchange.world_size / rows.clamp_min(1).to(values.dtype)
            losses.append(torch.where(known, values, 0.0).sum() * share)
            metrics[f"{key}/rows"] = rows.to(values.dtype)
            metrics[f"{key}/cosine"] = torch.where(known, cosines.detach(), 0.0).sum() * share
        if encoded.teachers and not losses:
            names = ", ".join(map(str, sorted(encoded.teachers)))
            raise ConfigurationError(
                f"objectives.id2item.teachers: found {', '.join(self.sizes)}, expected some of the "
                f"batch's {names}"
            )
        if not losses:
            return ObjectiveOutput(zero_loss(encoded))
        return ObjectiveOutput(torch.stack(losses).mean(), metrics)

    def _relational(
        self,
        projected: Tensor,
        vectors: Tensor,
        known: Tensor,
        ids: Tensor,
        context: ObjectiveContext,
    ) -> tuple[Tensor, Tensor]:
        """KL of each row's similarity distribution [r], and which rows count: those with another
        known item to compare with.
        """
        student, teacher = normalize(projected, dim=1), normalize(vectors, dim=1)
        sizes = context.exchange.sizes(len(ids))
        all_students, all_teachers = (
            context.exchange.gather(student, sizes),
            context.exchange.gather(teacher, sizes),
        )
        all_known, all_ids = (
            context.exchange.gather(known, sizes),
            context.exchange.gather(ids, sizes),
        )
        others = all_known[None] & (ids[:, None] != all_ids[None])
        known = known & others.any(1)
        others = (
            others | ~known[:, None]
        )  # a row that does not count gets any support, so that no NaN arises
        student_log = torch.where(
            others, student @ all_students.T / self.similarity_temperature, -torch.inf
        ).log_softmax(1)
        teacher_log = torch.where(
            others, teacher @ all_teachers.T / self.similarity_temperature, -torch.inf
        ).log_softmax(1)
        difference = torch.where(others, teacher_log - student_log, 0.0)
        return (teacher_log.exp() * difference).sum(1), known


def _projection(embedding: int, size: int, hidden: int | None) -> nn.Module:
    if hidden is None:
        return nn.Linear(embedding, size)
    return nn.Sequential(nn.Linear(embedding, hidden), nn.GELU(), nn.Linear(hidden, size))
