"""What a loss gets and gives.

A new loss is one file beside this one, one YAML in conf/objective and one test.

Convention across ranks (docs/exactness.md): the mean over data-parallel ranks of the returned
losses is the full-batch loss, and gradients flow through `exchange.gather` so that the mean over
ranks of the parameter gradients is the full-batch gradient. No objective imports torch.distributed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from sailplan.config.schema import DatasetConfig, PatternKey, StageConfig
from sailplan.data.negatives import MatchThreshold
from sailplan.data.record import TeacherKey, ViewKey
from sailplan.errors import ConfigurationError
from sailplan.objective.operands import HALF, Rounded
from sailplan.objective.temperature import Temperatures
from sailplan_kernels import Prefixes
from sailplan_kernels.exchange import Exchange

Datasets = Mapping[str, DatasetConfig]


@dataclass
class EncodedView:
    """Embeddings of one view in the step's row order (see data.record.ViewBatch)."""

    fused: Tensor  # [r * g, D]
    valid: Tensor  # bool [r * g]
    ids: Tensor  # int64 [r * g]
    group: int = 1
    by_modality: dict[str, Tensor] = field(
        default_factory=dict
    )  # modality -> [r * g, D], where an objective asked for them
    tokens: Tensor | None = None  # [r * g, t, D] of positions, where an objective asked for them
    token_mask: Tensor | None = None  # bool [r * g, t]: which there are
    host_valid: Tensor | None = None  # `valid` on the CPU, where the loader made it
    host_ids: Tensor | None = None

    @property
    def known_valid(self) -> Tensor:
        """bool [r * g] for the kernels: on the CPU where it is known there, which saves the
        device the work.
        """
        return self.valid if self.host_valid is None else self.host_valid

    @property
    def known_ids(self) -> Tensor:
        """int64 [r * g], as `known_valid`."""
        return self.ids if self.host_ids is None else self.host_ids


@dataclass
class EncodedStep:
    """One data set's part of a step, encoded."""

    dataset: str
    views: dict[ViewKey, EncodedView]
    patterns: dict[str, float]  # pattern name -> weight
    scores: Tensor | None = None
    teachers: dict[TeacherKey, Tensor] = field(default_factory=dict)
    teacher_scores: Tensor | None = None  # [r, 1 + n], see data.record.StepBatch
    labels: Tensor | None = None  # [r] on the CPU, see data.record.StepBatch
    target_log_probability: Tensor | None = None  # [r], see data.record.StepBatch
    host_scores: Tensor | None = None  # `scores` on the CPU
    rank_rows: tuple[int, ...] | None = (
        None  # of every data-parallel rank, see data.record.StepBatch
    )

    def detach(self) -> EncodedStep:
        """The same numbers without a graph."""
        views = {
            name: replace(
                view,
                fused=view.fused.detach(),
                by_modality={
                    modality: each.detach() for modality, each in view.by_modality.items()
                },
                tokens=None if view.tokens is None else view.tokens.detach(),
            )
            for name, view in self.views.items()
        }
        return replace(self, views=views)

    def cut(self, size: int) -> EncodedStep:
        """The same with the first `size` dimensions of every vector."""
        views = {
            name: replace(
                view,
                fused=view.fused[..., :size],
                by_modality={
                    modality: each[..., :size] for modality, each in view.by_modality.items()
                },
            )
            for name, view in self.views.items()
        }
        return replace(self, views=views)


@dataclass(frozen=True)
class ObjectiveContext:
    """What an objective may use besides the encodings."""

    datasets: dict[str, DatasetConfig]
    exchange: Exchange  # over the data-parallel group
    temperatures: Temperatures
    prefixes: tuple[int, ...]  # model.prefixes, see Objective.matryoshka_sizes
    backend: str = "auto"
    thresholds: dict[PatternKey, MatchThreshold] = field(
        default_factory=dict
    )  # lambda*, while in-batch masking is on
    compute_dtype: torch.dtype = (
        torch.float32
    )  # what the encoder computed in; the encodings are float32 also where it is half precision
    rounded: dict[int, Rounded] = field(
        default_factory=dict, init=False, repr=False
    )  # by the vectors' identity
    ran: set[str] = field(
        default_factory=set, init=False
    )  # "BACKEND DTYPE" of the calls of kernels so far, see objective.backends

    def max_cosine(
        self, dataset: str, pattern: str, prefixes: Prefixes | None
    ) -> float | dict[int, float] | None:
        """Return the cosine that in-batch negatives of a pattern stay below, for each prefix that
        the loss is paid at; None: no limit.
        """
        found = self.thresholds.get(PatternKey(dataset, pattern))
        return None if found is None else found.at(prefixes)

    def operands(self, vectors: Tensor) -> Tensor:
        """Vectors [..., D] as a loss's kernels should read and exchange them: normalised and
        rounded where half precision computes.

        Else, and where they are in that precision already, the vectors themselves. Vectors are
        rounded once, however often they are asked for: ask for a view's own tensor, not for a slice
        made anew.
        """
        if self.compute_dtype not in HALF or vectors.dtype is self.compute_dtype:
            return vectors
        if id(vectors) not in self.rounded:
            self.rounded[id(vectors)] = Rounded(
                vectors, self.compute_dtype
            )  # it keeps them, so their identity stays theirs
        return self.rounded[id(vectors)].read()


@dataclass(frozen=True)
class ObjectiveOutput:
    loss: Tensor  # 0-d
    metrics: dict[str, Tensor] = field(
        default_factory=dict
    )  # name -> 0-d detached, this rank's share: averaged over ranks when logged


