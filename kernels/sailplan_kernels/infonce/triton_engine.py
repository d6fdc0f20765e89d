"""The tile of scores in Triton (infonce/tile.py is the contract): scores, masks and exponentials never leave the chip.

Statistics and gradient each run the matrix product once. Only the plain tile (one prefix, rows alone, no moments) can be
kept: its exponentials stay in the operands' dtype, relative to their row's maximum in their tile, and the gradient rescales
them in place. Partial results of tiles are merged here in fixed order, so equal calls give equal bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton import cdiv, knobs

from sailplan_kernels.infonce.tile import Coefficients, Gradient, Rule, Side, Statistics
from sailplan_kernels.triton_kernels.configurations import INTERPRETER, STEP, Configuration, configuration, switches
from sailplan_kernels.triton_kernels.sigmoid_tiles import sigmoid_kernel
from sailplan_kernels.triton_kernels.tiles import OUT, gradient_kernel, rescale_kernel, statistics_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LN2, LOG2E = 0.6931471805599453, 1.4426950408889634


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
        return TritonTile(rows, columns, rule, keep)

    def pair_bytes(self, rule: Rule, keep: bool, operand: torch.dtype = torch.float32) -> int:
        """The gradient's weights, or what is kept and becomes them."""
        return operand.itemsize * len(rule.prefixes)

    def kept_bytes(self, rule: Rule, operand: torch.dtype = torch.float32) -> int:
        """Exponentials, of plain tiles alone."""
        return operand.itemsize if len(rule.prefixes) == 1 and not (rule.moments or rule.columns or rule.sigmoid) else 0


