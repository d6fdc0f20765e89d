"""The tile of scores in Triton (tiling/tile.py is the contract): scores, masks and exponentials
never leave the chip.

Statistics and gradient each run the matrix product once. Only the plain tile (one prefix, rows
alone, no moments) can be
kept: its exponentials stay in the operands' dtype, relative to their row's maximum in their tile,
and the gradient rescales them in place. Partial results of tiles are merged here in fixed order, so
equal calls give equal bits.

The recipe's tile (both losses, one temperature for all, no limits: "symmetric") has kernels of its
own, see arithmetic.py.

Tiles in half precision, in whole STEPs, go by the persistent kernels where the device has them,
descriptors reach the vectors (rows that start at multiples of 16 bytes) and all prefixes but the
longest end in whole BKs; all others, and all of schedule "tiles", one program a tile. The meaning
is the same, and the partial results have the same layout, by each configuration's own tile.

What a kernel reads as a vector is padded here to whole tiles: with norms of 0, shifts that are
INVALID_SHIFT, tags that match nothing.
Tags are compared as two 32-bit halves each, so as exactly as in 64 bits.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache

import torch
from torch import Tensor
from triton import cdiv, knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from sailplan_kernels.tiling.tile import Coefficients, Gradient, MaskConfig, Statistics, TileOperand
from sailplan_kernels.triton_kernels import persistent, sigmoid_tiles, tiles
from sailplan_kernels.triton_kernels.arithmetic import INVALID_SHIFT
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
        """``schedule``: "auto" (persistent kernels where they can run) or "tiles" (never), which
        is there to be measured against.
        """
        if schedule not in SCHEDULES:
            raise ValueError(
                f"schedule: found {schedule!r}, expected one of {', '.join(SCHEDULES)}"
            )
        self.schedule = schedule

    def tile(
        self, rows: TileOperand, columns: TileOperand, rule: MaskConfig, cached: bool
    ) -> TritonTile:
        """Raises ValueError for vectors that the kernels cannot multiply, or that are where they
        cannot run.
        """
        dtype = rows.vectors.dtype
        if dtype not in DTYPES:
            raise ValueError(
                f"backend triton: found {str(dtype)[6:]}, expected bfloat16, float16 or float32; "
                "use backend='chunked'"
            )
        if rows.vectors.device.type != "cuda" and not knobs.runtime.interpret:
            raise ValueError(
                f"backend triton: found vectors on {rows.vectors.device}, expected a CUDA device; "
                "use backend='chunked'"
            )
        if rule.sigmoid and rule.columns:
            raise ValueError(
                "MaskConfig: found sigmoid with columns, expected one of them; a sigmoid's pairs "
                "have one logit"
            )
        return TritonTile(rows, columns, rule, cached, self.schedule)

    def pair_bytes(
        self, rule: MaskConfig, cached: bool, operand: torch.dtype = torch.float32
    ) -> int:
        """The gradient's weights, or what is kept and becomes them."""
        return operand.itemsize * len(rule.prefixes)

    def kept_bytes(self, rule: MaskConfig, operand: torch.dtype = torch.float32) -> int:
        """Exponentials, of plain tiles alone."""
        return (
            operand.itemsize
            if len(rule.prefixes) == 1 and not (rule.moments or rule.columns or rule.sigmoid)
            else 0
        )


