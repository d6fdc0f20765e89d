"""The pairwise loss over tiles: every shard of keys comes past once, and every tile is gone
through once.

No row waits for a denominator, so a tile gives its part of the loss and of the gradient out of ONE
product of scores (6 NMD with the gradient's two), for all prefixes, under every exchange. What
happens inside a tile is an engine's (tiling/tile.py).
Vectors, norms, what ranks show each other and how gradients come home are those of infonce
(tiling/vectors.py): the positive never enters a tile, and a cosine is <x_p, y_p> a_p b_p with
inverse prefix norms a, b.

Several losses, such as those of a step's patterns, show each other all their vectors in one
collective and bring all gradients home in one. Collectives, all inside the forward, depend only on what all ranks agreed on in infonce/problem.py.
Differentiable once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sailplan_kernels.exchange.base import Shard
from sailplan_kernels.exchange.row_split import peers_of, shares
from sailplan_kernels.infonce.blocks import CandidateBlock, some
from sailplan_kernels.infonce.forward_context import (
    FEWEST_ROWS,
    cut,
    numbers,
    rows_at_once,
    score_budget,
)
from sailplan_kernels.infonce.loss_inputs import LossInputs
from sailplan_kernels.infonce.masks import Candidates
from sailplan_kernels.infonce.pairs import sum_at
from sailplan_kernels.tiling.products import add_product, add_scaled_rows, prefix_dots, softplus
from sailplan_kernels.tiling.tile import Coefficients, Engine, MaskConfig, TileOperand
from sailplan_kernels.tiling.vectors import Vectors, bring_home, prepare, send

Found = tuple[Tensor, Tensor, Tensor]


def tiled_losses(
    all_inputs: Sequence[LossInputs],
    engine: Engine,
    biases: Sequence[Tensor],
    weights: Sequence[float],
) -> tuple[Tensor, list[Found]]:
    """This rank's weighted sum (0-d) of the losses of one exchange; biases 0-d.

    Of each loss, detached: its prefixes' losses [P], the positives' cosines [N] of the longest
    prefix, and the valid rows of all ranks (0-d).
    """
    given: list[Tensor] = []
    for inputs, bias in zip(all_inputs, biases, strict=True):
        longest = inputs.options.prefixes[-1]
        given += [inputs.raw_queries[:, :longest], inputs.raw_keys[:, :longest]]
        given += [inputs.row_inverse_temperature, bias]
    total, *found = _Tiled.apply(all_inputs, engine, weights, *given)
    return total, [(found[i], found[i + 1], found[i + 2]) for i in range(0, len(found), 3)]


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, all_inputs, engine, weights, *given: Tensor):
        losses = []
        for i, (inputs, weight) in enumerate(zip(all_inputs, weights, strict=True)):
            queries, keys, inverse, bias = given[4 * i : 4 * i + 4]
            wanted = any(ctx.needs_input_grad[3 + 4 * i : 7 + 4 * i])
            losses.append(_Work(inputs, engine, weight, queries, keys, inverse, bias, wanted))
        exchange, shown = all_inputs[0].exchange, [one.keys for one in losses]
        budget = min(inputs.options.memory_budget for inputs in all_inputs)
        vectors = [v for one in losses for v in (one.queries, one.keys)]
        groups = prepare(vectors, budget, min(one.at_once for one in losses))
        told = [x for one in losses for x in one.notes()]
        notes = iter(send(exchange, shown, told).arrive())
        for one in losses:
            one.learn(next(notes), next(notes))
            for shard in one.keys.shards(accumulate=one.inputs.needs.keys):
                one.add(shard)
        found = [one.positives() for one in losses]
        total = torch.stack(
            [
                (paid * one.prefix_weights[:, 0]).sum()
                for one, (paid, _) in zip(losses, found, strict=True)
            ]
        ).sum()
        bring_home(exchange, shown, [])
        for one in losses:
            one.add_positives()
        for group in groups:
            group.finish(losses[0].peers)
        gradients = [x for one in losses for x in one.gradients_of_all()]
        ctx.gradients = [
            x if needed else None
            for x, needed in zip(gradients, ctx.needs_input_grad[3:], strict=True)
        ]
        ctx.dtypes = [x.dtype for x in given]
        outputs = [
            x for one, pair in zip(losses, found, strict=True) for x in (*pair, one.valid_rows)
        ]
        ctx.mark_non_differentiable(*outputs)
        return total, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "sigmoid: found a second backward of one call, expected one; call sigmoid again"
            )
        return (
            None,
            None,
            None,
            *(
                None if x is None else x.mul_(gradient).to(dtype)
                for x, dtype in zip(gradients, ctx.dtypes, strict=True)
            ),
        )


class _Work:
    """The working state of one loss's forward, of this rank's share of the n rows.

    weight: of the loss in the sum. ``gradients``: whether this rank wants any.
    """

    def __init__(
        self,
        inputs: LossInputs,
        engine: Engine,
        weight: float,
        queries: Tensor,
        keys: Tensor,
        inverse: Tensor,
        bias: Tensor,
        gradients: bool,
    ) -> None:
        self.inputs, self.engine, needs = inputs, engine, inputs.needs
        self.bias, self.inverse = bias.detach(), inverse.detach()
        self.exchange, self.peers, self.prefixes = (
            inputs.exchange,
            peers_of(inputs.exchange),
            inputs.options.prefixes,
        )
        self.share_sizes, self.share = shares(len(queries), self.peers)
        self.fp, self.at_once = inputs.score_dtype, rows_at_once(inputs)
        weights = tuple(weight * each for each in inputs.options.prefix_weights)
        self.prefix_weights = numbers(weights, self.fp, queries.device)[:, None]
        kinds = self.prefixes, self.fp, inputs.operand_dtype, inputs.gradient_dtype
        masks = (inputs.query_valid, inputs.key_valid)
        self.queries, self.keys = (
            Vectors(x, m if p else None, *kinds)
            for x, m, p in zip((queries, keys), masks, inputs.padding[:2], strict=True)
        )
        self.keys.show(self.exchange, inputs.key_sizes, needs.keys)
        # What others need is computed here too: their keys' gradient has a part in every rank's
        # tiles.
        self.gradients = gradients or needs.keys

    def notes(self) -> list[Tensor]:
        """What this rank tells the others of its rows, once vectors are prepared."""
        assert self.keys.layout is not None
        return [self.keys.layout.padded(self.inputs.key_notes), self.inputs.row_count]

    def learn(self, key_notes: Tensor, row_counts: Tensor) -> None:
        """Take what all ranks told."""
        inputs, needs = self.inputs, self.inputs.needs
        self.valid_rows = row_counts.sum()
        share = self.exchange.world_size / self.valid_rows.clamp_min(1).to(self.fp)
        self.weight = inputs.row_valid[self.share] * share  # [n]
        self.negative_grad = self.weight * self.prefix_weights  # [P, n] d loss / d a row's sum
        assert self.keys.layout is not None
        candidates = Candidates.of(self.keys.layout.rows(key_notes))
        count = len(candidates.valid)
        self.source = CandidateBlock(
            self.keys,
            candidates,
            self.inverse.new_ones(count),
            correction=(-self.bias).expand(count).contiguous(),
        )
        self.several = len(self.prefixes) > 1
        self.rule = MaskConfig(
            self.prefixes, inputs.tags_in_use, columns=False, moments=self.several, sigmoid=True
        )
        self.inverse = self.inverse[self.share].contiguous()
        self.rows = TileOperand(
            self.queries.operand[self.share],
            self.queries.norms[:, self.share].contiguous(),
            inputs.anchor_tags[self.share],
            inputs.query_valid[self.share],
            None,
            self.inverse,
        )
        self.row_sum = torch.zeros_like(self.negative_grad)
        self.d_queries = self.queries.gradient[self.share] if needs.queries else None
        self.d_inverse, self.d_bias = (
            torch.zeros_like(self.inverse),
            torch.zeros_like(self.negative_grad[0, :0].sum()),
        )
        area = score_budget(inputs) // self.engine.pair_bytes(
            self.rule, False, self.queries.operand.dtype
        )
        self.tile_rows = max(FEWEST_ROWS, min(len(self.inverse), isqrt(area)))
        self.tile_columns = max(64, area // self.tile_rows)

    def add(self, shard: Shard) -> None:
        """All rows against a shard of keys."""
        for part in cut(0, len(shard.vectors), self.tile_columns):
            columns = self.source.columns(shard, part)
            here = slice(shard.start + part.start, shard.start + part.stop)
            for rows in cut(0, len(self.inverse), self.tile_rows):
                self._tile(
                    rows, columns, here, None if shard.gradient is None else shard.gradient[part]
                )

    def _tile(
        self, rows: slice, columns: TileOperand, here: slice, d_columns: Tensor | None
    ) -> None:
        side = some(self.rows, rows)
        tile = self.engine.tile(side, columns, self.rule, cached=False)
        if not self.gradients:
            self.row_sum[:, rows] += tile.statistics().row_sum
            return
        negative_grad = self.negative_grad[:, rows].contiguous()
        found = tile.gradient(Coefficients(negative_grad, negative_grad))
        assert found.row_sum is not None and found.row_total is not None
        self.row_sum[:, rows] += found.row_sum
        self.d_inverse[rows] += found.row_temperature.sum(0) / side.inverse_temperature
        self.d_bias += found.row_total.sum()
        if self.several:
            if self.d_queries is not None:
                self.queries.moment[:, self.share][:, rows] += found.row_moment
            if self.inputs.needs.keys:
                self.keys.add_moment(here, found.column_moment)
        first = 0
        for end, weight in zip(self.prefixes, found.weights, strict=True):
            if self.d_queries is not None:
                add_product(self.d_queries[rows, first:end], weight, columns.vectors[:, first:end])
            if d_columns is not None:
                add_product(d_columns[:, first:end], weight.T, side.vectors[:, first:end])
            first = end

    def _pairs(self) -> list[slice]:
        """Rows whose positives are looked at together."""
        return cut(0, len(self.inverse), self.at_once)

    def positives(self) -> tuple[Tensor, Tensor]:
        """Loss of each prefix [P], and the positives' cosines [N] of the longest, 0 where a row
        does not count; their part of the
        gradients of numbers."""
        self.index = index = self.inputs.positive[self.share]
        self.norm = self.rows.inverse_norm * self.keys.norms[:, index]
        positive = self.norm.clone()
        for rows in self._pairs():
            positive[:, rows] *= prefix_dots(
                self.rows.vectors[rows], self.keys.operand[index[rows]], self.prefixes, self.fp
            )
        score = positive * self.inverse + self.bias
        losses = (self.weight * (softplus(-score) + self.row_sum)).sum(1)
        positive_grad = self.negative_grad * torch.sigmoid(-score)
        self.d_bias -= positive_grad.sum()
        self.d_inverse -= (positive_grad * positive).sum(0)
        self.positive_grad = positive_grad * self.inverse
        self.positive_moment = self.positive_grad * positive
        found = positive[-1].masked_fill(~self.inputs.row_valid[self.share], 0.0)
        return self.peers.sum(losses), self.peers.gather(found, self.share_sizes)

    def add_positives(self) -> None:
        """Add the positives' part of the vectors' gradients, once the keys' have come home."""
        needs, index = self.inputs.needs, self.index
        positive_grad = self.positive_grad * self.norm
        for rows in self._pairs():
            first = 0
            for s, end in enumerate(self.prefixes):
                weight = -positive_grad[s:, rows].sum(0)
                if self.d_queries is not None:
                    self.d_queries[rows, first:end] += (
                        weight[:, None] * self.keys.operand[index[rows], first:end]
                    )
                if needs.keys:
                    add_scaled_rows(
                        self.keys.gradient[:, first:end],
                        index[rows],
                        self.rows.vectors[rows, first:end],
                        weight,
                    )
                first = end
        if self.several:
            if self.d_queries is not None:
                self.queries.moment[:, self.share] -= self.positive_moment
            if needs.keys:
                self.keys.moment.sub_(
                    sum_at(index, self.positive_moment, self.keys.moment.shape[1])
                )

    def gradients_of_all(self) -> tuple[Tensor | None, ...]:
        """Gradients of queries [N, D], keys [M, D], inverse temperatures [N] and bias, all
        peers' shares together.
        """
        needs = self.inputs.needs
        queries, keys = (
            v.gradient if needed else None
            for v, needed in ((self.queries, needs.queries), (self.keys, needs.keys))
        )
        return (
            queries,
            keys,
            self.peers.gather(self.d_inverse, self.share_sizes),
            self.peers.sum(self.d_bias),
        )
