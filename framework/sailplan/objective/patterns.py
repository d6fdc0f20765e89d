"""The patterns of a step, resolved to their encoded sides, and the one contrastive call that
several losses share.

A pattern is a pair of views that the data set wants matched, with a weight. The views were encoded
once; every pattern reads them from there. A row that lacks a side is masked, and each pattern's
mean is over its valid rows on all ranks (recipe: data-set-driven pattern matching).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sailplan.config.fields import JsonObject
from sailplan.config.schema import DatasetConfig, PatternKey, ViewConfig
from sailplan.data.record import HardNegatives
from sailplan.errors import ConfigurationError
from sailplan.objective.backends import described
from sailplan.objective.protocol import EncodedStep, EncodedView, ObjectiveContext, ObjectiveOutput
from sailplan_kernels import LossOptions, Masks, Negatives, PositiveIds, Prefixes, infonce_sum


@dataclass(frozen=True)
class Pattern:
    """One pattern of this step: its weight, both sides' encodings, and what the sides were
    declared as.
    """

    name: str
    weight: float
    query: EncodedView
    target: EncodedView
    query_view: ViewConfig
    target_view: ViewConfig


def has_history(dataset: DatasetConfig, pattern: str) -> bool:
    """Whether the pattern's query is a sequence of items."""
    return dataset.views[dataset.patterns[pattern].query].of == "history"


def patterns_of(
    encoded: EncodedStep, context: ObjectiveContext, *, histories: bool
) -> list[Pattern]:
    """The step's patterns whose query is (`histories`) or is not a sequence, by name: the same
    order on all ranks.

    Raises ConfigurationError for a pattern or view that the data set or the step does not have.
    """
    dataset = context.datasets[encoded.dataset]
    found = []
    for name, weight in sorted(encoded.patterns.items()):
        if name not in dataset.patterns:
            raise ConfigurationError(
                f"stages.*.patterns.{encoded.dataset}: found '{name}', expected one of "
                f"{', '.join(dataset.patterns)}; correct the name"
            )
        if has_history(dataset, name) != histories:
            continue
        pattern = dataset.patterns[name]
        for side in (pattern.query, pattern.target):
            if side not in encoded.views:
                raise ConfigurationError(
                    f"data.sets.{encoded.dataset}.patterns.{name}: view '{side}' is not in the "
                    "step, expected it beside "
                    f"{', '.join(map(str, encoded.views))}; list the pattern in the stage's patterns"
                )
        query, target = encoded.views[pattern.query], encoded.views[pattern.target]
        found.append(
            Pattern(
                name,
                weight,
                query,
                target,
                dataset.views[pattern.query],
                dataset.views[pattern.target],
            )
        )
    return found


def zero_loss(encoded: EncodedStep) -> Tensor:
    """0-d zero of the encodings' dtype and device, to which losses are added."""
    return next(iter(encoded.views.values())).fused.new_zeros(())


def pair_masks(pattern: Pattern, *, same_ids: bool = True) -> Masks:
    """Return masks of a pattern's rows: padding, absent sides and, with `same_ids`, keys that are
    the same document as the positive or belong to the same query.
    """
    query, target = pattern.query, pattern.target
    valid = {"query_valid": query.known_valid, "key_valid": target.known_valid}
    if not same_ids:
        return Masks(**valid)
    return Masks(
        query_ids=query.known_ids, key_ids=target.known_ids, key_query_ids=query.known_ids, **valid
    )


def both(one: Tensor, other: Tensor) -> Tensor:
    """Return `one & other` [r] on the device of `one`, whatever `other`'s."""
    return one & (other if other.device == one.device else other.to(one.device, non_blocking=True))


def without_low_grades(encoded: EncodedStep, context: ObjectiveContext, masks: Masks) -> Masks:
    """Return masks in which a graded pair whose score is not above the data set's
    `positive_score` is no positive: its row does not count, its key is still a negative of others.
    """
    scores = encoded.scores if encoded.host_scores is None else encoded.host_scores
    if scores is None or masks.query_valid is None:
        return masks
    graded = ~(scores <= context.datasets[encoded.dataset].positive_score)
    return replace(masks, query_valid=both(masks.query_valid, graded))


def loss_options(encoded: EncodedStep, context: ObjectiveContext) -> LossOptions:
    """Return the kernels' options of a step's part, one query and one key a row."""
    sizes = None if encoded.rank_rows is None else [(rows, rows) for rows in encoded.rank_rows]
    return LossOptions(backend=context.backend, sizes=sizes)


@dataclass(frozen=True)
class Contrast:
    """InfoNCE of row i's query with row i's key, to be summed with others: its arguments, and
    what its metrics are called.
    """

    weight: float
    label: str
    arguments: JsonObject  # of sailplan_kernels.infonce; vectors as they were encoded