class TritonTile:
    def __init__(
        self, rows: TileOperand, columns: TileOperand, rule: MaskConfig, cached: bool, schedule: str
    ):
        self.rows, self.columns, self.rule = rows, columns, rule
        self.n, self.m, self.p = len(rows.vectors), len(columns.vectors), len(rule.prefixes)
        self.moments = rule.moments or rule.columns or rule.sigmoid
        self.cached = cached and self.p == 1 and not self.moments
        self.kept: tuple[Tensor, Tensor] | None = (
            None  # exponentials [1, n, pitch] and their maxima [TC, n], log2
        )
        limits = rows.max_cosine is not None or (rule.columns and columns.max_cosine is not None)
        odd = any(x % STEP for x in (*rule.prefixes, rows.vectors.shape[1]))
        self.masks = "odd" if odd else "limits" if limits else "ids"
        sigmoid = "sigmoid moments" if rule.moments else "sigmoid"
        shared = rule.one_temperature and self.masks == "ids" and columns.correction is None
        both = "symmetric" if shared else "columns"
        self.kind = (
            sigmoid
            if rule.sigmoid
            else both
            if rule.columns
            else "moments"
            if self.moments
            else "plain"
        )
        self.switches = switches(self.kind, self.masks)
        self.pitch = (
            cdiv(self.m, STEP) * STEP
        )  # rows of weights start aligned, for the stores and for the products after them
        self.config = self._configuration(schedule)
        self.tiles = cdiv(self.n, self.config.BM), cdiv(self.m, self.config.BN)
        self.padded = self.tiles[0] * self.config.BM, self.tiles[1] * self.config.BN
        self.vectors = self._vectors() if self.n and self.m else {}

    def _configuration(self, schedule: str) -> Configuration:
        device, dtype = self.rows.vectors.device, self.rows.vectors.dtype
        major, minor = (
            torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, INTERPRETED)
        )
        kind = dtype, self.kind, self.masks, 10 * major + minor
        if (
            schedule == "auto"
            and _described(self.rows.vectors)
            and _described(self.columns.vectors)
        ):
            found = TABLES["persistent"](*kind)
            if (
                found is not None
                and found.BM * self.pitch < 2**31
                and not any(x % found.BK for x in self.rule.prefixes[:-1])
            ):
                return found
        return configuration(*kind)

    def _vectors(self) -> dict[str, Tensor]:
        """What the kernels read of both sides beside the vectors, padded.

        Shifts are in units of log2.
        """
        rows, columns, (n, m) = self.rows, self.columns, self.padded
        scale = _padded(rows.inverse_temperature, n, 0.0)
        limits = [scale, scale]  # never read
        if self.switches["LIMITS"]:  # one side may have a limit and the other none
            sides = ((rows, n), (columns, m))
            limits = [
                _padded(
                    torch.full_like(x.inverse_norm, torch.inf)
                    if x.max_cosine is None
                    else x.max_cosine,
                    k,
                    torch.inf,
                )
                for x, k in sides
            ]
        correction = (
            torch.zeros_like(columns.inverse_temperature)
            if columns.correction is None
            else columns.correction * LOG2E
        )
        found = {
            "row_norm": _padded(rows.inverse_norm, n, 0.0),
            "column_norm": _padded(columns.inverse_norm, m, 0.0),
            "row_tags": self._tags(rows, -2, n),
            "column_tags": self._tags(columns, -1, m),
            "row_max_cosine": limits[0],
            "column_max_cosine": limits[1],
            "row_scale": scale,
            "column_shift": _padded(
                correction.masked_fill(~columns.valid, INVALID_SHIFT.value), m, INVALID_SHIFT.value
            ),
        }
        found["column_scale"] = found["row_shift"] = scale
        if (
            self.kind == "symmetric"
        ):  # ranks that were given different numbers get none: their losses are NaN, not wrong
            other = (
                columns.inverse_temperature - rows.inverse_temperature[0]
            ).abs() > 1e-3 * rows.inverse_temperature[0]
            found["column_shift"][: self.m].masked_fill_(
                other & (columns.inverse_temperature > 0), torch.nan
            )
        if self.rule.columns:
            found["column_scale"] = _padded(columns.inverse_temperature, m, 0.0)
            found["row_shift"] = _padded(
                torch.zeros_like(rows.inverse_temperature).masked_fill_(
                    ~rows.valid, INVALID_SHIFT.value
                ),
                n,
                INVALID_SHIFT.value,
            )
        return found

    def _tags(self, side: TileOperand, none: int, padded: int) -> Tensor:
        """int32 [T, 2, padded], lower and upper halves, ``none`` where there is no tag: it
        differs by side, so it matches nothing.
        """
        tags = (
            side.tags[:, list(self.rule.tags_in_use)]
            if len(self.rule.tags_in_use) < side.tags.shape[1]
            else side.tags
        )
        halves = (
            torch.where(tags < 0, none, tags).contiguous().view(torch.int32).view(*tags.shape, 2)
        )
        found = halves.new_empty(tags.shape[1], 2, padded)
        found[:, 0, len(tags) :], found[:, 1, len(tags) :] = none, -1
        found[:, :, : len(tags)] = halves.permute(1, 2, 0)
        return found

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.rows.vectors.device)

    def _weights(self) -> Tensor:
        return torch.empty(
            (self.p, self.n, self.pitch),
            dtype=self.rows.vectors.dtype,
            device=self.rows.vectors.device,
        )

    def _launch(self, name: str, **given: object) -> None:
        """The kernel ``name``; ``given``: what it takes beyond both sides, lengths and the
        configuration.
        """
        if not (self.n and self.m):
            return
        rows, columns, config, rule = self.rows, self.columns, self.config, self.rule
        known = {
            "rows": rows.vectors,
            "columns": columns.vectors,
            "bounds": _bounds(rule.prefixes, int(self.switches["STEP"]), rows.vectors.device),
            **self.vectors,
            "n": self.n,
            "m": self.m,
            "N": self.padded[0],
            "M": self.padded[1],
            "D": rows.vectors.shape[1],
            "pitch": self.pitch,
            "prefixes": self.p,
            "tags": len(rule.tags_in_use),
            "PRECISION": "ieee",
            **self.switches,
            **asdict(config),
            **given,
        }
        module, programs = (
            (sigmoid_tiles if name == "sigmoid" else tiles),
            self.tiles[0] * self.tiles[1],
        )
        if config.schedule != "tiles":
            module, programs = persistent, min(programs, _processors(rows.vectors.device))
            known |= self._descriptors()
        kernel = getattr(module, f"{name}_kernel")
        arguments = {argument: known[argument] for argument in kernel.arg_names}
        kernel[(programs,)](**arguments, num_warps=config.warps, num_stages=config.stages)

    def _descriptors(self) -> dict[str, TensorDescriptor]:
        """Of both sides, as far as the longest prefix goes."""
        config, length = self.config, self.rule.prefixes[-1]
        sides = {
            "rows": (self.rows.vectors, config.BM),
            "columns": (self.columns.vectors, config.BN),
        }
        return {
            name: TensorDescriptor(x, [len(x), length], list(x.stride()), [block, config.BK])
            for name, (x, block) in sides.items()
        }

    def statistics(self) -> Statistics:
        p, n, m, (tr, tc) = self.p, self.n, self.m, self.tiles
        row_maximum, row_sum = self._new(p, tc, n), self._new(p, tc, n)
        column_maximum, column_sum = (
            (self._new(p, tr, m), self._new(p, tr, m))
            if self.rule.columns
            else (row_maximum, row_sum)
        )
        kept = self._weights() if self.cached else row_sum
        outputs = {
            "row_maximum": row_maximum,
            "row_sum": row_sum,
            "column_maximum": column_maximum,
            "column_sum": column_sum,
        }
        self._launch("statistics", **outputs, kept=kept, CACHED=self.cached)
        if self.cached:
            self.kept = kept, row_maximum[0]
        if self.rule.sigmoid:
            return Statistics(self._new(p, n).zero_(), row_sum.sum(1), None, None)
        merged = _merge(row_maximum, row_sum)
        return Statistics(
            *merged, *(_merge(column_maximum, column_sum) if self.rule.columns else (None, None))
        )

    def gradient(self, coefficients: Coefficients) -> Gradient:
        if self.kept is not None:
            return self._rescaled(coefficients)
        if self.rule.sigmoid:
            return self._sigmoid_gradient(coefficients)
        p, n, m, (tr, tc), rule = self.p, self.n, self.m, self.tiles, self.rule
        weights = self._weights()
        row_moment, column_moment = (
            (self._new(p, tc, n), self._new(p, tr, m)) if self.moments else (weights, weights)
        )
        told_apart = self.kind == "columns"  # temperatures
        row_temperature, column_temperature = (
            (torch.empty_like(row_moment), torch.empty_like(column_moment))
            if told_apart
            else (row_moment, column_moment)
        )
        row_log = column_log = _exponent(
            coefficients.row_log_negatives,
            coefficients.row_negative_grad,
            self.rows,
            self.padded[0],
        )
        if rule.columns:
            assert (
                coefficients.column_log_negatives is not None
                and coefficients.column_negative_grad is not None
            )
            column_negative_grad = coefficients.column_negative_grad * self.columns.valid
            column_log = _exponent(
                coefficients.column_log_negatives,
                column_negative_grad,
                self.columns,
                self.padded[1],
            )
        sums = {
            "row_moment": row_moment,
            "column_moment": column_moment,
            "row_temperature": row_temperature,
            "column_temperature": column_temperature,
        }
        self._launch(
            "gradient",
            row_log=row_log,
            column_log=column_log,
            **sums,
            weights=weights,
            MOMENTS=self.moments,
        )
        if not self.moments:
            return self._without_moments(weights)
        moment = row_moment.sum(1)
        of_columns = (
            column_temperature.sum(1) if told_apart else torch.zeros_like(self.columns.inverse_norm)
        )
        return Gradient(
            weights=list(weights[:, :, :m].unbind(0)),
            row_moment=moment,
            column_moment=column_moment.sum(1),
            row_temperature=row_temperature.sum(1) if told_apart else moment,
            column_temperature=of_columns if rule.columns else None,
        )

    def _sigmoid_gradient(self, coefficients: Coefficients) -> Gradient:
        p, n, m, (tr, tc), moments = self.p, self.n, self.m, self.tiles, self.rule.moments
        weights = self._weights()
        row_sum, row_total, row_moment = (self._new(p, tc, n) for _ in range(3))
        column_moment = self._new(p, tr, m) if moments else row_moment
        sums = {
            "row_sum": row_sum,
            "row_total": row_total,
            "row_moment": row_moment,
            "column_moment": column_moment,
        }
        self._launch(
            "sigmoid",
            **sums,
            row_log=_padded(coefficients.row_negative_grad, self.padded[0], 0.0),
            weights=weights,
            MOMENTS=moments,
        )
        moment = row_moment.sum(1)
        return Gradient(
            weights=list(weights[:, :, :m].unbind(0)),
            row_moment=moment,
            column_moment=column_moment.sum(1)
            if moments
            else torch.zeros_like(self.columns.inverse_norm),
            row_temperature=moment,
            column_temperature=None,
            row_total=row_total.sum(1),
            row_sum=row_sum.sum(1),
        )

    def _rescaled(self, coefficients: Coefficients) -> Gradient:
        """From exponentials relative to ``maximum`` to weights; a tile without negatives of a
        row has zeros there.
        """
        assert self.kept is not None
        (weights, maximum), self.kept = self.kept, None
        scale = (
            coefficients.row_negative_grad[0]
            * self.rows.inverse_temperature
            * self.rows.inverse_norm[0]
        )
        factor = torch.exp2(
            (maximum - coefficients.row_log_negatives[0] * LOG2E).clamp_max_(1.0)
        ).mul_(scale)
        if self.n and self.m:
            BM, BN = self.config.BM, self.config.BN
            column = self.columns.inverse_norm[0].contiguous()
            tiles.rescale_kernel[self.tiles](
                weights,
                factor,
                column,
                self.n,
                self.m,
                self.pitch,
                BM=BM,
                BN=BN,
                num_warps=RESCALE_WARPS,
            )
        return self._without_moments(weights)

    def _without_moments(self, weights: Tensor) -> Gradient:
        row, column = (
            torch.zeros_like(self.rows.inverse_norm),
            torch.zeros_like(self.columns.inverse_norm),
        )
        return Gradient(list(weights[:, :, : self.m].unbind(0)), row, column, row, None)


