"""The pairwise loss over tiles: every shard of keys comes past once, and every tile is gone through once.

No row waits for a denominator, so a tile gives its part of the loss and of the gradient out of ONE product of scores (6 NMD
with the gradient's two), for all prefixes, under every exchange. What happens inside a tile is an engine's (infonce/tile.py).
Vectors, norms, tensor-parallel peers and how gradients come home are those of infonce (setting.py, fused.py): the positive
never enters a tile, and a cosine is <x_p, y_p> a_p b_p with inverse prefix norms a, b.

Collectives, all inside the forward, depend only on what all ranks agreed on in infonce/problem.py. Differentiable once.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sailplan_kernels.exchange.base import Shard
from sailplan_kernels.infonce.normalize import inverse_norms
from sailplan_kernels.infonce.problem import Problem
from sailplan_kernels.infonce.products import add_product, add_scaled_rows, prefix_dots, softplus
from sailplan_kernels.infonce.setting import FEWEST_ROWS, Setting, cut
from sailplan_kernels.infonce.sources import some
from sailplan_kernels.infonce.tile import Coefficients, Engine, Rule, Side


def tiled_loss(problem: Problem, engine: Engine, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's weighted loss (0-d), loss of each prefix [P], and the positives' cosines [N] of the longest; bias 0-d."""
    longest = problem.options.prefixes[-1]
    return _Tiled.apply(problem, engine, problem.raw_queries[:, :longest], problem.raw_keys[:, :longest], problem.inverse_temperature, bias)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem: Problem, engine: Engine, queries: Tensor, keys: Tensor, inverse_temperature: Tensor, bias: Tensor):
        setting = Setting(problem, engine, queries, keys, problem.raw_hard[..., : queries.shape[1]], inverse_temperature)
        work = _Work(setting, bias.detach(), any(ctx.needs_input_grad))
        for shard in work.stream.shards(accumulate=problem.needs.keys):
            work.add(shard)
        losses, positive = work.positives()
        ctx.gradients = [x if needed else None for x, needed in zip(work.finish(), ctx.needs_input_grad[2:], strict=True)]
        ctx.dtypes = [x.dtype for x in (queries, keys, inverse_temperature, bias)]
        ctx.mark_non_differentiable(losses, positive)
        return (losses * setting.prefix_weights[:, 0]).sum(), losses, positive

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("sigmoid: found a second backward of one call, expected one; call sigmoid again")
        return None, None, *(None if x is None else x.mul_(gradient).to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True))