def contrast(
    encoded: EncodedStep,
    context: ObjectiveContext,
    pattern: Pattern,
    queries: Tensor,
    keys: Tensor,
    *,
    masks: Masks,
    symmetric: bool | None,
    prefixes: Prefixes | None,
    negatives: Negatives | None = None,
    key_log_probability: Tensor | None = None,
    positives: PositiveIds | None = None,
    name: str = "",
    weight: float = 1.0,
) -> Contrast:
    """InfoNCE of row i's query [r, D] with row i's key [r, D] at the pattern's temperature,
    times the pattern's weight and `weight`.

    `symmetric` None: as the data set says. `name` goes into the metrics' names. The rest is as of
    `sailplan_kernels.infonce`; ids and masks may lie on the CPU.
    """
    arguments = {
        "queries": queries,
        "keys": keys,
        "temperature": context.temperatures.get(PatternKey(encoded.dataset, pattern.name)),
        "masks": without_low_grades(encoded, context, masks),
        "negatives": negatives,
        "positives": positives,
        "key_log_probability": key_log_probability,
        "symmetric": context.datasets[encoded.dataset].symmetric
        if symmetric is None
        else symmetric,
        "prefixes": prefixes,
        "options": loss_options(encoded, context),
    }
    return Contrast(
        pattern.weight * weight, f"{pattern.name}/{name}" if name else pattern.name, arguments
    )


def contrast_sum(
    contrasts: Sequence[Contrast], encoded: EncodedStep, context: ObjectiveContext
) -> ObjectiveOutput:
    """The weighted sum of an objective's contrasts of one data set, whose ranks meet once for
    all of them, and their metrics.

    The kernels read all vectors as `ObjectiveContext.operands` gives them, a view's once however
    many contrasts look at it. Loss and metrics are this rank's shares: their mean over ranks is the
    value over all valid rows.
    """
    if not contrasts:
        return ObjectiveOutput(zero_loss(encoded))
    read: dict[int, Tensor] = {}

    def operand(vectors: Tensor) -> Tensor:
        if id(vectors) not in read:
            read[id(vectors)] = context.operands(vectors)
        return read[id(vectors)]

    calls = [
        each.arguments | {name: operand(each.arguments[name]) for name in ("queries", "keys")}
        for each in contrasts
    ]
    total, outputs = infonce_sum(
        calls, [each.weight for each in contrasts], exchange=context.exchange
    )
    metrics: dict[str, Tensor] = {}
    for each, call, output in zip(contrasts, calls, outputs, strict=True):
        context.ran.update(
            described(backend, call["queries"].dtype) for backend in output.backend.split(" + ")
        )
        share = context.exchange.world_size / output.valid_rows.clamp_min(1).to(output.loss.dtype)
        metrics[f"{each.label}/accuracy"] = output.accuracy
        metrics[f"{each.label}/positive_score"] = output.positive_score.sum() * share
        prefixes = call["prefixes"]
        if prefixes is not None and len(prefixes) > 1:
            metrics |= {
                f"{each.label}/loss@{prefix}": loss
                for prefix, loss in zip(prefixes, output.prefix_losses, strict=True)
            }
    return ObjectiveOutput(total, metrics)


def negatives_of(encoded: EncodedStep, pattern: Pattern, context: ObjectiveContext) -> Negatives:
    """Hard negatives [r, g, D] with their validity [r, g]: those mined for the pattern and the
    records' own; empty without any.
    """
    view = encoded.views.get(HardNegatives(pattern.name))
    if view is None:
        return Negatives()
    rows = (len(view.ids) // view.group, view.group)
    return Negatives(
        hard=context.operands(view.fused).unflatten(0, rows), hard_valid=view.known_valid.view(rows)
    )


def check_margins(name: str, margin_absolute: float | None, margin_relative: float | None) -> None:
    """Raise ConfigurationError for margins that would drop every negative or none."""
    if margin_absolute is not None and not 0 <= margin_absolute < 2:
        raise ConfigurationError(
            f"objectives.{name}.margin_absolute={margin_absolute}: expected 0 to 2 (a difference "
            "of cosines) or null"
        )
    if margin_relative is not None and not 0 < margin_relative <= 2:
        raise ConfigurationError(
            f"objectives.{name}.margin_relative={margin_relative}: expected a factor above 0, at "
            "most 2, or null"
        )


def check_positive(key: str, value: float) -> None:
    """Raise ConfigurationError where a number that must be above 0 is not."""
    if not value > 0:
        raise ConfigurationError(f"objectives.{key}={value}: expected a number above 0")
