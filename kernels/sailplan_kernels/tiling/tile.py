"""The contract between the loss and the arithmetic: what happens inside one tile of scores.

A tile is a chunk of rows (anchors) against a set of columns (candidates). The loss itself
(infonce/fused.py) knows ranks, blocks, positives and norms; an engine knows how to go through a
tile: in torch (chunked) or in Triton. Both answer two questions, and never more than this chunk of
scores is in memory:

1. statistics: over the candidates that are negatives, what is each row's (and column's) maximum and
   sum of exponentials?
2. gradient: given each row's (and column's) logsumexp and push, what is d loss / d score of every
   pair, ready to be multiplied with the vectors, and which sums of it do the normalisation and the
   temperature need?

Positives never enter a tile. Scores are cosines of P Matryoshka prefixes, read out of ONE pass over
the dimensions: prefix p's dot product is the running sum up to its length, times both vectors' own
inverse norms of that prefix.

Legend: n rows, m columns, D dimensions, P prefixes (lengths d_1 < ... < d_P <= D), fp = float32, or
float64 for float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

EMPTY = -1e20  # below every logit: a maximum or logsumexp that is no larger is that of nothing


@dataclass(frozen=True)
class TileOperand:
    """The rows or the columns of a tile. All contiguous."""

    # [n, D] operand dtype; bfloat16, float16: of length one over all D, zeros for padding; float32,
    # float64: of any moderate length
    vectors: Tensor
    inverse_norm: (
        Tensor  # fp [P, n] 1 / |first d_p entries of ``vectors``|, 0 where they are all zero
    )
    tags: Tensor  # int64 [n, 3], see infonce/masks.py
    valid: Tensor  # bool [n]
    max_cosine: (
        Tensor | None
        # Fp [P, n] a pair whose cosine is above it is no negative of this row / column; None: no
        # limit
    )
    inverse_temperature: Tensor  # fp [n]
    correction: Tensor | None = (
        None  # fp [n], columns only: subtracted from the row loss's logits; None: 0
    )


@dataclass(frozen=True)
class MaskConfig:
    """What all tiles of a block have in common."""

    prefixes: tuple[int, ...]
    tags_in_use: tuple[int, ...]  # columns of the tags to compare; () for candidates without tags
    columns: bool  # the column loss is wanted too: rows are then candidates of the columns
    # row_moment, column_moment and the temperature sums are read; an engine may leave them 0
    # otherwise
    moments: bool = True
    # All rows and columns have the same inverse temperature, and nobody reads the temperature sums
    one_temperature: bool = False
    # Pairwise sigmoid loss instead of a softmax (SigLIP); its bias is in ``correction``, negated;
    # without columns
    sigmoid: bool = False


@dataclass(frozen=True)
class Statistics:
    """Per prefix; maxima of logits (natural), at most EMPTY where nothing is left; sums of
    exp(logit - maximum), 0 there.

    Row logit: cosine * row inverse temperature - correction, over pairs with valid column,
    different tags and a cosine within the row's limit. Column logit: cosine * column inverse
    temperature, over pairs with valid row AND column, different tags and a cosine below the
    column's max_cosine. With MaskConfig.columns nobody reads rows that are not valid. A maximum may
    be another number that exponentials relative to it stay finite with, but for rows of the longest
    prefix.
    With MaskConfig.sigmoid there is no maximum (0) and row_sum is the sum of softplus(logit).
    """

    row_maximum: Tensor  # fp [P, n]
    row_sum: Tensor  # fp [P, n]
    column_maximum: Tensor | None  # fp [P, m] with MaskConfig.columns
    column_sum: Tensor | None  # fp [P, m]


@dataclass(frozen=True)
class Coefficients:
    """What the whole denominators say: softmax weight = exp(logit - log_negatives), times push =
    d loss / d log_negatives.
    """

    row_log_negatives: (
        Tensor  # fp [P, n] finite (0 where there are no negatives); unused with MaskConfig.sigmoid
    )
    row_negative_grad: Tensor  # fp [P, n] prefix weight included, 0 for rows that do not count
    column_log_negatives: Tensor | None = None  # fp [P, m]
    column_negative_grad: Tensor | None = None  # fp [P, m]


@dataclass(frozen=True)
class Gradient:
    """d loss / d cosine, G = R + C with R = push * softmax * inverse temperature of the row, C
    likewise of the column.
    With MaskConfig.sigmoid: R = negative_grad * sigmoid(logit) * inverse temperature.

    weights[s] [n, m] in the vectors' dtype belongs to dimensions d_{s-1} to d_s: the sum over
    prefixes p >= s of G_p * (row's inverse norm) * (column's inverse norm), so that the rows'
    gradient in those dimensions is weights[s] @ columns[:, d_{s-1}:d_s] and the columns' is
    weights[s].T @ rows[:, d_{s-1}:d_s].
    """

    weights: list[Tensor]
    row_moment: (
        Tensor  # fp [P, n] sum over columns of G * cosine (for the normalisation's backward)
    )
    column_moment: Tensor  # fp [P, m] sum over rows of G * cosine
    # Fp [P, n] sum over columns of R * cosine (for the temperature); equals row_moment without
    # columns
    row_temperature: Tensor
    column_temperature: (
        Tensor | None
    )  # fp [P, m] sum over rows of C * cosine, with MaskConfig.columns; with
    # MaskConfig.one_temperature it may be in row_temperature
    row_total: Tensor | None = (
        # Fp [P, n] sum over columns of negative_grad * sigmoid(logit), with MaskConfig.sigmoid (for
        # the bias)
        None
    )
    row_sum: Tensor | None = (
        None  # fp [P, n] as of Statistics, with MaskConfig.sigmoid: its one pass says both
    )


class Tile(Protocol):
    """One tile at work.

    ``gradient`` may be called without ``statistics`` before it, and at most once.
    """

    def statistics(self) -> Statistics: ...

    def gradient(self, coefficients: Coefficients) -> Gradient: ...


class Engine(Protocol):
    """Makes tiles.

    ``cached``: what the statistics computed may stay in memory until ``gradient``, else the scores
    are computed
    anew. Both give the same masks; results agree up to rounding."""

    @property
    def name(self) -> str:
        """Of the backend; of several that its tiles have gone through "a + b"."""

    def tile(
        self, rows: TileOperand, columns: TileOperand, rule: MaskConfig, cached: bool
    ) -> Tile: ...

    def pair_bytes(
        self, rule: MaskConfig, cached: bool, operand: torch.dtype = torch.float32
    ) -> int:
        """Bytes of memory that a tile of n rows and m columns needs, divided by n * m, at its peak.

        Of vectors in ``operand``; for scores in float32, the caller doubles it for float64.
        """

    def kept_bytes(self, rule: MaskConfig, operand: torch.dtype = torch.float32) -> int:
        """As pair_bytes, of what a kept tile holds between the two questions; 0: the engine
        keeps no such tile.
        """