class Objective(nn.Module):
    """Base of all losses.

    Constructor keyword arguments are the options of conf/objective/NAME.yaml,
    plus `embedding` (D), `datasets` (dict[str, DatasetConfig]). Every loss has the options
    `matryoshka` and `prefix_weights` besides (`pay_at`), and need not know of them: a call of an
    objective cuts the vectors and calls `forward` for each size."""

    per_modality = False  # True: the encoder must return the modalities' own vectors too
    # True: it must return the vectors of positions too; few can (`Encoder.gives_tokens`)
    per_token = False
    # True: it scores rows in sailplan_kernels (patterns.contrast); else in torch alone, in float32
    # or float64
    calls_kernels = False
    # False: mined hard negatives mean nothing to it; a stage whose losses all say so mines none
    uses_hard_negatives = True
    # Settings of data sets, label or teacher_scores, whose values it learns from: one that no loss
    # of a stage with that set names is refused
    reads: tuple[Literal["label", "teacher_scores"], ...] = ()
    # How `matryoshka` makes it a loss of several sizes. cut: `forward` gets the vectors cut to each
    # size in turn; own: `forward` itself pays at `matryoshka_sizes`, as the kernels do in one pass;
    # None: it needs whole vectors, and refuses
    prefix_support: Literal["cut", "own"] | None = "cut"
    matryoshka = False  # unless an entry says otherwise
    _matryoshka: bool | None = None
    _prefix_weights: Mapping[int, float] | None = None
    artifact: str | None = (
        # What a stage must list in its `artifacts` for this loss to have anything to learn from
        None
    )

    def applies(self, dataset: DatasetConfig) -> bool:
        """Whether this loss has a meaning for the data set."""
        raise NotImplementedError

    def check_use(self, key: str, stages: Sequence[StageConfig], datasets: Datasets) -> None:
        """Raise ConfigurationError for an option that has no effect in the stages that use it.

        key: dotted key of the objective's options, with which messages begin.
        """

    def forward(self, encoded: EncodedStep, context: ObjectiveContext) -> ObjectiveOutput:
        raise NotImplementedError

    def pay_at(
        self,
        matryoshka: bool,
        prefix_weights: Mapping[int, float] | None = None,
        *,
        key: str = "objective",
    ) -> Self:
        """Make it a loss at every prefix of the model's, or at the full size only; return itself.

        prefix_weights: size -> weight; None: 1 each. key: of the options, with which messages
        begin. Raises ConfigurationError where the loss needs whole vectors, and for weights that
        mean nothing.
        """
        if not isinstance(matryoshka, bool):
            raise ConfigurationError(
                f"{key}.matryoshka={matryoshka}: expected true or false; weights of sizes are "
                "prefix_weights"
            )
        if matryoshka and self.prefix_support is None:
            raise ConfigurationError(
                f"{key}.matryoshka=True: {type(self).__name__} needs whole vectors; leave it out"
            )
        if prefix_weights is not None:
            if not matryoshka:
                raise ConfigurationError(
                    f"{key}.prefix_weights: found beside matryoshka=false, expected one of them"
                )
            prefix_weights = {int(size): float(each) for size, each in prefix_weights.items()}
            if not all(each >= 0 for each in prefix_weights.values()) or not any(
                prefix_weights.values()
            ):
                raise ConfigurationError(
                    f"{key}.prefix_weights={prefix_weights}: expected at least 0, one above 0"
                )
        self._matryoshka, self._prefix_weights = matryoshka, prefix_weights
        return self

    def matryoshka_sizes(self, prefixes: Sequence[int]) -> dict[int, float] | None:
        """Return the sizes of the embedding at which the loss is paid, with their weights, of
        model.prefixes; None: the full size alone.

        Raises ConfigurationError for weights of other sizes.
        """
        if not (type(self).matryoshka if self._matryoshka is None else self._matryoshka):
            return None
        weights = self._prefix_weights or dict.fromkeys(prefixes, 1.0)
        if set(weights) != set(prefixes):
            raise ConfigurationError(
                f"objectives.*.prefix_weights: found sizes {sorted(weights)}, expected "
                f"model.prefixes {sorted(prefixes)}"
            )
        return {size: weights[size] for size in prefixes}

    def __call__(self, encoded: EncodedStep, context: ObjectiveContext) -> ObjectiveOutput:
        """Return the loss of a step's part; of several sizes their weighted sum, and the metrics
        of the last.
        """
        sizes = self.matryoshka_sizes(context.prefixes) if self.prefix_support == "cut" else None
        if sizes is None:
            output: ObjectiveOutput = super().__call__(encoded, context)
            return output
        parts = {
            size: super(Objective, self).__call__(encoded.cut(size), context)
            for size, weight in sizes.items()
            if weight
        }
        *_, last = parts.values()
        total = torch.stack([sizes[size] * part.loss for size, part in parts.items()]).sum()
        paid = {f"loss@{size}": part.loss.detach() for size, part in parts.items()}
        return ObjectiveOutput(total, last.metrics | (paid if len(paid) > 1 else {}))


class HistoryObjective(Objective):
    """Base of losses that learn one vector for a history of items: evaluation represents
    histories by it.
    """

    def represent(self, history: Tensor, valid: Tensor, group: int) -> Tensor:
        """Return a vector [n, D] for each history, of its items' vectors [n * group, D]; valid:
        bool [n * group].
        """
        raise NotImplementedError