def _padded(x: Tensor, length: int, fill: float) -> Tensor:
    """[..., length], contiguous and aligned; itself where it is so already."""
    if x.shape[-1] == length and x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    found = x.new_full((*x.shape[:-1], length), fill)
    found[..., : x.shape[-1]] = x
    return found


def _exponent(log: Tensor, negative_grad: Tensor, side: TileOperand, length: int) -> Tensor:
    """[P, length] what to subtract from a logit times log2(e), so that 2 to the rest is push *
    inverse temperature * softmax weight.
    """
    return _padded(
        log * LOG2E - (negative_grad * side.inverse_temperature).log2(), length, torch.inf
    )


def _described(vectors: Tensor) -> bool:
    """Whether a tensor descriptor can be made of them: rows without gaps inside, at multiples of
    16 bytes.
    """
    pitch, step = vectors.stride()
    return step == 1 and vectors.data_ptr() % 16 == 0 and pitch * vectors.element_size() % 16 == 0


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    """Programs of a persistent launch: each fills a processor."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else INTERPRETER_PROGRAMS
    )


@lru_cache(maxsize=64)
def _bounds(prefixes: tuple[int, ...], step: int, device: torch.device) -> Tensor:
    """int32 [P + 1] where prefixes begin and end, in steps; one copy to the device for all tiles
    of all calls.
    """
    return torch.tensor([0, *(x // step for x in prefixes)], dtype=torch.int32).to(device)


def _merge(maximum: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """[P, tiles, n] partial maxima (log2) and sums to natural maxima and sums [P, n]."""
    if not maximum.shape[1]:
        shape = maximum.shape[0], maximum.shape[2]
        return maximum.new_full(shape, -torch.inf), total.new_zeros(shape)
    top = maximum.amax(1)
    finite = torch.where(top.isinf(), 0.0, top)
    return top * LN2, (total * torch.exp2(maximum - finite[:, None])).sum(1)
