"""The tile of scores in Triton (infonce/tile.py is the contract): scores, masks and exponentials never leave the chip.

Statistics and gradient each run the matrix product once. Only the plain tile (one prefix, rows alone, no moments) can be
kept: its exponentials stay in the operands' dtype, relative to their row's maximum in their tile, and the gradient rescales
them in place. Partial results of tiles are merged here in fixed order, so equal calls give equal bits.

Tiles in half precision, in whole STEPs, go by the persistent kernels where the device has them, descriptors reach the vectors
(rows that start at multiples of 16 bytes) and all prefixes but the longest end in whole BKs; all others, and all of schedule
"tiles", one program a tile. The meaning is the same, and the partial results have the same layout, by each configuration's own tile.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton import cdiv, knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from sailplan_kernels.infonce.tile import Coefficients, Gradient, Rule, Side, Statistics
from sailplan_kernels.triton_kernels import persistent, persistent_prefixes, sigmoid_tiles, tiles
from sailplan_kernels.triton_kernels.arithmetic import OUT
from sailplan_kernels.triton_kernels.configurations import (
    INTERPRETED,
    INTERPRETER_PROGRAMS,
    RESCALE_WARPS,
    STEP,
    TABLES,
    Configuration,
    configuration,
    switches,
)

SCHEDULES = ("auto", "tiles")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LN2, LOG2E = 0.6931471805599453, 1.4426950408889634


class TritonEngine:
    name = "triton"

    def __init__(self, schedule: str = "auto") -> None:
        """``schedule``: "auto" (persistent kernels where they can run) or "tiles" (never), which is there to be measured against."""
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: found {schedule!r}, expected one of {', '.join(SCHEDULES)}")
        self.schedule = schedule

    def tile(self, rows: Side, columns: Side, rule: Rule, keep: bool) -> TritonTile:
        """Raises ValueError for vectors that the kernels cannot multiply, or that are where they cannot run."""
        dtype = rows.vectors.dtype
        if dtype not in DTYPES:
            raise ValueError(f"backend triton: found {str(dtype)[6:]}, expected bfloat16, float16 or float32; use backend='chunked'")
        if rows.vectors.device.type != "cuda" and not knobs.runtime.interpret:
            raise ValueError(f"backend triton: found vectors on {rows.vectors.device}, expected a CUDA device; use backend='chunked'")
        if rule.sigmoid and rule.columns:
            raise ValueError("Rule: found sigmoid with columns, expected one of them; a sigmoid's pairs have one logit")
        return TritonTile(rows, columns, rule, keep, self.schedule)

    def pair_bytes(self, rule: Rule, keep: bool, operand: torch.dtype = torch.float32) -> int:
        """The gradient's weights, or what is kept and becomes them."""
        return operand.itemsize * len(rule.prefixes)

    def kept_bytes(self, rule: Rule, operand: torch.dtype = torch.float32) -> int:
        """Exponentials, of plain tiles alone."""
        return operand.itemsize if len(rule.prefixes) == 1 and not (rule.moments or rule.columns or rule.sigmoid) else 0


