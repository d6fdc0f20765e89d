"""A tile of scores in plain torch: the vendor's matrix products, scores in full precision, everything else in place.

A tile is computed once per prefix as cosines, with FLOOR where identity rules a pair out (finite, so that 0 * FLOOR is 0
and not NaN; its exponential is exactly 0). A tile whose moments nobody asks for keeps its exponentials between the two
questions instead of its cosines: the gradient then costs one multiplication a pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sailplan_kernels.infonce.products import product, softplus_sum
from sailplan_kernels.infonce.tile import Coefficients, Gradient, Rule, Side, Statistics

FLOOR = -1e30
EMPTY = -1e20  # a maximum below it is that of nothing


class TorchEngine:
    """See tile.Engine."""

    name = "chunked"

    def tile(self, rows: Side, columns: Side, rule: Rule, keep: bool) -> _Tile:
        return _Tile(rows, columns, rule, keep)

    def pair_bytes(self, rule: Rule, keep: bool, operand: torch.dtype = torch.float32) -> int:
        """Scores are float32 whatever the operands; the weights that half-precision products want are smaller than what they come from."""
        if _plain(rule):
            return 4 + 4  # scores; masks in the making, or weights in half precision
        return 4 * len(rule.prefixes) + 4 + 8 + 2  # cosines that become weights one by one, both kinds of logits, a product with cosines, masks

    def kept_bytes(self, rule: Rule, operand: torch.dtype = torch.float32) -> int:
        """Exponentials, or the cosines of all prefixes."""
        return 4 * len(rule.prefixes)


def _plain(rule: Rule) -> bool:
    return len(rule.prefixes) == 1 and not (rule.columns or rule.moments or rule.sigmoid)


class _Tile:
    def __init__(self, rows: Side, columns: Side, rule: Rule, keep: bool) -> None:
        self.rows, self.columns, self.rule, self.keep = rows, columns, rule, keep
        self.plain = _plain(rule)
        self.cosines: list[Tensor] | None = None
        self.exponentials: Tensor | None = None  # of a plain tile, relative to its row maxima
        self.maximum: Tensor | None = None

    def statistics(self) -> Statistics:
        cosines = self._cosines()
        row_maximum, row_sum, column_maximum, column_sum = [], [], [], []
        for p, cosine in enumerate(cosines):
            logits = self._row_logits(cosine, p, in_place=self.plain)
            if self.rule.sigmoid:
                row_maximum.append(torch.zeros_like(self.rows.inverse_temperature))
                row_sum.append(softplus_sum(logits))
                continue
            top = logits.amax(1)
            row_sum.append(logits.sub_(_shift(top)[:, None]).exp_().sum(1))
            row_maximum.append(_nothing(top))
            if self.plain and self.keep:
                self.exponentials, self.maximum = logits, _shift(top)
            if self.rule.columns:
                logits = self._column_logits(cosine, p)
                top = logits.amax(0)
                column_sum.append(logits.sub_(_shift(top)).exp_().sum(0))
                column_maximum.append(_nothing(top))
        self.cosines = cosines if self.keep and not self.plain else None
        stacked = [torch.stack(x) if x else None for x in (row_maximum, row_sum, column_maximum, column_sum)]
        return Statistics(*stacked)  # type: ignore[arg-type]

    def gradient(self, coefficients: Coefficients) -> Gradient:
        rows, columns, rule = self.rows, self.columns, self.rule
        prefixes, dtype = len(rule.prefixes), rows.vectors.dtype
        if self.plain:
            return self._plain_gradient(coefficients)
        cosines = self.cosines if self.cosines is not None else self._cosines()
        self.cosines = None
        weights: list[Tensor] = []
        moments: dict[str, list[Tensor]] = {name: [] for name in ("row", "column", "row_t", "column_t", "total", "sum")}
        above: Tensor | None = None
        for p in reversed(range(prefixes)):
            cosine = cosines.pop()
            weight = self._row_logits(cosine, p)
            if rule.sigmoid:
                moments["sum"].append(softplus_sum(weight))
                weight.sigmoid_().mul_(coefficients.row_push[p][:, None])
                moments["total"].append(weight.sum(1))
                weight.mul_(rows.inverse_temperature[:, None])
            else:
                weight.sub_(coefficients.row_log_negatives[p][:, None]).exp_()
                weight.mul_((coefficients.row_push[p] * rows.inverse_temperature)[:, None])
            moments["row_t"].append(torch.linalg.vecdot(weight, cosine))
            if rule.columns:
                assert coefficients.column_log_negatives is not None and coefficients.column_push is not None
                other = self._column_logits(cosine, p).sub_(coefficients.column_log_negatives[p]).exp_()
                other.mul_(coefficients.column_push[p] * columns.inverse_temperature)
                moments["column_t"].append(torch.linalg.vecdot(other, cosine, dim=0))
                weight.add_(other)
                del other
            if rule.moments:
                moments["row"].append(torch.linalg.vecdot(weight, cosine))
                moments["column"].append(torch.linalg.vecdot(weight, cosine, dim=0))
            weight.mul_(rows.inverse_norm[p][:, None]).mul_(columns.inverse_norm[p])
            above = weight if above is None else weight.add_(above)
            weights.append(above.to(dtype))
        stacked = {name: torch.stack(x[::-1]) if x else None for name, x in moments.items()}
        row, column = stacked["row"], stacked["column"]
        return Gradient(
            weights=weights[::-1],
            row_moment=rows.inverse_norm.new_zeros(rows.inverse_norm.shape) if row is None else row,
            column_moment=columns.inverse_norm.new_zeros(columns.inverse_norm.shape) if column is None else column,
            row_temperature=stacked["row_t"],  # type: ignore[arg-type]
            column_temperature=stacked["column_t"],
            row_total=stacked["total"],
            row_sum=stacked["sum"],
        )

    def _plain_gradient(self, coefficients: Coefficients) -> Gradient:
        rows, columns = self.rows, self.columns
        scale = coefficients.row_push[0] * rows.inverse_temperature * rows.inverse_norm[0]
        weight = self.exponentials
        if weight is None:
            weight = self._row_logits(self._cosines()[0], 0, in_place=True)
            weight.sub_(coefficients.row_log_negatives[0][:, None]).exp_()
        else:
            assert self.maximum is not None
            # Where this tile has no negative of a row, its maximum stands at 0 and its exponentials are 0: do not let 0 * inf in.
            scale = scale * (self.maximum - coefficients.row_log_negatives[0]).clamp_max(0).exp()
            self.exponentials = None
        weight.mul_(scale[:, None]).mul_(columns.inverse_norm[0])
        zeros = [x.inverse_norm.new_zeros(x.inverse_norm.shape) for x in (rows, columns)]
        return Gradient([weight.to(rows.vectors.dtype)], zeros[0], zeros[1], zeros[0], None)

    def _cosines(self) -> list[Tensor]:
        """[n, m] a prefix, FLOOR where identity or validity rules the pair out."""
        rows, columns, rule = self.rows, self.columns, self.rule
        excluded = (~columns.valid)[None].expand(len(rows.valid), -1)
        for tag in rule.tags_in_use:
            mine = rows.tags[:, tag, None]
            excluded = excluded | ((columns.tags[None, :, tag] == mine) & (mine >= 0))
        found, dots, start = [], None, 0
        for p, end in enumerate(rule.prefixes):
            part = product(rows.vectors[:, start:end], columns.vectors[:, start:end].T, rows.inverse_norm.dtype)
            dots = part if dots is None else dots + part
            scaled = dots if p + 1 == len(rule.prefixes) else dots.clone()
            scaled.mul_(rows.inverse_norm[p][:, None]).mul_(columns.inverse_norm[p]).masked_fill_(excluded, FLOOR)
            found.append(scaled)
            start = end
        return found

    def _row_logits(self, cosine: Tensor, p: int, in_place: bool = False) -> Tensor:
        rows, columns = self.rows, self.columns
        beyond = None if rows.limit is None else cosine > rows.limit[p][:, None]
        logits = cosine.mul_(rows.inverse_temperature[:, None]) if in_place else cosine * rows.inverse_temperature[:, None]
        if columns.correction is not None:
            logits.sub_(columns.correction)
        return logits if beyond is None else logits.masked_fill_(beyond, FLOOR)

    def _column_logits(self, cosine: Tensor, p: int) -> Tensor:
        rows, columns = self.rows, self.columns
        logits = (cosine * columns.inverse_temperature).masked_fill_(~rows.valid[:, None], FLOOR)
        return logits if columns.limit is None else logits.masked_fill_(cosine > columns.limit[p], FLOOR)


def _shift(top: Tensor) -> Tensor:
    return torch.where(top < EMPTY, 0.0, top)


def _nothing(top: Tensor) -> Tensor:
    return torch.where(top < EMPTY, -torch.inf, top)
