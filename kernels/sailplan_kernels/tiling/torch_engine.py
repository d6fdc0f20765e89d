"""A tile of scores in plain torch: the vendor's matrix products, scores in full precision,
everything else in place.

A tile is computed once per prefix as cosines, with MASKED_SCORE where identity rules a pair out
(finite, so that 0 * MASKED_SCORE is 0 and not NaN; its exponential is exactly 0). A tile whose
moments nobody asks for keeps its exponentials between the two questions instead of its cosines: the
gradient then costs one multiplication a pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sailplan_kernels.tiling.products import product, softplus_sum
from sailplan_kernels.tiling.tile import (
    EMPTY,
    Coefficients,
    Gradient,
    MaskConfig,
    Statistics,
    TileOperand,
)

MASKED_SCORE = -1e30


class TorchEngine:
    """See tile.Engine."""

    name = "chunked"

    def tile(
        self, rows: TileOperand, columns: TileOperand, rule: MaskConfig, cached: bool
    ) -> _Tile:
        return _Tile(rows, columns, rule, cached)

    def pair_bytes(
        self, rule: MaskConfig, cached: bool, operand: torch.dtype = torch.float32
    ) -> int:
        """Scores are float32 whatever the operands; the weights that half-precision products
        want are smaller than what they come from.
        """
        if _plain(rule):
            return 4 + 4  # scores; masks in the making, or weights in half precision
        # Cosines, row logits that become weights, and with columns their own; masks, and what the
        # sigmoid's sum makes.
        return (
            4 * len(rule.prefixes) * (3 if rule.columns else 2)
            + len(rule.prefixes)
            + (8 if rule.sigmoid else 2)
        )

    def kept_bytes(self, rule: MaskConfig, operand: torch.dtype = torch.float32) -> int:
        """Exponentials, or the cosines of all prefixes."""
        return 4 * len(rule.prefixes)


def _plain(rule: MaskConfig) -> bool:
    return len(rule.prefixes) == 1 and not (rule.columns or rule.moments or rule.sigmoid)


class _Tile:
    def __init__(
        self, rows: TileOperand, columns: TileOperand, rule: MaskConfig, cached: bool
    ) -> None:
        self.rows, self.columns, self.rule, self.cached = rows, columns, rule, cached
        self.plain = _plain(rule)
        self.kept: Tensor | None = (
            None  # [P, n, m] cosines; of a plain tile exponentials relative to its row maxima
        )
        self.maximum: Tensor | None = None  # [P, n]

    def statistics(self) -> Statistics:
        cosines = self._cosines()
        if self.rule.sigmoid:
            sums = [
                softplus_sum(self._row_logits(cosine[None], p)[0])
                for p, cosine in enumerate(cosines)
            ]
            self.kept = cosines if self.cached else None
            return Statistics(
                torch.zeros_like(self.rows.inverse_norm), torch.stack(sums), None, None
            )
        column_top = column_sum = None
        if self.rule.columns:
            column_top, column_sum, _ = _sums(self._column_logits(cosines), 1)
        top, total, exponentials = _sums(
            self._row_logits(cosines, in_place=self.plain or not self.cached), 2
        )
        if self.cached:
            self.kept, self.maximum = exponentials if self.plain else cosines, top
        return Statistics(top, total, column_top, column_sum)

    def gradient(self, coefficients: Coefficients) -> Gradient:
        rows, columns, rule = self.rows, self.columns, self.rule
        if self.plain:
            return self._plain_gradient(coefficients)
        cosines, self.kept = self._cosines() if self.kept is None else self.kept, None
        total = sigmoid_sum = row_temperature = column_temperature = row_moment = column_moment = (
            None
        )
        weight = self._row_logits(cosines)
        if rule.sigmoid:
            sigmoid_sum = torch.stack([softplus_sum(x) for x in weight])
            weight.sigmoid_().mul_(coefficients.row_negative_grad[:, :, None])
            total = weight.sum(2)
            weight.mul_(rows.inverse_temperature[:, None])
        else:
            weight.sub_(coefficients.row_log_negatives[:, :, None]).exp_().mul_(
                (coefficients.row_negative_grad * rows.inverse_temperature)[:, :, None]
            )
        if rule.columns:
            assert (
                coefficients.column_log_negatives is not None
                and coefficients.column_negative_grad is not None
            )
            row_temperature = None if rule.one_temperature else (weight * cosines).sum(2)
            other = (
                self._column_logits(cosines).sub_(coefficients.column_log_negatives[:, None]).exp_()
            )
            other.mul_((coefficients.column_negative_grad * columns.inverse_temperature)[:, None])
            column_temperature = None if rule.one_temperature else (other * cosines).sum(1)
            weight.add_(other)
            del other
        if rule.moments:
            cosines.mul_(weight)
            row_moment, column_moment = cosines.sum(2), cosines.sum(1)
        elif row_temperature is None and rule.sigmoid:
            row_temperature = cosines.mul_(weight).sum(2)
        del cosines
        weight.mul_(rows.inverse_norm[:, :, None]).mul_(columns.inverse_norm[:, None])
        for s in reversed(range(len(weight) - 1)):
            weight[s].add_(weight[s + 1])
        none = torch.zeros_like(rows.inverse_norm) if row_moment is None else row_moment
        return Gradient(
            weights=list(weight.to(rows.vectors.dtype).unbind(0)),
            row_moment=none,
            column_moment=torch.zeros_like(columns.inverse_norm)
            if column_moment is None
            else column_moment,
            row_temperature=none if row_temperature is None else row_temperature,
            column_temperature=column_temperature,
            row_total=total,
            row_sum=sigmoid_sum,
        )

    def _plain_gradient(self, coefficients: Coefficients) -> Gradient:
        rows, columns = self.rows, self.columns
        scale = coefficients.row_negative_grad[0] * rows.inverse_temperature * rows.inverse_norm[0]
        if self.kept is None:
            weight = self._row_logits(self._cosines(), in_place=True)[0]
            weight.sub_(coefficients.row_log_negatives[0][:, None]).exp_()
        else:
            assert self.maximum is not None
            scale = scale * (self.maximum[0] - coefficients.row_log_negatives[0]).exp()
            weight, self.kept = self.kept[0], None
        weight.mul_(scale[:, None]).mul_(columns.inverse_norm[0])
        of_rows, of_columns = (
            rows.inverse_norm.new_zeros(()).expand(x.inverse_norm.shape) for x in (rows, columns)
        )
        return Gradient([weight.to(rows.vectors.dtype)], of_rows, of_columns, of_rows, None)

    def _cosines(self) -> Tensor:
        """[P, n, m], MASKED_SCORE where identity or validity rules the pair out."""
        rows, columns, prefixes = self.rows, self.columns, self.rule.prefixes
        excluded = ~columns.valid
        if self.rule.tags_in_use:
            mine = rows.tags.masked_fill(rows.tags < 0, -2)  # matches nothing
            for tag in self.rule.tags_in_use:
                excluded = excluded | (columns.tags[None, :, tag] == mine[:, tag, None])
        found = torch.empty(
            (len(prefixes), len(rows.valid), len(columns.valid)),
            dtype=rows.inverse_norm.dtype,
            device=rows.valid.device,
        )
        start = 0
        for p, end in enumerate(prefixes):
            product(
                rows.vectors[:, start:end],
                columns.vectors[:, start:end].T,
                found[p],
                None if p == 0 else found[p - 1],
            )
            start = end
        return (
            found.mul_(rows.inverse_norm[:, :, None])
            .mul_(columns.inverse_norm[:, None])
            .masked_fill_(excluded, MASKED_SCORE)
        )

    def _row_logits(self, cosines: Tensor, p: int | None = None, in_place: bool = False) -> Tensor:
        """[P, n, m] of all prefixes, or of prefix ``p`` alone."""
        rows, columns = self.rows, self.columns
        max_cosine = (
            rows.max_cosine if rows.max_cosine is None or p is None else rows.max_cosine[p : p + 1]
        )
        beyond = None if max_cosine is None else cosines > max_cosine[:, :, None]
        inverse = rows.inverse_temperature[:, None]
        logits = cosines.mul_(inverse) if in_place else cosines * inverse
        if columns.correction is not None:
            logits.sub_(columns.correction)
        return logits if beyond is None else logits.masked_fill_(beyond, MASKED_SCORE)

    def _column_logits(self, cosines: Tensor) -> Tensor:
        columns = self.columns
        logits = (cosines * columns.inverse_temperature).masked_fill_(
            ~self.rows.valid[:, None], MASKED_SCORE
        )
        return (
            logits
            if columns.max_cosine is None
            else logits.masked_fill_(cosines > columns.max_cosine[:, None], MASKED_SCORE)
        )


def _sums(logits: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima and sums of exponentials over ``dim``, and the exponentials, in place; a maximum of
    EMPTY where nothing is left.
    """
    top = logits.amax(dim).clamp_min_(EMPTY)
    exponentials = logits.sub_(top.unsqueeze(dim)).exp_()
    return top, exponentials.sum(dim), exponentials
