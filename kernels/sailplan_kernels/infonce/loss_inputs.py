"""One call's tensors, checked and brought into the one form that every backend reads.

Ranks agree here on sizes, options and who needs which gradient (agreement.py), so that afterwards
they issue the same collectives in the same order whatever each of them has frozen. What is known on
the CPU is combined there and uploaded in one copy (upload.py); nothing here reads a number back
from a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sailplan_kernels.arguments import Masks, Negatives, PositiveIds
from sailplan_kernels.exchange import Exchange
from sailplan_kernels.infonce.agreement import Needs, agree
from sailplan_kernels.infonce.masks import Candidates, anchor_notes
from sailplan_kernels.infonce.options import InfoNCEOptions
from sailplan_kernels.infonce.pairs import PairList, pairs_by_id, pairs_by_index
from sailplan_kernels.infonce.upload import upload

LOW_TEMPERATURE = 0.02
REMEMBERED = (
    2**15
    # rows, keys and hard negatives of a call without ids whose masks are kept for the next call:
    # some megabytes
)
FULL_RATE_FLOAT64 = (
    (7, 0),
    (8, 0),
    (9, 0),
    (10, 0),
)  # CUDA devices whose float64 products are about as fast as exact float32 ones


@dataclass(frozen=True)
class LossInputs:
    """N rows, M keys and H hard negatives a row on this rank: what this rank knows by itself."""

    raw_queries: Tensor  # [N, D] as the caller gave them, invalid rows may hold anything
    raw_keys: Tensor  # [M, D]
    raw_hard: Tensor  # [N, H, D], H = 0 without hard negatives
    positives: (
        Tensor | None
    )  # int64 [N], index into this rank's keys; None: row i's positive is key i, or they go by id
    wanted: (
        Tensor | None
        # int64 [N] the id that makes a key the row's positive, -1 for none; None: positives go by
        # index
    )
    row_valid: Tensor  # bool [N], the row counts, as far as this rank knows
    row_count: Tensor  # int64 [1], how many do
    query_valid: Tensor  # bool [N]
    key_valid: Tensor  # bool [M]
    hard_valid: Tensor  # bool [N, H]
    invalid: Tensor  # bool [N + M + N H], queries, keys, hard negatives that are padding
    hidden: Tensor  # bool [N, 1 + H], True for the positive and for hard negatives that are padding
    padding: tuple[bool, bool, bool]  # whether some queries, keys, hard negatives may be invalid
    # int64 [N, 5], positive's global number and id, own query id, and two marks, see masks.py
    anchor_notes: Tensor
    key_notes: Tensor  # int64 [M, 5], own number, id, paired query's id, and key_valid twice
    plain: bool  # no ids and no masks: key i belongs to query i, and every row counts
    any_row: bool  # whether this rank's host knows of a row that counts
    key_log_probability: Tensor | None  # [M] in the scores' dtype
    max_cosine: tuple[float, ...] | Tensor | None  # of each prefix, or [N] in the scores' dtype
    temperature: Tensor  # 0-d or [N], differentiable, in the scores' dtype
    tags_in_use: tuple[int, ...]
    query_sizes: list[int]
    key_sizes: list[int]
    score_dtype: torch.dtype  # float32 or float64
    operand_dtype: torch.dtype  # what the matrix products may read
    gradient_dtype: (
        torch.dtype
    )  # what gradients of vectors accumulate in: float32, for float64 operands float64
    needs: Needs
    options: InfoNCEOptions
    exchange: Exchange

    @property
    def diagonal(self) -> bool:
        """Whether row i's positive is key i."""
        return self.positives is None and self.wanted is None

    @property
    def positive(self) -> Tensor:
        """int64 [N], index into this rank's keys; says nothing where positives go by id."""
        return (
            torch.arange(len(self.raw_queries), device=self.raw_queries.device)
            if self.positives is None
            else self.positives
        )

    @property
    def queries(self) -> Tensor:
        """[N, D] in the scores' dtype, invalid rows zeroed: under autograd, and a copy."""
        return _zeroed(self.raw_queries.to(self.score_dtype), self.query_valid)

    @property
    def keys(self) -> Tensor:
        """[M, D], as ``queries``."""
        return _zeroed(self.raw_keys.to(self.score_dtype), self.key_valid)

    @property
    def hard(self) -> Tensor:
        """[N, H, D], as ``queries``."""
        return _zeroed(self.raw_hard.to(self.score_dtype), self.hard_valid)

    @property
    def anchor_tags(self) -> Tensor:
        """int64 [N, 3], see masks.py."""
        return self.anchor_notes[:, :3]

    @property
    def query_notes(self) -> Tensor:
        """int64 [N, 4] of queries as candidates: tags and query_valid."""
        return torch.cat([self.anchor_tags.clamp_min(-1), self.query_valid[:, None]], 1)

    @property
    def hard_notes(self) -> Tensor:
        """int64 [N H, 4] of hard negatives that everybody sees: they carry no ids."""
        valid = self.hard_valid.reshape(-1, 1).to(torch.int64)
        return torch.cat([torch.full_like(valid, -1).expand(-1, 3), valid], 1)

    @property
    def inverse_temperature(self) -> Tensor:
        """0-d or [N], differentiable."""
        return self.temperature.reciprocal()

    @property
    def row_inverse_temperature(self) -> Tensor:
        """[N]"""
        return self.inverse_temperature.expand(len(self.raw_queries))

    def row_highest(self, prefix: int) -> Tensor | None:
        """[N] max_cosine of each row at the prefix of this number."""
        highest = self.max_cosine
        if highest is None or isinstance(highest, Tensor):
            return highest
        return torch.full(
            (len(self.raw_queries),),
            highest[prefix],
            dtype=self.score_dtype,
            device=self.raw_queries.device,
        )

    @property
    def hard_sizes(self) -> list[int]:
        """Shared hard negatives of every rank."""
        return [rows * self.raw_hard.shape[1] for rows in self.query_sizes]

    @property
    def own_keys(self) -> slice:
        """This rank's part of the keys of all ranks."""
        start = sum(self.key_sizes[: self.exchange.rank])
        return slice(start, start + self.key_sizes[self.exchange.rank])


