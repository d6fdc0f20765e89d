"""The column loss of ``symmetric``: every pair again, with its key as the anchor and all ranks'
queries as candidates.

Columns are complete when all ranks' rows are in. Every rank then knows all columns, [P, C] over all
ranks' keys C, as their gradient needs it. Of pairs by index, ranks have told each other all that is
known before the statistics (key, cosine, temperature, limit) beside the keys, so the columns' sums
of exponentials are the only thing left to add up: in float64 relative to nothing, which holds every
logit down to temperatures of 0.0015. Of pairs by id nobody knows others' cosines: more is reduced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sailplan_kernels.infonce.blocks import CandidateBlock, log_of_sums, merge
from sailplan_kernels.infonce.forward_context import ForwardContext, finite
from sailplan_kernels.infonce.masks import limits
from sailplan_kernels.infonce.pairs import PairList, best_at, sum_at
from sailplan_kernels.infonce.positives import Positives
from sailplan_kernels.tiling.products import softplus
from sailplan_kernels.tiling.tile import Gradient, Statistics
from sailplan_kernels.tiling.vectors import Layout


class SymmetricTerm:
    """What this rank and, after the exchange, all ranks know of the columns."""

    def __init__(self, context: ForwardContext, positives: Positives) -> None:
        self.context, self.positives = context, positives
        self.top: Tensor | None = None
        self.total: Tensor | None = None
        self.temperature: Tensor | None = None  # [P, C], where rows have temperatures of their own
        inputs = context.inputs
        self.by_id = inputs.wanted is not None
        self.rows_layout = Layout(
            inputs.key_sizes if inputs.diagonal else inputs.query_sizes, context.exchange
        )

    def notes(self) -> list[Tensor]:
        """What this rank tells the others of its pairs by index: [rows, Q] numbers; where row
        i's key is not key i, int64 [rows] the key.
        """
        context, inputs = self.context, self.context.inputs
        assert context.keys.layout is not None
        told = [self.positives.whole_cosine.T, inputs.row_valid[:, None].to(context.fp)]
        if not context.one_temperature:
            told.append(context.inverse[:, None])
        if isinstance(inputs.max_cosine, Tensor):
            told.append(inputs.max_cosine[:, None])
        layout = self.rows_layout
        together = [layout.padded(torch.cat(told, 1))]
        return (
            together
            if inputs.diagonal
            else [*together, layout.padded(inputs.positive + context.keys.layout.start)]
        )

    def learn(self, keys: CandidateBlock, notes: list[Tensor]) -> None:
        """The pairs of all ranks, as ``notes`` tells; columns get their temperatures and limits."""
        context, positives, layout = self.context, self.positives, self.rows_layout
        inputs, prefixes = context.inputs, len(context.prefixes)
        if isinstance(positives.pairs, PairList):
            self.key, self.cosine = positives.pairs.keys, positives.cosine
            self.weight, inverse = positives.weight, positives.pairs.of_rows(positives.inverse)
            highest = inputs.max_cosine
            highest = (
                positives.pairs.of_rows(highest[context.share])
                if isinstance(highest, Tensor)
                else highest
            )
            self.own, self.in_place = slice(None), False
        else:
            told = layout.rows(notes[0]).T
            self.cosine, counted, more = told[:prefixes], told[prefixes], list(told[prefixes + 1 :])
            self.weight = counted * positives.of_row
            inverse = context.inverse if context.one_temperature else more.pop(0)
            highest = more.pop(0) if more else inputs.max_cosine
            start = layout.start + context.share.start
            self.own = slice(start, start + context.rows)
            # Row i of every rank is its key i's, and no other's: pairs and columns are the same
            # list.
            self.in_place = inputs.diagonal
            if not self.in_place:  # rows that do not count: beyond all columns
                self.key = torch.where(counted > 0, layout.rows(notes[1]), self.count)
        if context.one_temperature:
            self.inverse = context.same_inverse(keys.count)  # [C]
            self.rows: Tensor | None = None
        elif self.in_place:
            self.inverse, self.rows = inverse.contiguous(), None
        else:
            both = self._sum(torch.stack([torch.ones_like(self.weight), inverse]))
            self.rows = both[0]
            self.inverse = both[1] / self.rows.clamp_min(1)  # mean over the rows that share a key
        keys.inverse_temperature = self.inverse
        keys.max_cosine = self._limits(highest)

    def _sum(self, values: Tensor) -> Tensor:
        """[P, C] of each column's pairs, of all ranks."""
        found = sum_at(self.key, values, self.count + 1)[:, :-1]
        return self.context.sum_of_all(found) if self.by_id else found

    @property
    def count(self) -> int:
        """C"""
        assert self.context.keys.layout is not None
        return self.context.keys.layout.total

    def _limits(self, highest: tuple[float, ...] | Tensor | None) -> Tensor | None:
        """[P, C]: where several rows share a key, its margins start from its best positive, and
        it has the lowest max_cosine.
        """
        options = self.context.options
        if not options.filters:
            return None
        cosine = self.cosine
        if self.in_place:
            return limits(cosine, highest, options)
        below = [-highest[None]] if isinstance(highest, Tensor) else []
        found = best_at(self.key, torch.cat([cosine, *below]), self.count + 1)[:, :-1]
        if self.by_id:
            found = self.context.max_of_all(found)
        if below:
            return limits(finite(found[:-1]), -found[-1], options)
        return limits(finite(found), highest, options)

    def merge(self, here: slice, found: Statistics) -> None:
        """Statistics of one more tile of the columns ``here``."""
        assert found.column_maximum is not None and found.column_sum is not None
        self.top, self.total = merge(
            self.top, self.total, here, self.count, found.column_maximum, found.column_sum
        )

    def sums(self) -> Tensor:
        """float64 [P, C] this rank's sums of exponentials, to be added to the others'; its
        logarithms where there are none.
        """
        if self.top is None or self.total is None:
            some = torch.full(
                (len(self.context.prefixes), self.count),
                -torch.inf,
                dtype=torch.float64,
                device=self.context.device,
            )
        else:
            some = log_of_sums(self.total, self.top)
        return some if self.context.alone else some.exp_()

    def finish_statistics(self, sums: Tensor) -> None:
        """All rows are in: the pairs' losses [P] and pulls, and every column's logsumexp and
        push.
        """
        context, positives = self.context, self.positives
        log = sums if context.alone else sums.log_()
        self.log_negatives = finite(log).to(context.fp)
        of_pairs, inverse = log, self.inverse
        if not self.in_place:
            place = self.key.clamp_max(max(self.count - 1, 0))
            of_pairs, inverse = log[:, place], inverse[place]
        gap = (of_pairs - self.cosine * inverse).to(context.fp)
        self.losses = (softplus(gap[:, self.own]) * self.weight[self.own]).sum(1)
        negative_grad = gap.sigmoid_().mul_(self.weight).mul_(context.prefix_weights)
        positives.column_positive_grad = negative_grad[:, self.own] * inverse[self.own]
        self.negative_grad = negative_grad if self.in_place else self._sum(negative_grad)
        self.pair_negative_grad = negative_grad

    def add(self, here: slice, found: Gradient) -> None:
        """A tile's sums for the columns' temperatures."""
        if not self.context.one_temperature:
            assert found.column_temperature is not None
            if self.temperature is None:
                self.temperature = found.column_temperature.new_zeros(
                    len(found.column_temperature), self.count
                )
            self.temperature[:, here] += found.column_temperature

    # ---------------------------------------------------------------- gradients of temperatures
    # that rows have for themselves
    def temperature_sums(self) -> Tensor:
        """[1, C] d column loss / d the columns' inverse temperatures, from this rank's tiles;
        the pairs' part comes in temperature_gradient.
        """
        if self.temperature is None:
            return self.context.zeros(1, self.count)
        return self.temperature.sum(0, keepdim=True) / torch.where(
            self.inverse > 0, self.inverse, 1.0
        )

    def temperature_gradient(self, home: Tensor | None) -> Tensor:
        """[n] of the rows, each a part of its positives' means.

        home: the [1, M] ``temperature_sums`` of all ranks, of this rank's keys;
        None: of pairs by id, whose columns are everybody's."""
        context, positives = self.context, self.positives
        layout = context.keys.layout
        assert layout is not None
        of_pairs = (self.pair_negative_grad * self.cosine).sum(0)[None]
        if isinstance(positives.pairs, PairList):
            of_column = (
                self.temperature_sums()[0] - sum_at(self.key, of_pairs, layout.total + 1)[0, :-1]
            )
            assert self.rows is not None
            of_column = context.sum_of_all(of_column) / self.rows.clamp_min(1)
            return positives.pairs.per_row(of_column[positives.pairs.keys][None])[0]
        assert home is not None
        if context.peers.world_size > 1:
            home = context.peers.sum(home)
        of_pairs = of_pairs if self.in_place else sum_at(self.key, of_pairs, layout.total + 1)
        own = slice(layout.start, layout.start + home.shape[1])
        of_column = home[0] - of_pairs[0, own]
        if self.rows is not None:
            of_column = of_column / self.rows[own].clamp_min(1)
        of_rows = (
            of_column[: len(context.inputs.raw_queries)]
            if context.inputs.diagonal
            else of_column[context.inputs.positive]
        )
        return of_rows.where(context.inputs.row_valid, 0.0)[context.share]
