"""The pairs of a row and its positive: their cosines, their losses, and what they do to gradients.

A positive never enters a tile: loss = softplus(log_negatives - logit), and its pull has the
coefficient sigmoid(log_negatives - logit), which stays exact where 1 - p would cancel. A row pays
the mean over its positives. With key negatives each pair has a denominator of its own: the row's
negatives, and the keys scored against its positive.

Positives by index are this rank's keys: they are scored before anything travels. Those by id may be
any rank's: their pairs are looked at while the keys' shards are in memory, in a round of their own
before the statistics and in that of gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sailplan_kernels.exchange.base import Shard
from sailplan_kernels.infonce.blocks import QueryBlock
from sailplan_kernels.infonce.forward_context import ForwardContext, comparable, cut, finite
from sailplan_kernels.infonce.masks import Candidates, limits
from sailplan_kernels.infonce.pairs import PairList, RowPairs, pairs_by_id, sum_at
from sailplan_kernels.tiling.normalize import inverse_norms
from sailplan_kernels.tiling.products import (
    add_scaled_rows,
    of_dimensions,
    prefix_dots,
    row_dots,
    segments,
    softplus,
)
from sailplan_kernels.tiling.tile import Coefficients, TileOperand


class Positives:
    """E pairs of this rank's share of n rows, P prefixes."""

    pairs: RowPairs | PairList
    cosine: Tensor  # [P, E]
    norm: Tensor  # [P, E] product of both inverse norms
    logits: Tensor  # [P, E]
    weight: Tensor  # [E] of the row loss
    queries: QueryBlock
    anchors: QueryBlock | None = None  # the positives themselves, with key negatives
    column_positive_grad: Tensor | None = None  # [P, E] the column loss's

    def __init__(self, context: ForwardContext) -> None:
        self.context = context
        self.inverse = context.inverse_of_rows()
        self.losses: list[Tensor] = []  # [P] of each chunk of rows
        self.pushes: list[Tensor] = []  # [P, e] d loss / d the pair's log_negatives
        self.query_coefficients: list[Coefficients] = []
        inputs = context.inputs
        if (
            inputs.wanted is None
            # All of this rank's pairs: the columns' owner knows them whole, whatever its peers'
            # shares
        ):
            pairs = RowPairs(
                None if inputs.diagonal else inputs.positive, 0, len(inputs.raw_queries)
            )
            self.whole_cosine, self.whole_norm = self._score_own(pairs)
            self.pairs = RowPairs(
                None if inputs.diagonal else inputs.positive[context.share],
                context.share.start if inputs.diagonal else 0,
                context.rows,
            )
            self.cosine, self.norm = (
                self.whole_cosine[:, context.share],
                self.whole_norm[:, context.share],
            )
            self._anchor()

    def _score_own(self, pairs: RowPairs) -> tuple[Tensor, Tensor]:
        """Cosines and products of norms [P, N] of the pairs by index."""
        context, keys = self.context, self.context.keys
        of_keys = (
            keys.norms[:, : pairs.count] if pairs.index is None else keys.norms[:, pairs.index]
        )
        norm = context.queries.norms * of_keys
        dots = [
            prefix_dots(
                context.queries.operand[here],
                pairs.own_keys(keys.operand, here),
                context.prefixes,
                context.fp,
            )
            for here in cut(0, pairs.count, context.rows_at_once) or [slice(0, 0)]
        ]
        return (dots[0] if len(dots) == 1 else torch.cat(dots, 1)).mul_(norm), norm

    def find_by_id(self, keys: Candidates) -> None:
        """List the pairs, now that all ranks' keys are known, and score them in a round over the
        shards.
        """
        context, inputs = self.context, self.context.inputs
        assert inputs.wanted is not None
        whole = pairs_by_id(inputs.wanted, keys)
        self.row_valid = whole.counts > 0
        self.pairs = pairs = whole.share(context.share)
        queries, norms = (
            context.queries.operand[context.share],
            context.queries.norms[:, context.share],
        )
        self.cosine = context.zeros(len(context.prefixes), pairs.count)
        self.norm = torch.empty_like(self.cosine)
        vectors = (
            queries.new_empty(pairs.count, queries.shape[1])
            if context.options.key_negatives
            else None
        )
        for shard in context.keys.shards(at_once=True):
            for here in self._inside(shard, slice(0, pairs.count)):
                rows, found = pairs.rows[here], shard.vectors[pairs.keys[here] - shard.start]
                self.norm[:, here] = norms[:, rows] * inverse_norms(
                    found, context.prefixes, context.fp
                )
                self.cosine[:, here] = prefix_dots(
                    queries[rows], found, context.prefixes, context.fp
                )
                if vectors is not None:
                    vectors[here] = found
        self.cosine.mul_(self.norm)
        self._anchor(vectors)

    def _anchor(self, vectors: Tensor | None = None) -> None:
        """The queries, whose margins start from their best positives, and with key negatives the
        positives, [E, D] one a pair.
        """
        context, inputs, options, needs = (
            self.context,
            self.context.inputs,
            self.context.options,
            self.context.needs,
        )
        highest = inputs.max_cosine
        best = self.pairs.best(self.cosine)
        side = TileOperand(
            vectors=context.queries.operand[context.share],
            inverse_norm=context.queries.norms[:, context.share].contiguous(),
            tags=inputs.anchor_tags[context.share],
            valid=inputs.query_valid[context.share],
            max_cosine=limits(
                finite(best) if self.pairs.listed else best,
                highest[context.share] if isinstance(highest, Tensor) else highest,
                options,
            ),
            inverse_temperature=self.inverse,
        )
        # Without prefixes and columns the temperature's sum is <query, its gradient>: no work
        # inside the tile.
        own = (
            needs.queries
            and context.queries.uses == 1
            and not options.query_negatives
            and (context.one_temperature or not options.symmetric)
        )
        moments = len(context.prefixes) > 1 or (needs.temperature and not own)
        self.queries = QueryBlock(
            side, False, moments, context.queries.gradient[context.share] if needs.queries else None
        )
        if options.key_negatives:
            if vectors is None:
                assert isinstance(self.pairs, RowPairs)
                vectors = self.pairs.own_keys(
                    context.keys.operand, slice(0, self.pairs.count)
                ).contiguous()
            of_pairs = TileOperand(
                vectors=vectors,
                inverse_norm=inverse_norms(vectors, context.prefixes, context.fp),
                tags=side.tags[self.pairs.rows] if isinstance(self.pairs, PairList) else side.tags,
                valid=self.pairs.of_rows(side.valid),
                max_cosine=None
                if side.max_cosine is None
                else self.pairs.of_rows(side.max_cosine).contiguous(),
                inverse_temperature=self.pairs.of_rows(side.inverse_temperature),
            )
            # Where nobody needs the keys' gradient there is no sum to read the temperature's from.
            gradient = (
                torch.zeros_like(vectors, dtype=context.gradient_dtype) if needs.keys else None
            )
            self.anchors = QueryBlock(
                of_pairs, True, moments or (needs.temperature and not needs.keys), gradient
            )

    def weigh(self, valid_rows: Tensor) -> None:
        """``valid_rows`` 0-d of all ranks: what a row's loss weighs is known."""
        context, inputs = self.context, self.context.inputs
        part = (
            context.exchange.world_size / 2
            if context.options.symmetric
            else context.exchange.world_size
        )
        self.counted = valid_rows.clamp_min(1).to(context.fp)  # 0-d
        self.of_row = part / self.counted  # 0-d
        if isinstance(self.pairs, PairList):
            self.weight = (self.of_row / self.pairs.counts.clamp_min(1))[self.pairs.rows]
            self.row_valid_here = self.pairs.counts > 0
        else:
            self.row_valid_here = inputs.row_valid[context.share]
            self.weight = self.row_valid_here * self.of_row
        self.weighted = self.weight * context.prefix_weights  # [P, E]
        self.logits = self.cosine * self.pairs.of_rows(self.inverse)

    def correct_by(self, correction: Tensor | None) -> None:
        """``correction`` [C] is subtracted from the keys' logits."""
        if correction is not None:
            assert self.context.keys.layout is not None
            if isinstance(self.pairs, PairList):
                self.logits -= correction[self.pairs.keys]
            else:
                own = correction[self.context.keys.layout.start :]
                start = self.pairs.start
                self.logits -= (
                    own[start : start + self.pairs.count]
                    if self.pairs.index is None
                    else own[self.pairs.index]
                )

    def mean_cosine(self) -> Tensor:
        """[n] of each row's positives, longest prefix; 0 where the row does not count."""
        if isinstance(self.pairs, PairList):
            return self.pairs.per_row(self.cosine[-1:])[0] / self.pairs.counts.clamp_min(1)
        return self.cosine[-1] * self.row_valid_here

    def correct(self, hard_top: Tensor | None) -> Tensor:
        """bool [n], whether a positive of the row beats all negatives; longest prefix.

        ``hard_top`` [P, n]: of its own hard ones.
        """
        tops = [x[-1:] for x in (self.queries.top, hard_top) if x is not None]
        if self.anchors is not None and self.anchors.top is not None:
            tops.append(self.pairs.best(self.anchors.top[-1:]))
        best, found = self.pairs.best(self.logits[-1:])[0], self.row_valid_here
        for top in tops:
            found = found & (best > top[0])
        return found

    def _inside(self, shard: Shard, pairs: slice) -> Iterator[Tensor]:
        """Places in the list of those pairs whose key is in this shard, some at a time."""
        assert isinstance(self.pairs, PairList) and self.context.keys.layout is not None
        keys, at_once = self.pairs.keys[pairs], self.context.rows_at_once
        if len(shard.vectors) == self.context.keys.layout.total:  # all: nothing to wait for
            places = torch.arange(len(keys), device=keys.device) + pairs.start
            yield from places.split(at_once)
            return
        here = (keys >= shard.start) & (keys < shard.start + len(shard.vectors))
        yield from (here.nonzero()[:, 0] + pairs.start).split(at_once)

    # ---------------------------------------------------------------- denominators, once they are
    # complete
    def complete(self, rows: slice, pairs: slice) -> None:
        """All negatives of these rows are in: their losses, and what the tiles need for their
        gradient.
        """
        queries, anchors = self.queries, self.anchors
        of_query = queries.log_negatives(rows)
        log = (
            self.pairs.of_rows(of_query)
            if isinstance(self.pairs, RowPairs)
            else of_query[:, self.pairs.rows[pairs] - rows.start]
        )
        if anchors is not None:
            log = torch.logaddexp(log, anchors.log_negatives(pairs))
        fp = self.context.fp
        gap = (log - self.logits[:, pairs]).to(fp)
        self.losses.append((softplus(gap) * self.weight[pairs]).sum(1))
        negative_grad = gap.sigmoid_().mul_(self.weighted[:, pairs])
        self.pushes.append(negative_grad)
        if anchors is None and isinstance(self.pairs, RowPairs):
            self.query_coefficients.append(Coefficients(finite(log).to(fp), negative_grad))
            return
        part = (
            of_query
            if isinstance(self.pairs, RowPairs)
            else of_query[:, self.pairs.rows[pairs] - rows.start]
        )
        own = (
            negative_grad
            if anchors is None
            else negative_grad * (comparable(part) - comparable(log)).exp().to(fp)
        )  # of this part of the denominator
        self.query_coefficients.append(
            Coefficients(finite(of_query).to(fp), self.pairs.sums(rows, pairs, own))
        )

    @property
    def negative_grad(self) -> Tensor:
        """[P, E] of all rows."""
        if len(self.pushes) > 1:
            self.pushes = [torch.cat(self.pushes, 1)]
        return self.pushes[0]

    def anchor_coefficients(self, pairs: slice) -> Coefficients:
        """Of the positives as anchors; their rows are complete."""
        assert self.anchors is not None
        own, negative_grad = self.anchors.log_negatives(pairs), self.negative_grad[:, pairs]
        rows = self.queries.log_negatives(slice(0, self.context.rows))
        of_rows = (
            rows[:, pairs] if isinstance(self.pairs, RowPairs) else rows[:, self.pairs.rows[pairs]]
        )
        share = (comparable(own) - comparable(torch.logaddexp(of_rows, own))).exp()
        return Coefficients(
            finite(own).to(self.context.fp), negative_grad * share.to(self.context.fp)
        )

    # ---------------------------------------------------------------- gradients
    def positive_grad(self) -> Tensor:
        """[P, E] minus d loss / d the pair's cosine."""
        positive_grad = self.negative_grad * self.pairs.of_rows(self.inverse)
        return (
            positive_grad
            if self.column_positive_grad is None
            else positive_grad.add_(self.column_positive_grad)
        )

    def add_own_gradient(self) -> None:
        """What rows and their positives, keys of this rank, do to each other's vectors."""
        context, pairs = self.context, self.pairs
        if isinstance(pairs, PairList) or not (
            self.queries.gradient is not None or context.needs.keys
        ):
            return
        all_weights = self._segments(self._pull * self.norm)
        keys, queries = context.keys, self.queries
        for here in cut(0, pairs.count, context.rows_at_once):
            weights = of_dimensions(all_weights[:, here], context.prefixes)
            if queries.gradient is not None:
                queries.gradient[here].addcmul_(pairs.own_keys(keys.operand, here), weights)
            if context.needs.keys and pairs.index is None:
                keys.gradient[pairs.start + here.start : pairs.start + here.stop].addcmul_(
                    queries.side.vectors[here], weights
                )
            elif context.needs.keys and pairs.index is not None:
                keys.gradient.index_put_(
                    (pairs.index[here],), weights * queries.side.vectors[here], accumulate=True
                )

    def _segments(self, weight: Tensor) -> Tensor:
        """Minus the [P, E] weights of each prefix's own dimensions, from those of the prefixes;
        in the gradients' dtype.
        """
        return segments(weight).neg_().to(self.context.gradient_dtype)

    def add_gradient(self, shard: Shard, pairs: slice) -> None:
        """As ``add_own_gradient``, of pairs by id whose key is in this shard."""
        context = self.context
        assert isinstance(self.pairs, PairList)
        for here in self._inside(shard, pairs):
            rows, keys, first = self.pairs.rows[here], self.pairs.keys[here] - shard.start, 0
            for weight, end in zip(
                self._segments(self._pull[:, here] * self.norm[:, here]),
                context.prefixes,
                strict=True,
            ):
                if self.queries.gradient is not None:
                    add_scaled_rows(
                        self.queries.gradient[:, first:end],
                        rows,
                        shard.vectors[keys, first:end],
                        weight,
                    )
                if shard.gradient is not None:
                    add_scaled_rows(
                        shard.gradient[:, first:end],
                        keys,
                        self.queries.side.vectors[rows, first:end],
                        weight,
                    )
                first = end

    def make_positive_grad(self) -> None:
        """Once all denominators, and those of the columns, are complete."""
        self._pull = self.positive_grad()

    def anchors_home(self) -> None:
        """The positives' gradient as anchors, to the keys that they are, of this rank by index
        and of whatever rank by id.
        """
        context, pairs = self.context, self.pairs
        if self.anchors is None or self.anchors.gradient is None:
            return
        gradient = self.anchors.gradient
        if isinstance(pairs, RowPairs):
            if pairs.index is None:
                context.keys.gradient[pairs.start : pairs.start + pairs.count] += gradient
            else:
                for here in cut(0, pairs.count, context.rows_at_once):
                    context.keys.gradient.index_put_(
                        (pairs.index[here],), gradient[here], accumulate=True
                    )
            return
        again = context.keys.shards(accumulate=True) if context.exchange.materializes_all else None
        if again is None:
            assert context.keys.layout is not None
            stream = context.exchange.stream(
                context.keys.operand, context.keys.layout.sizes, context.gradient_dtype
            )
            again = stream.shards(accumulate=True)
        for shard in again:
            for places in self._inside(shard, slice(0, pairs.count)):
                assert shard.gradient is not None
                shard.gradient.index_put_(
                    (pairs.keys[places] - shard.start,), gradient[places], accumulate=True
                )
        if not context.exchange.materializes_all:
            context.keys.gradient.add_(stream.finish())

    def add_temperature(self) -> None:
        """To the queries' anchors, where rows have temperatures of their own: all that their
        tiles did not say about them.
        """
        queries, anchors, pairs, at_once = (
            self.queries,
            self.anchors,
            self.pairs,
            self.context.rows_at_once,
        )
        assert queries.temperature is not None
        if anchors is not None:
            of_pairs = anchors.temperature
            if not anchors.moments and anchors.gradient is not None:
                of_pairs = (
                    row_dots(anchors.side.vectors, anchors.gradient, at_once)
                    / anchors.side.inverse_temperature
                )
            if of_pairs is not None:
                queries.temperature += pairs.per_row(of_pairs[None])[0]
        read = not queries.moments and queries.gradient is not None
        if read and queries.gradient is not None:
            queries.temperature += (
                row_dots(queries.side.vectors, queries.gradient, at_once) / self.inverse
            )
        if not (
            read and pairs.listed
        ):  # else the pairs have left their part in the gradient by now
            queries.temperature -= pairs.per_row(self.negative_grad * self.cosine).sum(0)

    def add_moments(self) -> None:
        """To those of the queries and of the keys."""
        context, moment = self.context, self._pull * self.cosine
        assert self.queries.moment is not None
        self.queries.moment -= self.pairs.per_row(moment)
        if self.anchors is not None and self.anchors.moment is not None:
            moment = moment - self.anchors.moment
        if not context.needs.keys or len(context.prefixes) == 1:
            return
        if isinstance(self.pairs, PairList):
            assert context.keys.layout is not None
            context.keys.add_moment(
                slice(0, context.keys.layout.total),
                -sum_at(self.pairs.keys, moment, context.keys.layout.total),
            )
        elif self.pairs.index is None:
            context.keys.moment[:, self.pairs.start : self.pairs.start + self.pairs.count].sub_(
                moment
            )
        else:
            context.keys.moment.sub_(sum_at(self.pairs.index, moment, context.keys.moment.shape[1]))
