"""The groups of arguments that the contrastive losses share.

N queries, M keys and H hard negatives a row on this rank. Integers and masks may lie on the CPU
whatever the device of the embeddings: they are combined there and uploaded in one copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

Prefixes = Sequence[int] | Mapping[int, float]


@dataclass(frozen=True)
class PositiveIds:
    """Positives by id: every valid key of ANY rank with the id that the row asks for.

    A row pays the mean over its positives p of softplus(lse_neg - cos(q, p) / t). Its other
    positives neither pull p's denominator up nor are they pushed (supervised contrastive, Khosla et
    al., NeurIPS 2020, eq. 2, with the positives left out of the denominator). A row without a
    positive does not count. Margins start from the row's best positive, which also decides the
    accuracy; the reported positive score is the mean.

    With ``symmetric`` the mean is over the pairs' two losses. Queries that want the key's id are no
    negatives of its column, whose temperature, margins and threshold come from all rows of all
    ranks that want it. With ``Negatives.keys`` each pair has a denominator of its own. Needs
    ``Masks.key_ids``.
    """

    ids: Tensor  # int64 [N], -1 for none


@dataclass(frozen=True)
class Masks:
    """What makes a key no negative of a row, and which rows are padding.

    A key with the id of the row's positive, or whose paired query has the row's query id, is no
    negative of that row. Padding may hold anything, also NaN. A row counts if it and its positive
    are valid.
    """

    query_ids: Tensor | None = None  # int64 [N], -1 for none
    key_ids: Tensor | None = None  # int64 [M], -1 for none
    key_query_ids: Tensor | None = (
        None  # int64 [M] each key's paired query id; None: that of the query that
    )
    # points to the key, the highest where several do. With PositiveIds and query_ids it must be
    # given.
    query_valid: Tensor | None = None  # bool [N]
    key_valid: Tensor | None = None  # bool [M]


@dataclass(frozen=True)
class Negatives:
    """Negatives beside the other keys, and those that are dropped because they look like positives.

    The three filters go by cosine, whatever the temperature, and hold for every negative. A
    negative must pass all that are set: cosine < max_cosine, cosine <= positive + margin_absolute,
    cosine <= margin_relative * positive.
    """

    hard: Tensor | None = (
        None  # [N, H, D] the row's own; they carry no ids, those of an invalid query do not count
    )
    hard_valid: Tensor | None = None  # bool [N, H]
    shared: bool = False  # everybody's hard negatives are every row's
    queries: bool = False  # other queries, scored against the query, join the row's denominator
    keys: bool = False  # other keys, scored against the positive, join the row's denominator
    # A number; prefix length -> number, one for each of the prefixes; or float [N], one a row.
    # Infinity: no limit. Ranks may differ in a tensor's values, in nothing else.
    max_cosine: float | Mapping[int, float] | Tensor | None = None
    margin_absolute: float | None = None
    margin_relative: float | None = None


@dataclass(frozen=True)
class LossOptions:
    """How a loss is computed; none of it changes what the loss is."""

    # "reference": the definition, N x M memory; "chunked": torch, gradient in the forward;
    backend: str = "auto"
    # "triton"; "auto": triton for half precision on CUDA where it can run, else chunked
    memory_budget: int | None = (
        None  # bytes that scores in memory may take: rows of a chunk, and how many tiles wait
    )
    # for their gradient instead of being computed again. None: half of what the gradients of the
    # queries and of the keys in memory take, at least 16 MiB; a loss that fits into 32 MiB is then
    # one tile.
    score_dtype: torch.dtype | None = (
        None  # float32 or float64, of scores until they are probabilities; products of
    )
    # gradients stay in the inputs' dtype. None: float64 for float64 inputs, and for float32 inputs
    # with any temperature below 0.02 on a CPU or a CUDA device with full-rate float64, as float32
    # logits may then cost the gradient more than 1e-5; else float32. Triton's are float32.
    sizes: Sequence[tuple[int, int]] | None = (
        None  # (N, M) of every rank, in rank order, where all ranks know them;
    )
    # None: the ranks ask each other in each call, which is a collective and a wait of the host


def sizes_and_weights(
    prefixes: Prefixes | None, dimension: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the prefixes' lengths and weights; none: the whole ``dimension`` with weight 1.

    Raises ValueError.
    """
    weighted = (
        prefixes
        if isinstance(prefixes, Mapping)
        else dict.fromkeys((dimension,) if prefixes is None else prefixes, 1.0)
    )
    sizes, weights = (
        tuple(int(size) for size in weighted),
        tuple(float(weight) for weight in weighted.values()),
    )
    given = (
        sizes
        if prefixes is None or isinstance(prefixes, Mapping)
        else tuple(int(size) for size in prefixes)
    )
    if not given or any(a >= b for a, b in zip((0, *given), given, strict=False)):
        raise ValueError(f"prefixes: found {given}, expected increasing positive lengths")
    if given[-1] > dimension:
        raise ValueError(
            f"prefixes: found {given[-1]}, expected at most the embeddings' {dimension} dimensions"
        )
    if any(not weight >= 0 for weight in weights):  # also NaN; a kernel takes its logarithm
        raise ValueError(f"prefixes: found the weights {weights}, expected none below 0")
    return sizes, weights


