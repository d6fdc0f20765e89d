"""One call's tensors, checked and brought into the one form that every backend reads.

Ranks agree here, in a single small collective, on sizes, options and who needs which gradient, so that afterwards
they issue the same collectives in the same order whatever each of them has frozen; a rank that was called with
other options is an error on all ranks instead of a hang.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sailplan_kernels.exchange import Exchange
from sailplan_kernels.infonce.masks import Candidates
from sailplan_kernels.infonce.options import InfoNCEOptions
from sailplan_kernels.infonce.pairs import Pairs, pairs_by_id, pairs_by_index

LOW_TEMPERATURE = 0.02
FULL_RATE_FLOAT64 = ((7, 0), (8, 0), (9, 0), (10, 0))  # CUDA devices whose float64 products are about as fast as exact float32 ones


@dataclass(frozen=True)
class Needs:
    """Which gradients any rank needs (agreed by all ranks, as the collectives depend on it)."""

    queries: bool
    keys: bool
    hard: bool
    temperature: bool


@dataclass(frozen=True)
class Problem:
    """N rows, M keys and H hard negatives a row on this rank; C candidates of a kind over all ranks.

    What has no dtype here is in the scores' dtype, float32 or float64 (see scores_in_float64).
    """

    raw_queries: Tensor  # [N, D] as the caller gave them, invalid rows may hold anything
    raw_keys: Tensor  # [M, D]
    raw_hard: Tensor  # [N, H, D], H = 0 without hard negatives
    positive: Tensor  # int64 [N], index into this rank's keys; says nothing where positives go by id
    pairs: Pairs  # of the rows that count and their positives, however they were given
    by_id: bool  # positives may be several a row and any rank's keys; else one, of this rank
    row_valid: Tensor  # bool [N], the row counts
    row_weight: Tensor  # [N], world_size / valid rows of all ranks, 0 where the row does not count
    max_negative_score: Tensor | None  # [N], None: no such limit
    inverse_temperature: Tensor  # [N], differentiable
    one_temperature: bool  # it was given as one number, the same for all rows of all ranks
    anchor_tags: Tensor  # int64 [N, 3], positive's global index and id, own query id
    query_valid: Tensor  # bool [N]
    hard_valid: Tensor  # bool [N, H]
    all_keys: Candidates
    all_queries: Candidates  # empty unless a loss term reads them
    all_hard: Candidates  # empty unless hard negatives are shared
    key_correction: Tensor | None  # [all keys] subtracted from their logits, None: nothing to correct
    tags_in_use: tuple[int, ...]
    query_sizes: list[int]
    key_sizes: list[int]
    valid_rows: int
    operand_dtype: torch.dtype  # what the matrix products may read
    gradient_dtype: torch.dtype  # what gradients of vectors accumulate in: float32, for float64 operands float64
    needs: Needs
    options: InfoNCEOptions
    exchange: Exchange

    @property
    def queries(self) -> Tensor:
        """[N, D] in the scores' dtype, invalid rows zeroed: under autograd, and a copy."""
        return _zeroed(self.raw_queries.to(self.row_weight.dtype), self.query_valid)

    @property
    def keys(self) -> Tensor:
        """[M, D], as ``queries``."""
        return _zeroed(self.raw_keys.to(self.row_weight.dtype), self.key_valid)

    @property
    def hard(self) -> Tensor:
        """[N, H, D], as ``queries``."""
        return _zeroed(self.raw_hard.to(self.row_weight.dtype), self.hard_valid)

    @property
    def key_valid(self) -> Tensor:
        """bool [M] of this rank's own keys."""
        return self.all_keys.valid[self.own_keys]

    @property
    def hard_sizes(self) -> list[int]:
        """Shared hard negatives of every rank."""
        return [rows * self.raw_hard.shape[1] for rows in self.query_sizes]

    def share(self, rows: slice) -> Problem:
        """Those of this rank's rows alone; keys and candidates stay as they are."""
        names = ("raw_queries", "raw_hard", "positive", "row_valid", "row_weight", "inverse_temperature", "anchor_tags")
        highest = None if self.max_negative_score is None else self.max_negative_score[rows]
        pairs = self.pairs.of_rows(rows)
        return replace(self, pairs=pairs, max_negative_score=highest, **{name: getattr(self, name)[rows] for name in (*names, "query_valid", "hard_valid")})

    @property
    def own_keys(self) -> slice:
        """This rank's part of the gathered keys."""
        start = sum(self.key_sizes[: self.exchange.rank])
        return slice(start, start + self.key_sizes[self.exchange.rank])