class _Work:
    """The working state of one forward, of this rank's share of the n rows. ``gradients``: whether this rank wants any."""

    def __init__(self, setting: Setting, bias: Tensor, gradients: bool) -> None:
        self.setting, self.bias, problem, needs = setting, bias, setting.problem, setting.needs
        self.stream = setting.exchange.stream(setting.keys, problem.key_sizes, setting.gradient_dtype)
        self.key_norm = inverse_norms(setting.keys, setting.prefixes, setting.fp)
        self.push = problem.row_weight * setting.prefix_weights  # [P, n] d loss / d a row's sum
        # What others need is computed here too: their keys' gradient has a part in every rank's tiles.
        self.gradients = gradients or needs.keys
        several = len(setting.prefixes) > 1
        self.rule = Rule(setting.prefixes, problem.tags_in_use, columns=False, moments=several, sigmoid=True)
        self.rows = Side(setting.queries, setting.query_norm, problem.anchor_tags, problem.query_valid, None, setting.inverse)
        self.row_sum, self.row_moment = torch.zeros_like(self.push), torch.zeros_like(self.push)
        self.key_moment = setting.zeros(len(setting.prefixes), setting.all_keys) if several else None
        self.d_queries = torch.zeros_like(setting.queries, dtype=setting.gradient_dtype) if needs.queries else None
        self.d_inverse, self.d_bias = torch.zeros_like(setting.inverse), setting.zeros()
        area = setting.budget // setting.engine.pair_bytes(self.rule, False, setting.queries.dtype)
        self.tile_rows = max(FEWEST_ROWS, min(len(setting.queries), isqrt(area)))
        self.tile_columns = max(64, area // self.tile_rows)

    def add(self, shard: Shard) -> None:
        """All rows against a shard of keys."""
        problem, norms = self.setting.problem, inverse_norms(shard.vectors, self.setting.prefixes, self.setting.fp)
        for part in cut(0, len(shard.vectors), self.tile_columns):
            here = slice(shard.start + part.start, shard.start + part.stop)
            columns = Side(
                vectors=shard.vectors[part],
                inverse_norm=norms[:, part],
                tags=problem.all_keys.tags[here],
                valid=problem.all_keys.valid[here],
                limit=None,
                inverse_temperature=norms.new_ones(part.stop - part.start),
                correction=(-self.bias).expand(part.stop - part.start).contiguous(),
            )
            for rows in cut(0, len(self.rows.vectors), self.tile_rows):
                self._tile(rows, columns, here, None if shard.gradient is None else shard.gradient[part])

    def _tile(self, rows: slice, columns: Side, here: slice, d_columns: Tensor | None) -> None:
        side = some(self.rows, rows)
        tile = self.setting.engine.tile(side, columns, self.rule, keep=False)
        if not self.gradients:
            self.row_sum[:, rows] += tile.statistics().row_sum
            return
        push = self.push[:, rows].contiguous()
        found = tile.gradient(Coefficients(push, push))
        assert found.row_sum is not None and found.row_total is not None
        self.row_sum[:, rows] += found.row_sum
        self.d_inverse[rows] += found.row_temperature.sum(0) / side.inverse_temperature
        self.d_bias += found.row_total.sum()
        if self.key_moment is not None:
            self.row_moment[:, rows] += found.row_moment
            self.key_moment[:, here] += found.column_moment
        first = 0
        for end, weight in zip(self.setting.prefixes, found.weights, strict=True):
            if self.d_queries is not None:
                add_product(self.d_queries[rows, first:end], weight, columns.vectors[:, first:end])
            if d_columns is not None:
                add_product(d_columns[:, first:end], weight.T, side.vectors[:, first:end])
            first = end

    def _pairs(self) -> list[slice]:
        """Rows whose positives are looked at together."""
        return cut(0, len(self.rows.vectors), self.setting.rows_at_once)

    def positives(self) -> tuple[Tensor, Tensor]:
        """Loss of each prefix [P], and the positives' cosines [N] of the longest; their part of the gradients of numbers."""
        setting, index = self.setting, self.setting.problem.positive
        positive = setting.query_norm * self.key_norm[:, index]
        for rows in self._pairs():
            positive[:, rows] *= prefix_dots(setting.queries[rows], setting.keys[index[rows]], setting.prefixes, setting.fp)
        score = positive * setting.inverse + self.bias
        losses = (setting.problem.row_weight * (softplus(-score) + self.row_sum)).sum(1)
        pull = self.push * torch.sigmoid(-score)
        self.d_bias -= pull.sum()
        self.d_inverse -= (pull * positive).sum(0)
        self.pull = pull * setting.inverse
        self.pull_moment = self.pull * positive
        return setting.peers.sum(losses), setting.rows_of_all_peers(positive[-1])

    def finish(self) -> tuple[Tensor | None, ...]:
        """Gradients of queries [N, D], keys [M, D], inverse temperatures [N] and bias, all peers' shares together."""
        setting, index = self.setting, self.setting.problem.positive
        d_keys = self.stream.finish() if setting.needs.keys else None
        pull = self.pull * setting.query_norm * self.key_norm[:, index]
        for rows in self._pairs():
            first = 0
            for s, end in enumerate(setting.prefixes):
                weight = -pull[s:, rows].sum(0)
                if self.d_queries is not None:
                    self.d_queries[rows, first:end] += weight[:, None] * setting.keys[index[rows], first:end]
                if d_keys is not None:
                    add_scaled_rows(d_keys[:, first:end], index[rows], setting.queries[rows, first:end], weight)
                first = end
        if self.key_moment is not None:
            setting.norms_gradient_(self.d_queries, setting.queries, self.row_moment - self.pull_moment)
            moment = setting.home(self.key_moment, setting.problem.key_sizes) if setting.needs.keys else None
            if moment is not None:
                moment.index_put_((torch.arange(len(moment), device=index.device)[:, None], index), -self.pull_moment, accumulate=True)
                setting.norms_gradient_(d_keys, setting.keys, moment)
        queries, keys, _ = setting.given_gradients_(self.d_queries, d_keys, None)
        return queries, keys, setting.rows_of_all_peers(self.d_inverse), setting.peers.sum(self.d_bias)
