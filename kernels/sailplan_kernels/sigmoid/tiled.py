"""The pairwise loss over tiles: every shard of keys comes past once, and every tile is gone through once.

No row waits for a denominator, so a tile gives its part of the loss and of the gradient out of ONE product of scores (6 NMD
with the gradient's two), for all prefixes, under every exchange. What happens inside a tile is an engine's (infonce/tile.py).
Rows, normalisation and tensor-parallel peers are treated as in infonce/fused.py: the positive never enters a tile, and a
cosine is <x_p, y_p> a_p b_p with inverse prefix norms a, b.

Collectives, all inside the forward, depend only on what all ranks agreed on in infonce/problem.py. Differentiable once.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sailplan_kernels.exchange.base import Shard
from sailplan_kernels.exchange.row_split import peers_of, shares
from sailplan_kernels.infonce.normalize import inverse_norms
from sailplan_kernels.infonce.problem import Problem
from sailplan_kernels.infonce.products import add_product, prefix_dots, softplus
from sailplan_kernels.infonce.tile import Coefficients, Engine, Rule, Side

PAIRS_AT_ONCE = 1024  # rows whose positives are looked at together


def tiled_loss(problem: Problem, engine: Engine, queries: Tensor, keys: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's weighted loss (0-d), loss of each prefix [P], and the positives' cosines [N] of the longest.

    queries [N, D], keys [M, D] of length one, D the longest prefix; bias 0-d.
    """
    return _Tiled.apply(problem, engine, queries, keys, problem.inverse_temperature, bias)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem: Problem, engine: Engine, queries: Tensor, keys: Tensor, inverse_temperature: Tensor, bias: Tensor):
        work = _Work(problem, engine, queries, keys, inverse_temperature, bias, any(ctx.needs_input_grad))
        for shard in work.stream.shards(accumulate=problem.needs.keys):
            work.add(shard)
        losses, positive = work.positives()
        ctx.gradients = [x if needed else None for x, needed in zip(work.finish(), ctx.needs_input_grad[2:], strict=True)]
        ctx.mark_non_differentiable(losses, positive)
        return (losses * work.prefix_weights).sum(), losses, positive

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_):
        return None, None, *(None if x is None else x * gradient for x in ctx.gradients)


