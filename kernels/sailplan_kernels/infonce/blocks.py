"""Who is scored against whom: blocks of anchors, and the candidates of every kind.

Query blocks hold the queries and, with key negatives, the positives themselves, one a pair.
Candidates are keys; with the options other queries and everybody's hard negatives. (A row's own
hard negatives are no tile: per_row_negatives.py.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sailplan_kernels.exchange.base import Shard
from sailplan_kernels.infonce.masks import Candidates
from sailplan_kernels.tiling.tile import EMPTY, Gradient, MaskConfig, Statistics, TileOperand
from sailplan_kernels.tiling.vectors import Vectors


@dataclass
class QueryBlock:
    """n rows of tiles, what is known of their denominators, and what their gradient has come to."""

    side: TileOperand
    by_pair: bool  # one a pair; else one a row
    moments: bool  # MaskConfig.moments of their tiles
    gradient: Tensor | None  # [n, D] to add to; None: nobody needs it
    top: Tensor | None = None  # [P, n] highest logit; None: no tile has been looked at
    total: Tensor | None = None  # [P, n] sum of exp(logit - top)
    more: Tensor | None = None  # float64 [P, n] logsumexp of what is no tile
    moment: Tensor | None = None  # [P, n] sum of G * cosine
    temperature: Tensor | None = (
        None  # [n] d loss / d inverse temperature, where rows have their own
    )

    def log_negatives(self, here: slice) -> Tensor:
        """float64 [P, ...] logsumexp of the negatives; minus infinity without any.

        A logit's rounding is a relative error of all weights, so several of them are joined in
        float64 and rounded once, in the end.
        """
        if self.top is None or self.total is None:
            return (
                torch.full_like(self.side.inverse_norm[:, here], -torch.inf, dtype=torch.float64)
                if self.more is None
                else self.more[:, here]
            )
        found = log_of_sums(self.total[:, here], self.top[:, here])
        return found if self.more is None else torch.logaddexp(found, self.more[:, here])

    def merge(self, here: slice, found: Statistics) -> None:
        """Statistics of one more tile of the rows ``here``."""
        count = self.side.inverse_norm.shape[1]
        self.top, self.total = merge(
            self.top, self.total, here, count, found.row_maximum, found.row_sum
        )

    def add_sums(self, here: slice, found: Gradient, per_row: bool) -> None:
        """Sums of a tile's gradient; ``per_row``: also those for the rows' own temperatures."""
        if found.row_moment.shape == self.side.inverse_norm.shape and self.moment is None:
            self.moment = found.row_moment
        else:
            self.moment = (
                torch.zeros_like(self.side.inverse_norm) if self.moment is None else self.moment
            )
            self.moment[:, here] += found.row_moment
        if per_row:
            self.temperature = (
                torch.zeros_like(self.side.inverse_temperature)
                if self.temperature is None
                else self.temperature
            )
            self.temperature[here] += (
                found.row_temperature.sum(0) / self.side.inverse_temperature[here]
            )


@dataclass
class CandidateBlock:
    """C candidates of one kind, and the anchors that are scored against them."""

    vectors: Vectors
    candidates: Candidates
    inverse_temperature: Tensor  # [C] of the column loss
    blocks: list[tuple[QueryBlock, MaskConfig]] = field(default_factory=list)
    correction: Tensor | None = None  # [C]
    max_cosine: Tensor | None = None  # [P, C]

    @property
    def count(self) -> int:
        return len(self.candidates.valid)

    def columns(self, shard: Shard, part: slice) -> TileOperand:
        """Columns ``part`` of a shard."""
        here = slice(shard.start + part.start, shard.start + part.stop)
        assert self.vectors.whole_norms is not None
        whole = TileOperand(
            vectors=shard.vectors[part],
            inverse_norm=self.vectors.whole_norms,
            tags=self.candidates.tags,
            valid=self.candidates.valid,
            max_cosine=self.max_cosine,
            inverse_temperature=self.inverse_temperature,
            correction=self.correction,
        )
        return some(whole, here, whole.vectors)


def some(side: TileOperand, rows: slice, vectors: Tensor | None = None) -> TileOperand:
    """Those rows of a side; the side itself where that is all of them.

    ``vectors``: theirs, if not to be taken from the side.
    """
    if rows.start == 0 and rows.stop == len(side.valid):
        return side
    return TileOperand(
        vectors=side.vectors[rows] if vectors is None else vectors,
        inverse_norm=side.inverse_norm[:, rows].contiguous(),
        tags=side.tags[rows],
        valid=side.valid[rows],
        max_cosine=None if side.max_cosine is None else side.max_cosine[:, rows].contiguous(),
        inverse_temperature=side.inverse_temperature[rows],
        correction=None if side.correction is None else side.correction[rows],
    )


def log_of_sums(total: Tensor, top: Tensor) -> Tensor:
    """float64 logarithm of sums of exponentials relative to ``top``; minus infinity of none."""
    return total.to(torch.float64).log() + top


def merge(
    top: Tensor | None,
    total: Tensor | None,
    here: slice,
    count: int,
    other_top: Tensor,
    other_total: Tensor,
) -> tuple[Tensor, Tensor]:
    """(maximum, sum of exponentials) [P, count] of all tiles so far, joined ``here`` with
    another's; None: there was no tile.

    What tiles have handed out is never written to: a tile may still read its own maxima.
    """
    if other_top.shape[1] == count:
        if top is None or total is None:
            return other_top, other_total
        return _joined(top, total, other_top, other_total)
    if top is None or total is None:
        top = other_top.new_full((len(other_top), count), -torch.inf)
        total = torch.zeros_like(top)
    top[:, here], total[:, here] = _joined(top[:, here], total[:, here], other_top, other_total)
    return top, total


def _joined(
    top: Tensor, total: Tensor, other_top: Tensor, other_total: Tensor
) -> tuple[Tensor, Tensor]:
    highest = torch.maximum(top, other_top).clamp_min_(EMPTY)
    return highest, total * (top - highest).exp() + other_total * (other_top - highest).exp()
