"""Who is scored against whom: blocks of anchors, and the candidates of every kind as the exchange hands them out.

Anchors are the queries and, with key negatives, the positives themselves, one a pair. Candidates are keys; with the options
other queries and everybody's hard negatives. (A row's own hard negatives are no tile: own_hard.py.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sailplan_kernels.exchange.base import Shard, Stream
from sailplan_kernels.infonce.masks import Candidates, limits
from sailplan_kernels.infonce.normalize import inverse_norms
from sailplan_kernels.infonce.setting import Setting, finite
from sailplan_kernels.infonce.tile import Rule, Side, Statistics


@dataclass
class Anchors:
    """n rows of tiles, what is known of their denominators, and what their gradient has come to."""

    side: Side
    by_pair: bool  # one a pair; else one a row
    moments: bool  # Rule.moments of their tiles
    gradient: Tensor | None  # [n, D], None: nobody needs it
    top: Tensor  # [P, n] highest logit, minus infinity without negatives
    total: Tensor  # [P, n] sum of exp(logit - top)
    moment: Tensor  # [P, n] sum of G * cosine
    temperature: Tensor  # [n] d loss / d inverse temperature, of what was asked of tiles

    @classmethod
    def of(cls, side: Side, by_pair: bool, moments: bool, needed: bool, accumulate: torch.dtype) -> Anchors:
        """Of which nothing is known yet; their gradient, if ``needed``, in ``accumulate``."""
        like = side.inverse_norm
        gradient = torch.zeros_like(side.vectors, dtype=accumulate) if needed else None
        top, total, moment = torch.full_like(like, -torch.inf), torch.zeros_like(like), torch.zeros_like(like)
        return cls(side, by_pair, moments, gradient, top, total, moment, torch.zeros_like(side.inverse_temperature))

    def log_negatives(self, here: slice | Tensor) -> Tensor:
        """[P, ...] logsumexp of the negatives; minus infinity without any."""
        return self.total[:, here].log() + finite(self.top[:, here])

    def merge(self, here: slice, found: Statistics) -> None:
        merge(self.top[:, here], self.total[:, here], found.row_maximum, found.row_sum)


@dataclass
class Source:
    """C candidates of one kind, and the anchors that are scored against them."""

    stream: Stream
    candidates: Candidates
    sizes: list[int]  # of every rank
    needed: bool  # whether any rank needs their gradient
    blocks: list[tuple[Anchors, Rule]]
    moment: Tensor  # [P, C] sum of G * cosine
    correction: Tensor | None = None  # [C]
    limit: Tensor | None = None  # [P, C]
    inverse_temperature: Tensor | None = None  # [C]
    norms: dict[int, Tensor] = field(default_factory=dict)

    def columns(self, shard: Shard, part: slice, prefixes: tuple[int, ...], like: Tensor) -> Side:
        """Columns ``part`` of a shard."""
        if shard.start not in self.norms:
            self.norms[shard.start] = inverse_norms(shard.vectors, prefixes, like.dtype)
        here = slice(shard.start + part.start, shard.start + part.stop)
        inverse = self.inverse_temperature
        return Side(
            vectors=shard.vectors[part],
            inverse_norm=self.norms[shard.start][:, part].contiguous(),
            tags=self.candidates.tags[here],
            valid=self.candidates.valid[here],
            limit=None if self.limit is None else self.limit[:, here].contiguous(),
            inverse_temperature=like.new_ones(part.stop - part.start) if inverse is None else inverse[here],
            correction=None if self.correction is None else self.correction[here],
        )


def query_anchors(setting: Setting, best: Tensor) -> Anchors:
    """The queries, whose margins start from their best positives [P, n]."""
    problem, options, needs = setting.problem, setting.options, setting.needs
    side = Side(
        vectors=setting.queries,
        inverse_norm=setting.query_norm,
        tags=problem.anchor_tags,
        valid=problem.query_valid,
        limit=limits(best, problem.max_negative_score, options),
        inverse_temperature=setting.inverse,
    )
    # Without prefixes and columns the temperature's sum is <query, its gradient>: no work inside the tile.
    moments = len(setting.prefixes) > 1 or (needs.temperature and (options.symmetric or not needs.queries))
    return Anchors.of(side, False, moments, needs.queries, setting.gradient_dtype)


def positive_anchors(setting: Setting, queries: Anchors, vectors: Tensor) -> Anchors:
    """The positives, [E, D] one a pair, as anchors in their rows' denominators: with the row's tags, limit and temperature."""
    rows, row, needs = setting.problem.pairs.rows, queries.side, setting.needs
    side = Side(
        vectors=vectors,
        inverse_norm=inverse_norms(vectors, setting.prefixes, setting.fp),
        tags=row.tags[rows],
        valid=row.valid[rows],
        limit=None if row.limit is None else row.limit[:, rows].contiguous(),
        inverse_temperature=row.inverse_temperature[rows],
    )
    # Where nobody needs the keys' gradient there is no sum to read the temperature's from.
    return Anchors.of(side, True, queries.moments or (needs.temperature and not needs.keys), needs.keys, setting.gradient_dtype)


def make_sources(setting: Setting, key_stream: Stream, queries: Anchors, positives: Anchors | None) -> list[Source]:
    """Keys first; then other queries, then shared hard negatives, where the options want them."""
    whole, options, needs = setting.whole, setting.options, setting.needs

    def block(anchors: Anchors, tags: tuple[int, ...] = whole.tags_in_use, columns: bool = False) -> tuple[Anchors, Rule]:
        return anchors, Rule(setting.prefixes, tags, columns, anchors.moments, one_temperature=whole.one_temperature)

    def source(stream: Stream, candidates: Candidates, sizes: list[int], needed: bool, *blocks: tuple[Anchors, Rule]) -> Source:
        moment = setting.zeros(len(setting.prefixes), len(candidates.valid))
        return Source(stream, candidates, sizes, needed, list(blocks), moment)

    of_keys = [block(queries, columns=options.symmetric)] + ([block(positives)] if positives is not None else [])
    sources = [source(key_stream, whole.all_keys, whole.key_sizes, needs.keys, *of_keys)]
    sources[0].correction = whole.key_correction
    if options.query_negatives:
        stream = setting.exchange.stream(setting.whole_queries, whole.query_sizes, setting.gradient_dtype)
        sources.append(source(stream, whole.all_queries, whole.query_sizes, needs.queries, block(queries)))
    if options.shared_hard_negatives:
        stream = setting.exchange.stream(setting.whole_hard.flatten(0, 1), whole.hard_sizes, setting.gradient_dtype)
        sources.append(source(stream, whole.all_hard, whole.hard_sizes, needs.hard, block(queries, tags=())))
    return sources


def some(side: Side, rows: slice) -> Side:
    """Those rows of a side."""
    return Side(
        vectors=side.vectors[rows],
        inverse_norm=side.inverse_norm[:, rows].contiguous(),
        tags=side.tags[rows],
        valid=side.valid[rows],
        limit=None if side.limit is None else side.limit[:, rows].contiguous(),
        inverse_temperature=side.inverse_temperature[rows],
        correction=None if side.correction is None else side.correction[rows],
    )


def merge(top: Tensor, total: Tensor, other_top: Tensor, other_total: Tensor) -> None:
    """Join (maximum, sum of exponentials) with another, in place."""
    highest = torch.maximum(top, other_top)
    shift = finite(highest)
    total.copy_(total * (top - shift).exp() + other_total * (other_top - shift).exp())
    top.copy_(highest)
