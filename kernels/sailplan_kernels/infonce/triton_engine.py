"""The tile of scores in Triton (infonce/tile.py is the contract): scores, masks and exponentials never leave the chip.

Statistics and gradient each run the matrix product once (the scores are computed anew, ``keep`` changes nothing); tiles
write partial results that are merged here in fixed order, so equal calls give equal bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv, knobs

from sailplan_kernels.infonce.tile import Coefficients, Gradient, Rule, Side, Statistics
from sailplan_kernels.triton_kernels.configurations import INTERPRETER, Configuration, configuration
from sailplan_kernels.triton_kernels.tiles import gradient_kernel, statistics_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LN2 = 0.6931471805599453


class TritonEngine:
    name = "triton"

    def tile(self, rows: Side, columns: Side, rule: Rule, keep: bool) -> TritonTile:
        """Raises ValueError for vectors that the kernels cannot multiply, or that are where they cannot run."""
        dtype = rows.vectors.dtype
        if dtype not in DTYPES:
            raise ValueError(f"backend triton: found {str(dtype)[6:]}, expected bfloat16, float16 or float32; use backend='chunked'")
        if rows.vectors.device.type != "cuda" and not knobs.runtime.interpret:
            raise ValueError(f"backend triton: found vectors on {rows.vectors.device}, expected a CUDA device; use backend='chunked'")
        if rule.sigmoid and rule.columns:
            raise ValueError("Rule: found sigmoid with columns, expected one of them; a sigmoid's pairs have one logit")
        return TritonTile(rows, columns, rule)

    def pair_bytes(self, rule: Rule, keep: bool) -> int:
        """The gradient's weights; 4 bytes for float32 vectors, the only case the caller need not know better."""
        return 4 * len(rule.prefixes)


class TritonTile:
    def __init__(self, rows: Side, columns: Side, rule: Rule):
        self.rows, self.columns, self.rule = rows, columns, rule
        self.n, self.m, self.p = len(rows.vectors), len(columns.vectors), len(rule.prefixes)
        self.config = self._configuration()
        self.tiles = cdiv(self.n, self.config.BM), cdiv(self.m, self.config.BN)
        used = list(rule.tags_in_use)
        row_tags = rows.tags[:, used].T.contiguous()
        self.row_tags = torch.where(row_tags < 0, -2, row_tags)  # none never equals the columns' -1
        self.column_tags = columns.tags[:, used].T.contiguous()
        self.limits = rows.limit is not None or (rule.columns and columns.limit is not None)
        self.correction = self._new(self.m).zero_() if columns.correction is None else columns.correction

    def _configuration(self) -> Configuration:
        if self.rows.vectors.device.type != "cuda":
            return INTERPRETER
        major, minor = torch.cuda.get_device_capability(self.rows.vectors.device)
        return configuration(self.rows.vectors.dtype, self.rule.columns, self.p, 10 * major + minor)

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.rows.vectors.device)

    def _limit(self, side: Side) -> Tensor:
        """[P, rows of the side]; one side may have a limit and the other none."""
        if side.limit is not None or not self.limits:
            return self.correction if side.limit is None else side.limit
        return torch.full_like(side.inverse_norm, torch.inf)

    def _launch(self, kernel, *outputs) -> None:
        rows, columns, rule, config = self.rows, self.columns, self.rule, self.config
        kernel[(self.tiles[0] * self.tiles[1],)](
            rows.vectors, columns.vectors, rows.inverse_norm, columns.inverse_norm, self.row_tags, self.column_tags,
            rows.valid.view(torch.uint8), columns.valid.view(torch.uint8), self._limit(rows), self._limit(columns),
            rows.inverse_temperature, columns.inverse_temperature, self.correction, *outputs, self.n, self.m, rows.vectors.shape[1],
            PREFIXES=(0, *rule.prefixes), TAGS=len(rule.tags_in_use), LIMITS=self.limits, COLUMNS=rule.columns, SIGMOID=rule.sigmoid,
            BM=config.BM, BN=config.BN, BK=config.BK, GROUP=config.GROUP, PRECISION="ieee",
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def statistics(self) -> Statistics:
        p, n, m, (tr, tc) = self.p, self.n, self.m, self.tiles
        row_maximum, row_sum = self._new(p, tc, n), self._new(p, tc, n)
        column_maximum, column_sum = (self._new(p, tr, m), self._new(p, tr, m)) if self.rule.columns else (row_maximum, row_sum)
        if n and m:
            self._launch(statistics_kernel, row_maximum, row_sum, column_maximum, column_sum)
        if self.rule.sigmoid:
            return Statistics(self._new(p, n).zero_(), row_sum.sum(1), None, None)
        merged = _merge(row_maximum, row_sum)
        return Statistics(*merged, *(_merge(column_maximum, column_sum) if self.rule.columns else (None, None)))

    def gradient(self, coefficients: Coefficients) -> Gradient:
        p, n, m, (tr, tc), rule = self.p, self.n, self.m, self.tiles, self.rule
        weights = torch.empty((p, n, m), dtype=self.rows.vectors.dtype, device=self.rows.vectors.device)
        row_moment, column_moment = self._new(p, tc, n), self._new(p, tr, m)
        row_temperature, column_temperature = (torch.empty_like(row_moment), torch.empty_like(column_moment)) if rule.columns else (row_moment, column_moment)
        row_total = torch.empty_like(row_moment) if rule.sigmoid else row_moment
        row_log, row_push = coefficients.row_log_negatives, coefficients.row_push
        column_log, column_push = (coefficients.column_log_negatives, coefficients.column_push) if rule.columns else (row_log, row_push)
        if n and m:
            outputs = (row_log, row_push, column_log, column_push, weights)
            self._launch(gradient_kernel, *outputs, row_moment, column_moment, row_temperature, column_temperature, row_total)
        for s in range(p - 2, -1, -1):  # dimensions of prefix s serve all longer prefixes too
            weights[s] += weights[s + 1]
        moment = row_moment.sum(1)
        return Gradient(
            weights=list(weights.unbind(0)),
            row_moment=moment,
            column_moment=column_moment.sum(1),
            row_temperature=row_temperature.sum(1) if rule.columns else moment,
            column_temperature=column_temperature.sum(1) if rule.columns else None,
            row_total=row_total.sum(1) if rule.sigmoid else None,
        )


def _merge(maximum: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """[P, tiles, n] partial maxima (log2) and sums to natural maxima and sums [P, n]."""
    if not maximum.shape[1]:
        shape = maximum.shape[0], maximum.shape[2]
        return maximum.new_full(shape, -torch.inf), total.new_zeros(shape)
    top = maximum.amax(1)
    finite = torch.where(top.isinf(), 0.0, top)
    return top * LN2, (total * torch.exp2(maximum - finite[:, None])).sum(1)