def build_problem(
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    *,
    positives: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_query_ids: Tensor | None,
    hard_negatives: Tensor | None,
    hard_negative_valid: Tensor | None,
    query_valid: Tensor | None,
    key_valid: Tensor | None,
    key_log_probability: Tensor | None = None,
    max_negative_score: float | Tensor | None = None,
    positive_ids: Tensor | None = None,
    options: InfoNCEOptions,
    exchange: Exchange,
    backend: str,
    score_dtype: torch.dtype | None = None,
) -> Problem:
    """Everything a backend needs; the arguments have been checked by infonce/checks.py. Two or more collectives."""
    n, m, device = len(queries), len(keys), queries.device
    half = queries.dtype in (torch.float16, torch.bfloat16)
    accumulate = torch.float32 if half else queries.dtype
    # On a CPU half-precision products round their result; there they are computed in float32.
    operand = queries.dtype if half and device.type != "cpu" else accumulate

    has_positive = torch.ones(n, dtype=torch.bool, device=device)
    if positive_ids is not None:
        has_positive, positive = torch.zeros_like(has_positive), torch.zeros(n, dtype=torch.int64, device=device)
    elif positives is None:
        positive = torch.arange(n, device=device)
    else:
        has_positive = positives >= 0
        positive = positives.clamp_min(0)
    if query_valid is None:
        query_valid = torch.ones(n, dtype=torch.bool, device=device)
    if key_valid is None:
        key_valid = torch.ones(m, dtype=torch.bool, device=device)
    row_valid = has_positive if positive_ids is not None else query_valid & has_positive & key_valid[positive]

    gradients = torch.is_grad_enabled()
    leaves = (queries, keys, hard_negatives, temperature)
    needs = [gradients and isinstance(x, Tensor) and x.requires_grad for x in leaves]
    if hard_negatives is None:
        hard_negatives = queries.new_zeros(n, 0, queries.shape[1])
    h = hard_negatives.shape[1]
    one_temperature = not isinstance(temperature, Tensor) or temperature.dim() == 0
    given = [one_temperature, *(x is None for x in (key_ids, query_ids, key_log_probability, positive_ids))]
    call = options.fingerprint(queries.shape[1], h, queries.dtype, backend, score_dtype, *given)
    numbers = torch.tensor([n, m, call, *needs, scores_in_float64(queries, backend), 0, 0], dtype=torch.int64, device=device)
    numbers[-2], numbers[-1] = torch.as_tensor(temperature).detach().lt(LOW_TEMPERATURE).any(), row_valid.sum()
    table = exchange.gather(numbers[None], [1] * exchange.world_size).tolist()
    if any(row[2] != call for row in table):
        raise ValueError("infonce: ranks differ in dimensions, dtype, ids given, kind of temperature, backend or options, expected equal calls")
    query_sizes, key_sizes = [row[0] for row in table], [row[1] for row in table]
    valid_rows = sum(row[-1] for row in table)
    agreed = Needs(*(any(row[3 + i] for row in table) for i in range(4)))
    compute = score_dtype or accumulate
    if score_dtype is None and any(row[-2] for row in table) and all(row[-3] for row in table):
        compute = torch.float64

    tags_in_use = (0,) + (1,) * (key_ids is not None) + (2,) * (query_ids is not None)
    offset = sum(key_sizes[: exchange.rank])
    none = torch.full((max(n, m),), -1, dtype=torch.int64, device=device)
    if key_query_ids is None and query_ids is not None:
        # The paired query of a key is the row that points to it.
        source = torch.where(has_positive, query_ids, -1)
        key_query_ids = none[:m].clone().scatter_reduce(0, positive, source, "amax")
    key_ids = none[:m] if key_ids is None else key_ids
    query_ids = none[:n] if query_ids is None else query_ids
    key_query_ids = none[:m] if key_query_ids is None else key_query_ids
    key_tags = torch.stack([torch.arange(offset, offset + m, device=device), key_ids, key_query_ids], 1)
    all_keys = _gather_candidates(exchange, key_tags, key_valid, key_sizes)
    if positive_ids is None:
        own_positive = torch.where(has_positive[:, None], key_tags[positive][:, :2], -1)
        pairs = pairs_by_index(row_valid, positive + offset)
    else:
        own_positive = torch.stack([none[:n], positive_ids], 1)
        pairs = pairs_by_id(torch.where(query_valid, positive_ids, -1), all_keys)
        row_valid = pairs.counts > 0
        valid_rows = int(exchange.sum(row_valid.sum()))
    query_tags = torch.cat([own_positive, query_ids[:, None]], 1)
    all_queries = all_hard = Candidates(tags=none.new_empty((0, 3)), valid=query_valid[:0])
    if options.query_negatives or options.symmetric:
        all_queries = _gather_candidates(exchange, query_tags, query_valid, query_sizes)
    hard_valid = query_valid[:, None].expand(n, h)
    if hard_negative_valid is not None:
        hard_valid = hard_valid & hard_negative_valid
    if options.shared_hard_negatives:
        tags = none.new_full((n * h, 3), -1)
        all_hard = _gather_candidates(exchange, tags, hard_valid.reshape(-1), [rows * h for rows in query_sizes])

    key_correction = None
    if key_log_probability is not None:
        key_correction = exchange.gather(key_log_probability.detach().to(compute), key_sizes)

    if max_negative_score is not None:
        # In the scores' dtype from the start: a row's limit and its column's must be the same number.
        max_negative_score = torch.as_tensor(max_negative_score, device=device).detach().to(compute).expand(n)
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=torch.float64)

    return Problem(
        raw_queries=queries,
        raw_keys=keys,
        raw_hard=hard_negatives,
        positive=positive,
        pairs=pairs,
        by_id=positive_ids is not None,
        row_valid=row_valid,
        row_weight=row_valid.to(compute) * (exchange.world_size / max(valid_rows, 1)),
        max_negative_score=max_negative_score,
        inverse_temperature=temperature.to(device, compute).reciprocal().expand(n),
        one_temperature=one_temperature,
        anchor_tags=query_tags,
        query_valid=query_valid,
        hard_valid=hard_valid,
        all_keys=all_keys,
        all_queries=all_queries,
        all_hard=all_hard,
        key_correction=key_correction,
        tags_in_use=tags_in_use,
        query_sizes=query_sizes,
        key_sizes=key_sizes,
        valid_rows=valid_rows,
        operand_dtype=operand,
        gradient_dtype=accumulate,
        needs=agreed,
        options=options.with_budget(n + (sum(key_sizes) if exchange.whole else m), queries.shape[1], torch.finfo(accumulate).bits // 8),
        exchange=exchange,
    )


def scores_in_float64(queries: Tensor, backend: str) -> bool:
    """Whether scores at temperatures below LOW_TEMPERATURE are float64 unless told otherwise, if all ranks say so.

    A logit is a cosine over the temperature, and its float32 rounding, 6e-8 / t, a relative error of its softmax weight. On
    trained embeddings, whose gradients are differences of close vectors, that alone can be more than 1e-5 of the gradient.
    So where the inputs are float32, have more to say than that, and where float64 products are not many times slower.
    """
    fast = not queries.is_cuda or torch.cuda.get_device_capability(queries.device) in FULL_RATE_FLOAT64
    return queries.dtype is torch.float32 and fast and not backend.endswith("triton")


def _gather_candidates(exchange: Exchange, tags: Tensor, valid: Tensor, sizes: list[int]) -> Candidates:
    packed = exchange.gather(torch.cat([tags, valid[:, None].to(torch.int64)], 1), sizes)
    return Candidates(tags=packed[:, :3], valid=packed[:, 3] > 0)


def _zeroed(x: Tensor, valid: Tensor) -> Tensor:
    """Padding may hold anything, also NaN, and 0 * NaN is NaN: make it zero, and its gradient too."""
    return torch.where(valid.unsqueeze(-1), x, 0.0)