@dataclass(frozen=True)
class GatheredInputs(LossInputs):
    """With what ranks tell each other in collectives of their own: for losses that are no
    streams of tiles.
    """

    pairs: PairList  # of the rows that count and their positives, however they were given
    row_weight: Tensor  # [N], world_size / valid rows of all ranks, 0 where the row does not count
    valid_rows: Tensor  # 0-d, over all ranks
    all_keys: Candidates
    all_queries: Candidates  # empty unless a loss term reads them
    all_hard: Candidates  # empty unless hard negatives are shared
    key_correction: (
        Tensor | None
    )  # [all keys] subtracted from their logits, None: nothing to correct


def build_inputs(
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    *,
    positives: Tensor | PositiveIds | None,
    masks: Masks,
    negatives: Negatives,
    key_log_probability: Tensor | None = None,
    options: InfoNCEOptions,
    exchange: Exchange,
    backend: str,
    score_dtype: torch.dtype | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> LossInputs:
    """Everything that this rank knows; the arguments have been checked by infonce/checks.py."""
    n, m, device = len(queries), len(keys), queries.device
    half = queries.dtype in (torch.float16, torch.bfloat16)
    accumulate = torch.float32 if half else queries.dtype
    # On a CPU half-precision products round their result; there they are computed in float32.
    operand = queries.dtype if half and device.type != "cpu" else accumulate

    leaves = (queries, keys, negatives.hard, temperature)
    needs = [torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad for x in leaves]
    hard = queries.new_empty(n, 0, queries.shape[1]) if negatives.hard is None else negatives.hard
    h = hard.shape[1]
    positive_ids = positives.ids if isinstance(positives, PositiveIds) else None
    index = None if isinstance(positives, PositiveIds) else positives
    given = [
        x is None
        for x in (index, masks.key_ids, masks.query_ids, key_log_probability, positive_ids)
    ]
    per_row = isinstance(temperature, Tensor) and temperature.dim() == 1
    call = 0  # a lone rank agrees with itself
    if exchange.world_size > 1:
        call = options.fingerprint(
            queries.shape[1], h, queries.dtype, backend, score_dtype, per_row, *given
        )
    fast = scores_in_float64(queries, backend)
    low = low_temperature(temperature) if fast and score_dtype is None else False
    if per_row and fast and sizes is not None and exchange.world_size > 1:
        low = bool(
            exchange.max(torch.tensor([float(low)], device=device))
        )  # it may change from call to call, on one rank alone
    agreed = agree(exchange, sizes, (n, m), call, needs, low, fast, device)
    compute = score_dtype or (
        torch.float64 if agreed.low_temperature and agreed.float64 else accumulate
    )

    ids = {
        "positives": index,
        "positive_ids": positive_ids,
        "hard_valid": negatives.hard_valid,
        **vars(masks),
    }
    known_ids, offset = (
        {name: x for name, x in ids.items() if x is not None},
        sum(agreed.keys[: exchange.rank]),
    )
    remembered = not known_ids and n * (1 + h) + m <= REMEMBERED
    known = (
        nothing_given(n, m, h, offset, device)
        if remembered
        else combine(known_ids, n, m, h, offset, device)
    )

    max_cosine: tuple[float, ...] | Tensor | None
    if isinstance(negatives.max_cosine, Tensor):
        # In the scores' dtype from the start: a row's limit and its column's must be the same
        # number.
        max_cosine = negatives.max_cosine.detach().to(device, compute)
    else:
        assert not isinstance(options.max_cosine, bool), "True goes with a tensor"
        max_cosine = options.max_cosine
    number = (
        temperature.to(device, compute)
        if isinstance(temperature, Tensor)
        else torch.full((), temperature, dtype=compute, device=device)
    )
    tensors = {name: x for name, x in known.items() if isinstance(x, Tensor)}
    return LossInputs(
        raw_queries=queries,
        raw_keys=keys,
        raw_hard=hard,
        positives=tensors.pop("positives", None),
        wanted=None if positive_ids is None else tensors.pop("wanted"),
        padding=known["padding"],
        any_row=known["any_row"],
        plain=known["plain"],
        **tensors,
        key_log_probability=None
        if key_log_probability is None
        else key_log_probability.detach().to(device, compute),
        max_cosine=max_cosine,
        temperature=number,
        tags_in_use=(0,) * known["own_number"]
        + (1,) * (masks.key_ids is not None)
        + (2,) * (masks.query_ids is not None),
        query_sizes=list(agreed.rows),
        key_sizes=list(agreed.keys),
        score_dtype=compute,
        operand_dtype=operand,
        gradient_dtype=accumulate,
        needs=agreed.needs,
        options=options.with_budget(
            n + (sum(agreed.keys) if exchange.materializes_all else m),
            queries.shape[1],
            torch.finfo(accumulate).bits // 8,
        ),
        exchange=exchange,
    )


@lru_cache(maxsize=16)
def nothing_given(n: int, m: int, h: int, offset: int, device: torch.device) -> dict:
    """``combine`` without ids and masks: the same from call to call."""
    return combine({}, n, m, h, offset, device)


def combine(
    given: dict[str, Tensor], n: int, m: int, h: int, offset: int, device: torch.device
) -> dict:
    """Which rows count and who shares which tag: on the CPU where all that was given is there,
    and then uploaded; else on the device.

    given: the ids and masks of build_inputs, by name. Returns the fields of LossInputs that come of
    them.
    """
    at = device if any(x.device == device for x in given.values()) else torch.device("cpu")
    plain = not given
    given = {name: x.to(at) for name, x in given.items()}
    positives, wanted = given.get("positives"), given.get("positive_ids")
    none = torch.full((max(n, m),), -1, dtype=torch.int64, device=at)
    everything = torch.ones(max(n, m), dtype=torch.bool, device=at)
    query_valid, key_valid = (
        given.get("query_valid", everything[:n]),
        given.get("key_valid", everything[:m]),
    )
    positive = torch.arange(n, device=at) if positives is None else positives.clamp_min(0)
    if wanted is not None:
        row_valid, positive = query_valid & (wanted >= 0), torch.zeros_like(wanted)
    else:
        row_valid = query_valid & (key_valid[positive] if positives is not None else key_valid[:n])
        if positives is not None:
            row_valid = row_valid & (positives >= 0)
    key_ids, query_ids, key_query_ids = (
        given.get("key_ids", none[:m]),
        given.get("query_ids", none[:n]),
        given.get("key_query_ids", none[:m]),
    )
    if "query_ids" in given and "key_query_ids" not in given and wanted is None:
        # The paired query of a key is the row that points to it.
        source = query_ids if positives is None else torch.where(positives >= 0, query_ids, -1)
        key_query_ids = none[:m].clone().scatter_reduce(0, positive, source, "amax")
    key_tags = torch.stack([torch.arange(offset, offset + m, device=at), key_ids, key_query_ids], 1)
    if wanted is not None:
        own = torch.stack([none[:n], wanted], 1)
    elif positives is None:
        own = key_tags[:n, :2]
    else:
        own = torch.where((positives >= 0)[:, None], key_tags[positive][:, :2], -1)
    hard_valid = query_valid[:, None].expand(n, h)
    if "hard_valid" in given:
        hard_valid = hard_valid & given["hard_valid"]
    found = {
        "row_valid": row_valid,
        "row_count": row_valid.sum()[None],
        "query_valid": query_valid,
        "key_valid": key_valid,
        "hard_valid": hard_valid,
        "anchor_notes": anchor_notes(torch.cat([own, query_ids[:, None]], 1), query_valid),
        "key_notes": torch.cat([key_tags, key_valid[:, None], key_valid[:, None]], 1),
        "invalid": torch.cat([query_valid, key_valid, hard_valid.flatten()]).logical_not(),
        "hidden": torch.cat([torch.ones_like(query_valid)[:, None], ~hard_valid], 1),
    }
    if positives is not None:
        found["positives"] = positive
    if wanted is not None:
        found["wanted"] = torch.where(query_valid, wanted, -1)
    masks = (("query_valid", query_valid), ("key_valid", key_valid), ("hard_valid", hard_valid))
    if at.type == "cpu":
        padding = tuple(not bool(mask.all()) for _, mask in masks)
    else:
        padding = (
            "query_valid" in given,
            "key_valid" in given,
            "query_valid" in given or "hard_valid" in given,
        )
    # A row's positive is no negative of it: where its key's id says so already, its number need
    # not.
    own_number = (
        wanted is not None
        or "key_ids" not in given
        or at.type != "cpu"
        or not bool((own[row_valid, 1] >= 0).all())
    )
    any_row = at.type == "cpu" and bool(row_valid.any())
    return {
        **upload(found, device),
        "padding": padding,
        "own_number": own_number,
        "any_row": any_row,
        "plain": plain,
    }


def gathered(inputs: LossInputs) -> GatheredInputs:
    """The problem with everybody's keys and, where the options read them, queries and hard
    negatives. Collectives.
    """
    exchange, options = inputs.exchange, inputs.options
    all_keys = Candidates.of(exchange.gather(inputs.key_notes, inputs.key_sizes))
    row_valid = inputs.row_valid
    if inputs.wanted is None:
        pairs = pairs_by_index(row_valid, inputs.positive + inputs.own_keys.start)
    else:
        pairs = pairs_by_id(inputs.wanted, all_keys)
        row_valid = pairs.counts > 0
    valid_rows = exchange.sum(row_valid.sum())
    all_queries = all_hard = Candidates.of(inputs.key_notes[:0])
    if options.query_negatives or options.symmetric:
        all_queries = Candidates.of(exchange.gather(inputs.query_notes, inputs.query_sizes))
    if options.shared_hard_negatives:
        all_hard = Candidates.of(exchange.gather(inputs.hard_notes, inputs.hard_sizes))
    correction = inputs.key_log_probability
    return GatheredInputs(
        **{**vars(inputs), "row_valid": row_valid},
        pairs=pairs,
        row_weight=row_valid.to(inputs.score_dtype)
        * (exchange.world_size / valid_rows.clamp_min(1).to(inputs.score_dtype)),
        valid_rows=valid_rows,
        all_keys=all_keys,
        all_queries=all_queries,
        all_hard=all_hard,
        key_correction=None
        if correction is None
        else exchange.gather(correction, inputs.key_sizes),
    )


def low_temperature(temperature: float | Tensor) -> bool:
    """Whether any is below LOW_TEMPERATURE, as far as the host knows: it does not wait for a
    device's.
    """
    if not isinstance(temperature, Tensor):
        return temperature < LOW_TEMPERATURE
    return temperature.device.type == "cpu" and bool((temperature.detach() < LOW_TEMPERATURE).any())


def scores_in_float64(queries: Tensor, backend: str) -> bool:
    """Whether scores at temperatures below LOW_TEMPERATURE are float64 unless told otherwise, if
    all ranks say so.

    A logit is a cosine over the temperature, and its float32 rounding, 6e-8 / t, a relative error
    of its softmax weight. On trained embeddings, whose gradients are differences of close vectors,
    that alone can be more than 1e-5 of the gradient.
    So where the inputs are float32, have more to say than that, and where float64 products are not
    many times slower.
    """
    fast = (
        not queries.is_cuda or torch.cuda.get_device_capability(queries.device) in FULL_RATE_FLOAT64
    )
    return queries.dtype is torch.float32 and fast and not backend.endswith("triton")


def _zeroed(x: Tensor, valid: Tensor) -> Tensor:
    """Padding may hold anything, also NaN, and 0 * NaN is NaN: make it zero, and its gradient
    too.
    """
    return torch.where(valid.unsqueeze(-1), x, 0.0)