def call_weights(calls: Sequence[object], weights: Sequence[float] | None) -> list[float]:
    """Return the factor of each call in a sum of losses; None: 1 each.

    Raises ValueError without calls, for another number of weights, and for one below 0.
    """
    if not calls or (weights is not None and len(weights) != len(calls)):
        raise ValueError(
            f"calls: found {len(calls)} with {'no' if weights is None else len(weights)} weights, "
            "expected one a call, at least one"
        )
    found = [1.0] * len(calls) if weights is None else [float(weight) for weight in weights]
    if any(not weight >= 0 for weight in found):
        raise ValueError(f"weights: found {found}, expected none below 0")
    return found


GROUPS: dict[str, type] = {"negatives": Negatives, "masks": Masks, "options": LossOptions}
_OF_NEGATIVES = {
    "hard_negatives": "hard",
    "hard_negative_valid": "hard_valid",
    "shared_hard_negatives": "shared",
    "query_negatives": "queries",
    "key_negatives": "keys",
    "max_negative_score": "max_cosine",
}
Call = dict[str, Any]  # arguments of a loss by name: tensors, groups of them, options
_PLACES = {
    field.name: (name, field.name)
    for name, group in GROUPS.items()
    for field in fields(group)
    if field.name not in ("hard", "hard_valid", "shared", "queries", "keys")
} | {name: ("negatives", field) for name, field in _OF_NEGATIVES.items()}


def grouped(flat: Call) -> Call:
    """Return the arguments of a loss from a mapping of one name each, as version 0.1.0 had them.

    The names are those of the groups' fields, of Negatives' those of ``_OF_NEGATIVES``;
    positive_ids stands for PositiveIds, and prefix_weights beside prefixes for a mapping. What is
    neither is returned as it is. Raises TypeError where a group is given beside a field of it.
    """
    call: Call = {}
    groups: dict[str, Call] = {}
    for name, value in flat.items():
        if name in _PLACES:
            group, field = _PLACES[name]
            groups.setdefault(group, {})[field] = value
        elif name == "positive_ids":
            call["positives"] = PositiveIds(value)
        elif name != "prefix_weights":
            call[name] = value
    if flat.get("prefix_weights") is not None:
        call["prefixes"] = dict(zip(flat["prefixes"], flat["prefix_weights"], strict=True))
    for name, values in groups.items():
        if call.get(name) is not None:
            raise TypeError(f"{name}: found beside {', '.join(values)}, expected one of the two")
        call[name] = GROUPS[name](**values)
    return call


def with_former(call: Call, former: Call) -> Call:
    """Return a call with arguments of version 0.1.0 in their groups. Raises TypeError for others."""
    given = {name: value for name, value in call.items() if value is not None}
    known = {name for name, (group, _) in _PLACES.items() if group in call}
    known |= {"prefix_weights"} | ({"positive_ids"} if "positives" in call else set())
    unknown = sorted(set(former) - known)
    if unknown:
        raise TypeError(f"{unknown[0]}: found as an argument, expected one of {', '.join(call)}")
    if former.get("positive_ids") is not None and given.get("positives") is not None:
        raise TypeError("positive_ids: found with positives, expected one of them")
    if former.get("prefix_weights") is not None and "prefixes" not in given:
        raise TypeError("prefix_weights: found without prefixes, expected both")
    return call | grouped(
        given | {name: value for name, value in former.items() if value is not None}
    )