class TritonTile:
    def __init__(self, rows: Side, columns: Side, rule: Rule, keep: bool, schedule: str):
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
        self.pitch = cdiv(self.m, STEP) * STEP  # rows of weights start aligned, for the stores and for the products after them
        self.config = self._configuration(schedule)
        self.tiles = cdiv(self.n, self.config.BM), cdiv(self.m, self.config.BN)
        self.bounds = _bounds(rule.prefixes, self.switches["STEP"], rows.vectors.device)
        self.row_tags, self.column_tags = self._tags(rows, -2), self._tags(columns, -1)
        self.row_norm, self.column_norm = rows.inverse_norm.contiguous(), columns.inverse_norm.contiguous()
        correction = self._new(self.m).zero_() if columns.correction is None else columns.correction
        self.row_shift = self._new(self.n).zero_().masked_fill_(~rows.valid, OUT.value) if rule.columns else correction
        self.column_shift = correction.masked_fill(~columns.valid, OUT.value)

    def _configuration(self, schedule: str) -> Configuration:
        device, dtype = self.rows.vectors.device, self.rows.vectors.dtype
        major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, INTERPRETED)
        kind = dtype, self.kind, self.masks, 10 * major + minor
        if schedule == "auto" and _described(self.rows.vectors) and _described(self.columns.vectors):
            found = TABLES["persistent" if self.p == 1 else "persistent prefixes"](*kind)
            if found is not None and found.BM * self.pitch < 2**31 and not any(x % found.BK for x in self.rule.prefixes[:-1]):
                return found
        return configuration(*kind)

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

    def _launch(self, name: str, **given: Any) -> None:
        """The kernel ``name``; ``given``: what it takes beyond both sides, lengths and the configuration."""
        if not (self.n and self.m):
            return
        rows, columns, config = self.rows, self.columns, self.config
        known = {
            "rows": rows.vectors, "columns": columns.vectors, "bounds": self.bounds, "row_norm": self.row_norm, "column_norm": self.column_norm,
            "row_tags": self.row_tags, "column_tags": self.column_tags, "row_limit": self._limit(rows), "column_limit": self._limit(columns),
            "row_scale": rows.inverse_temperature, "column_scale": columns.inverse_temperature,
            "row_shift": self.row_shift, "column_shift": self.column_shift, "n": self.n, "m": self.m, "D": rows.vectors.shape[1],
            "length": self.rule.prefixes[-1], "pitch": self.pitch, "prefixes": self.p, "PRECISION": "ieee", **self.switches, **asdict(config), **given,
        }  # fmt: skip
        module, programs = (sigmoid_tiles if name == "sigmoid" else tiles), self.tiles[0] * self.tiles[1]
        if config.schedule != "tiles":
            module = persistent if config.schedule == "persistent" else persistent_prefixes
            programs = min(programs, _processors(rows.vectors.device))
            known |= self._descriptors(given)
        kernel = getattr(module, f"{name}_kernel")
        arguments = {argument: known[argument] for argument in kernel.arg_names}
        kernel[(programs,)](**arguments, num_warps=config.warps, num_stages=config.stages)

    def _descriptors(self, given: dict[str, Any]) -> dict[str, TensorDescriptor]:
        """Of both sides, as far as the longest prefix goes, and of what is written in whole tiles."""
        config, length = self.config, self.rule.prefixes[-1]
        wanted = {"rows": (self.rows.vectors[:, :length], config.BM, config.BK), "columns": (self.columns.vectors[:, :length], config.BN, config.BK)}
        if config.DESCRIPTOR_STORE and given.get("KEEP", True):
            wanted |= {name: (given[name][0], config.BM, config.BN) for name in ("weights", "kept") if name in given}
        return {name: TensorDescriptor(x, list(x.shape), list(x.stride()), block) for name, (x, *block) in wanted.items()}

    def statistics(self) -> Statistics:
        p, n, m, (tr, tc) = self.p, self.n, self.m, self.tiles
        row_maximum, row_sum = self._new(p, tc, n), self._new(p, tc, n)
        column_maximum, column_sum = (self._new(p, tr, m), self._new(p, tr, m)) if self.rule.columns else (row_maximum, row_sum)
        kept = self._weights() if self.keep else row_sum
        outputs = {"row_maximum": row_maximum, "row_sum": row_sum, "column_maximum": column_maximum, "column_sum": column_sum}
        self._launch("statistics", **outputs, kept=kept, KEEP=self.keep)
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
        coefficient = {"row_log": row_log, "row_push": row_push, "column_log": column_log, "column_push": column_push}
        sums = {"row_moment": row_moment, "column_moment": column_moment, "row_temperature": row_temperature, "column_temperature": column_temperature}
        self._launch("gradient", **coefficient, **sums, weights=weights, MOMENTS=self.moments)
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
        sums = {"row_sum": row_sum, "row_total": row_total, "row_moment": row_moment, "column_moment": column_moment}
        self._launch("sigmoid", **sums, row_push=coefficients.row_push.contiguous(), weights=weights, MOMENTS=moments)
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
            tiles.rescale_kernel[self.tiles](weights, factor, self.column_norm, self.n, self.m, self.pitch, BM=BM, BN=BN, num_warps=RESCALE_WARPS)
        return self._without_moments(weights)

    def _without_moments(self, weights: Tensor) -> Gradient:
        row, column = torch.zeros_like(self.row_norm), torch.zeros_like(self.column_norm)
        return Gradient(list(weights[:, :, : self.m].unbind(0)), row, column, row, None)


def _described(vectors: Tensor) -> bool:
    """Whether a tensor descriptor can be made of them: rows without gaps inside, at multiples of 16 bytes."""
    pitch, step = vectors.stride()
    return step == 1 and vectors.data_ptr() % 16 == 0 and pitch * vectors.element_size() % 16 == 0


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    """Programs of a persistent launch: each fills a processor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETER_PROGRAMS


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