class TritonTile:
    def __init__(self, rows: Side, columns: Side, rule: Rule, keep: bool):
        self.rows, self.columns, self.rule = rows, columns, rule
        self.n, self.m, self.p = len(rows.vectors), len(columns.vectors), len(rule.prefixes)
        self.moments = rule.moments or rule.columns or rule.sigmoid
        self.keep = keep and self.p == 1 and not self.moments
        self.kept: tuple[Tensor, Tensor] | None = None  # exponentials [1, n, pitch] and their maxima [TC, n], log2
        sigmoid = "sigmoid moments" if rule.moments else "sigmoid"
        self.kind = sigmoid if rule.sigmoid else "columns" if rule.columns else "moments" if self.moments else "plain"
        limits = rows.limit is not None or (rule.columns and columns.limit is not None)
        odd = any(x % STEP for x in (*rule.prefixes, rows.vectors.shape[1]))
        self.masks = "odd" if odd else "all" if limits or len(rule.tags_in_use) > 1 else "few"
        self.switches = switches(self.kind, self.masks)
        self.config = self._configuration()
        self.tiles = cdiv(self.n, self.config.BM), cdiv(self.m, self.config.BN)
        self.pitch = cdiv(self.m, STEP) * STEP  # rows of weights start aligned, for the stores and for the products after them
        self.bounds = _bounds(rule.prefixes, self.switches["STEP"], rows.vectors.device)
        self.row_tags, self.column_tags = self._tags(rows, -2), self._tags(columns, -1)
        self.row_norm, self.column_norm = rows.inverse_norm.contiguous(), columns.inverse_norm.contiguous()
        correction = self._new(self.m).zero_() if columns.correction is None else columns.correction
        self.row_shift = self._new(self.n).zero_().masked_fill_(~rows.valid, OUT.value) if rule.columns else correction
        self.column_shift = correction.masked_fill(~columns.valid, OUT.value)

    def _configuration(self) -> Configuration:
        if self.rows.vectors.device.type != "cuda":
            return INTERPRETER
        major, minor = torch.cuda.get_device_capability(self.rows.vectors.device)
        return configuration(self.rows.vectors.dtype, self.kind, self.masks, 10 * major + minor)

    def _tags(self, side: Side, none: int) -> Tensor:
        """int64 [TAGS, rows of the side], ``none`` where there is no tag and in tags not in use: it differs by side, so it matches nothing."""
        tags = side.tags.new_full((self.switches["TAGS"], len(side.tags)), none)
        for place, tag in enumerate(self.rule.tags_in_use):
            tags[place] = torch.where(side.tags[:, tag] < 0, none, side.tags[:, tag])
        return tags

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.rows.vectors.device)

    def _weights(self) -> Tensor:
        return torch.empty((self.p, self.n, self.pitch), dtype=self.rows.vectors.dtype, device=self.rows.vectors.device)

    def _limit(self, side: Side) -> Tensor:
        """[P, rows of the side]; one side may have a limit and the other none."""
        if side.limit is not None:
            return side.limit.contiguous()
        unlimited = self.switches["LIMITS"]
        return torch.full_like(side.inverse_norm, torch.inf, memory_format=torch.contiguous_format) if unlimited else self.column_shift

    def _launch(self, kernel, *outputs: Tensor, **more: bool) -> None:
        rows, columns, config = self.rows, self.columns, self.config
        switches = {name: value for name, value in self.switches.items() if name in kernel.arg_names}
        if not (self.n and self.m):
            return
        kernel[(self.tiles[0] * self.tiles[1],)](
            rows.vectors, columns.vectors, self.bounds, self.row_norm, self.column_norm, self.row_tags, self.column_tags,
            self._limit(rows), self._limit(columns), rows.inverse_temperature, columns.inverse_temperature,
            self.row_shift, self.column_shift, *outputs, self.n, self.m, rows.vectors.shape[1], self.pitch, self.p,
            **switches, **more, BM=config.BM, BN=config.BN, BK=config.BK, GROUP=config.GROUP, PRECISION="ieee",
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def statistics(self) -> Statistics:
        p, n, m, (tr, tc) = self.p, self.n, self.m, self.tiles
        row_maximum, row_sum = self._new(p, tc, n), self._new(p, tc, n)
        column_maximum, column_sum = (self._new(p, tr, m), self._new(p, tr, m)) if self.rule.columns else (row_maximum, row_sum)
        kept = self._weights() if self.keep else row_sum
        self._launch(statistics_kernel, row_maximum, row_sum, column_maximum, column_sum, kept, KEEP=self.keep)
        if self.keep:
            self.kept = kept, row_maximum[0]
        if self.rule.sigmoid:
            return Statistics(self._new(p, n).zero_(), row_sum.sum(1), None, None)
        merged = _merge(row_maximum, row_sum)
        return Statistics(*merged, *(_merge(column_maximum, column_sum) if self.rule.columns else (None, None)))

    def gradient(self, coefficients: Coefficients) -> Gradient:
        if self.kept is not None:
            return self._rescaled(coefficients)
        if self.rule.sigmoid:
            return self._sigmoid_gradient(coefficients)
        p, n, m, (tr, tc), rule = self.p, self.n, self.m, self.tiles, self.rule
        weights = self._weights()
        row_moment, column_moment = (self._new(p, tc, n), self._new(p, tr, m)) if self.moments else (self.row_norm, self.column_norm)
        row_temperature, column_temperature = (torch.empty_like(row_moment), torch.empty_like(column_moment)) if rule.columns else (row_moment, column_moment)
        row_log, row_push = coefficients.row_log_negatives.contiguous(), coefficients.row_push.contiguous()
        column_log, column_push = row_log, row_push
        if rule.columns:
            assert coefficients.column_log_negatives is not None and coefficients.column_push is not None
            column_log, column_push = coefficients.column_log_negatives.contiguous(), (coefficients.column_push * self.columns.valid).contiguous()
        outputs = (row_log, row_push, column_log, column_push, weights, row_moment, column_moment, row_temperature, column_temperature)
        self._launch(gradient_kernel, *outputs, MOMENTS=self.moments)
        if not self.moments:
            return self._without_moments(weights)
        moment = row_moment.sum(1)
        return Gradient(
            weights=list(weights[:, :, :m].unbind(0)),
            row_moment=moment,
            column_moment=column_moment.sum(1),
            row_temperature=row_temperature.sum(1) if rule.columns else moment,
            column_temperature=column_temperature.sum(1) if rule.columns else None,
        )

    def _sigmoid_gradient(self, coefficients: Coefficients) -> Gradient:
        p, n, m, (tr, tc), moments = self.p, self.n, self.m, self.tiles, self.rule.moments
        weights = self._weights()
        row_sum, row_total, row_moment = (self._new(p, tc, n) for _ in range(3))
        column_moment = self._new(p, tr, m) if moments else row_moment
        self._launch(sigmoid_kernel, coefficients.row_push.contiguous(), weights, row_sum, row_total, row_moment, column_moment, MOMENTS=moments)
        moment = row_moment.sum(1)
        return Gradient(
            weights=list(weights[:, :, :m].unbind(0)),
            row_moment=moment,
            column_moment=column_moment.sum(1) if moments else torch.zeros_like(self.column_norm),
            row_temperature=moment,
            column_temperature=None,
            row_total=row_total.sum(1),
            row_sum=row_sum.sum(1),
        )

    def _rescaled(self, coefficients: Coefficients) -> Gradient:
        """From exponentials relative to ``maximum`` to weights; a tile without negatives of a row has zeros there."""
        assert self.kept is not None
        (weights, maximum), self.kept = self.kept, None
        scale = coefficients.row_push[0] * self.rows.inverse_temperature * self.row_norm[0]
        factor = torch.exp2((maximum - coefficients.row_log_negatives[0] * LOG2E).clamp_max_(1.0)).mul_(scale)
        if self.n and self.m:
            BM, BN = self.config.BM, self.config.BN
            rescale_kernel[self.tiles](weights, factor, self.column_norm, self.n, self.m, self.pitch, BM=BM, BN=BN, num_warps=8)
        return self._without_moments(weights)

    def _without_moments(self, weights: Tensor) -> Gradient:
        row, column = torch.zeros_like(self.row_norm), torch.zeros_like(self.column_norm)
        return Gradient(list(weights[:, :, : self.m].unbind(0)), row, column, row, None)


@lru_cache(maxsize=64)
def _bounds(prefixes: tuple[int, ...], step: int, device: torch.device) -> Tensor:
    """int32 [P + 1] where prefixes begin and end, in steps; one copy to the device for all tiles of all calls."""
    return torch.tensor([0, *(x // step for x in prefixes)], dtype=torch.int32).to(device)


def _merge(maximum: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """[P, tiles, n] partial maxima (log2) and sums to natural maxima and sums [P, n]."""
    if not maximum.shape[1]:
        shape = maximum.shape[0], maximum.shape[2]
        return maximum.new_full(shape, -torch.inf), total.new_zeros(shape)
    top = maximum.amax(1)
    finite = torch.where(top.isinf(), 0.0, top)
    return top * LN2, (total * torch.exp2(maximum - finite[:, None])).sum(1)