class _Work:
    """The working state of one forward, of this rank's share of the n rows. ``gradients``: whether this rank wants any."""

    def __init__(self, problem, engine, queries, keys, inverse_temperature, bias, gradients):
        self.peers = peers_of(problem.exchange)
        self.share_sizes, share = shares(len(queries), self.peers)
        self.problem, self.engine, self.exchange = problem.share(share), engine, problem.exchange
        self.needs, self.prefixes, self.fp = problem.needs, problem.options.prefixes, queries.dtype
        self.queries, self.keys = (x.detach().to(problem.operand_dtype).contiguous() for x in (queries[share], keys))
        self.stream = self.exchange.stream(self.keys, problem.key_sizes, self.fp)
        self.inverse, self.bias = inverse_temperature.detach()[share].contiguous(), bias.detach()
        self.query_norm, self.key_norm = (inverse_norms(x, self.prefixes, self.fp) for x in (self.queries, self.keys))
        self.prefix_weights = queries.new_tensor(problem.options.prefix_weights)
        self.push = self.problem.row_weight * self.prefix_weights[:, None]  # [P, n] d loss / d a row's sum
        # What others need is computed here too: their keys' gradient has a part in every rank's tiles.
        self.gradients = gradients or self.needs.keys
        several = len(self.prefixes) > 1
        self.rule = Rule(self.prefixes, problem.tags_in_use, columns=False, moments=several, sigmoid=True)
        self.row_sum, self.row_moment = torch.zeros_like(self.push), torch.zeros_like(self.push)
        self.key_moment = self.push.new_zeros(len(self.prefixes), sum(problem.key_sizes)) if several else None
        self.d_queries = torch.zeros_like(self.queries, dtype=self.fp) if self.needs.queries else None
        self.d_inverse, self.d_bias = torch.zeros_like(self.inverse), self.push.new_zeros(())
        area = int(problem.options.memory_budget * 32 / torch.finfo(self.fp).bits // engine.pair_bytes(self.rule, False))
        self.tile_rows = max(16, min(len(self.queries), isqrt(area)))
        self.tile_columns = max(64, area // self.tile_rows)

    def add(self, shard: Shard) -> None:
        """All rows against a shard of keys."""
        norms = inverse_norms(shard.vectors, self.prefixes, self.fp)
        for first in range(0, len(shard.vectors), self.tile_columns):
            part = slice(first, min(first + self.tile_columns, len(shard.vectors)))
            here = slice(shard.start + part.start, shard.start + part.stop)
            columns = Side(
                vectors=shard.vectors[part],
                inverse_norm=norms[:, part],
                tags=self.problem.all_keys.tags[here],
                valid=self.problem.all_keys.valid[here],
                limit=None,
                inverse_temperature=norms.new_ones(part.stop - part.start),
                correction=(-self.bias).expand(part.stop - part.start).contiguous(),
            )
            for start in range(0, len(self.queries), self.tile_rows):
                rows = slice(start, min(start + self.tile_rows, len(self.queries)))
                self._tile(rows, columns, here, None if shard.gradient is None else shard.gradient[part])

    def _tile(self, rows: slice, columns: Side, here: slice, d_columns: Tensor | None) -> None:
        side = Side(
            vectors=self.queries[rows],
            inverse_norm=self.query_norm[:, rows],
            tags=self.problem.anchor_tags[rows],
            valid=self.problem.query_valid[rows],
            limit=None,
            inverse_temperature=self.inverse[rows],
        )
        tile = self.engine.tile(side, columns, self.rule, keep=False)
        if not self.gradients:
            self.row_sum[:, rows] += tile.statistics().row_sum
            return
        push = self.push[:, rows].contiguous()
        found = tile.gradient(Coefficients(push, push))
        assert found.row_sum is not None and found.row_total is not None
        self.row_sum[:, rows] += found.row_sum
        self.d_inverse[rows] += found.row_temperature.sum(0) / self.inverse[rows]
        self.d_bias += found.row_total.sum()
        if self.key_moment is not None:
            self.row_moment[:, rows] += found.row_moment
            self.key_moment[:, here] += found.column_moment
        first = 0
        for end, weight in zip(self.prefixes, found.weights, strict=True):
            if self.d_queries is not None:
                add_product(self.d_queries[rows, first:end], weight, columns.vectors[:, first:end])
            if d_columns is not None:
                add_product(d_columns[:, first:end], weight.T, side.vectors[:, first:end])
            first = end

    def positives(self) -> tuple[Tensor, Tensor]:
        """Loss of each prefix [P], and the positives' cosines [N] of the longest; their part of the gradients of numbers."""
        index = self.problem.positive
        positive = torch.empty_like(self.push)
        for rows in torch.arange(len(self.queries), device=index.device).split(PAIRS_AT_ONCE):
            positive[:, rows] = prefix_dots(self.queries[rows], self.keys[index[rows]], self.prefixes, self.fp)
        positive *= self.query_norm * self.key_norm[:, index]
        score = positive * self.inverse + self.bias
        losses = (self.problem.row_weight * (softplus(-score) + self.row_sum)).sum(1)
        pull = self.push * torch.sigmoid(-score)
        self.d_bias -= pull.sum()
        self.d_inverse -= (pull * positive).sum(0)
        self.pull = pull * self.inverse
        self.pull_moment = self.pull * positive
        return self.peers.sum(losses), self.peers.gather(positive[-1].contiguous(), self.share_sizes)

    def finish(self) -> tuple[Tensor | None, ...]:
        """Gradients of queries [N, D], keys [M, D], inverse temperatures [N] and bias, all peers' shares together."""
        problem, index = self.problem, self.problem.positive
        d_keys = self.stream.finish() if self.needs.keys else None
        pull = self.pull * self.query_norm * self.key_norm[:, index]
        first = 0
        for s, end in enumerate(self.prefixes):
            for rows in torch.arange(len(self.queries), device=index.device).split(PAIRS_AT_ONCE):
                weight = -pull[s:, rows].sum(0)[:, None]
                if self.d_queries is not None:
                    self.d_queries[rows, first:end] += weight * self.keys[index[rows], first:end].to(self.fp)
                if d_keys is not None:
                    d_keys[:, first:end].index_put_((index[rows],), weight * self.queries[rows, first:end].to(self.fp), accumulate=True)
            first = end
        if self.key_moment is not None:
            if self.d_queries is not None:
                self._norms_gradient(self.queries, self.query_norm, self.row_moment - self.pull_moment, self.d_queries)
            if d_keys is not None:
                moment = self.exchange.reduce_scatter(self.key_moment.T.contiguous(), problem.key_sizes)
                moment = moment.index_put((index,), -self.pull_moment.T, accumulate=True)
                self._norms_gradient(self.keys, self.key_norm, moment.T, d_keys)
        of_rows = [None if x is None else self.peers.gather(x, self.share_sizes) for x in (self.d_queries, self.d_inverse)]
        return of_rows[0], None if d_keys is None else self.peers.sum(d_keys), of_rows[1], self.peers.sum(self.d_bias)

    def _norms_gradient(self, x: Tensor, norm: Tensor, moment: Tensor, target: Tensor) -> None:
        """Minus x_p * inverse_norm^2 * moment, of all prefixes but the longest, each on its own dimensions."""
        share, first = (norm.square() * moment)[:-1], 0
        for s, end in enumerate(self.prefixes[:-1]):
            target[:, first:end] -= x[:, first:end].to(self.fp) * share[s:].sum(0)[:, None]
            first = end
