"""The column loss of ``symmetric``: every pair again, with its key as the anchor and all ranks' queries as candidates.

Columns are complete when all ranks' rows are in. Every rank then knows all columns, [P, C] over all ranks' keys C, as their
gradient needs it. Of pairs by index, ranks have told each other all that is known before the statistics (key, cosine,
temperature, limit) beside the keys, so the columns' sums of exponentials are the only thing left to add up: in float64 relative
to nothing, which holds every logit down to temperatures of 0.0015. Of pairs by id nobody knows others' cosines: more is reduced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sailplan_kernels.infonce.masks import limits
from sailplan_kernels.infonce.pairs import PairList, best_at, sum_at
from sailplan_kernels.infonce.positives import Positives
from sailplan_kernels.infonce.setting import Setting, finite
from sailplan_kernels.infonce.sources import Source, log_of_sums, merge
from sailplan_kernels.tiling.products import softplus
from sailplan_kernels.tiling.tile import Gradient, Statistics
from sailplan_kernels.tiling.vectors import Layout


class Columns:
    """What this rank and, after the exchange, all ranks know of the columns."""

    def __init__(self, setting: Setting, positives: Positives) -> None:
        self.setting, self.positives = setting, positives
        self.top: Tensor | None = None
        self.total: Tensor | None = None
        self.temperature: Tensor | None = None  # [P, C], where rows have temperatures of their own
        problem = setting.problem
        self.by_id = problem.wanted is not None
        self.rows_layout = Layout(problem.key_sizes if problem.diagonal else problem.query_sizes, setting.exchange)

    def notes(self) -> list[Tensor]:
        """What this rank tells the others of its pairs by index: [rows, Q] numbers; where row i's key is not key i, int64 [rows] the key."""
        setting, problem = self.setting, self.setting.problem
        assert setting.keys.layout is not None
        told = [self.positives.whole_cosine.T, problem.row_valid[:, None].to(setting.fp)]
        if not setting.one_temperature:
            told.append(setting.inverse[:, None])
        if isinstance(problem.max_cosine, Tensor):
            told.append(problem.max_cosine[:, None])
        layout = self.rows_layout
        together = [layout.padded(torch.cat(told, 1))]
        return together if problem.diagonal else [*together, layout.padded(problem.positive + setting.keys.layout.start)]

    def learn(self, keys: Source, notes: list[Tensor]) -> None:
        """The pairs of all ranks, as ``notes`` tells; columns get their temperatures and limits."""
        setting, positives, layout = self.setting, self.positives, self.rows_layout
        problem, prefixes = setting.problem, len(setting.prefixes)
        if isinstance(positives.pairs, PairList):
            self.key, self.cosine = positives.pairs.keys, positives.cosine
            self.weight, inverse = positives.weight, positives.pairs.of_rows(positives.inverse)
            highest = problem.max_cosine
            highest = positives.pairs.of_rows(highest[setting.share]) if isinstance(highest, Tensor) else highest
            self.own, self.in_place = slice(None), False
        else:
            told = layout.rows(notes[0]).T
            self.cosine, counted, more = told[:prefixes], told[prefixes], list(told[prefixes + 1 :])
            self.weight = counted * positives.of_row
            inverse = setting.inverse if setting.one_temperature else more.pop(0)
            highest = more.pop(0) if more else problem.max_cosine
            start = layout.start + setting.share.start
            self.own = slice(start, start + setting.rows)
            # Row i of every rank is its key i's, and no other's: pairs and columns are the same list.
            self.in_place = problem.diagonal
            if not self.in_place:  # rows that do not count: beyond all columns
                self.key = torch.where(counted > 0, layout.rows(notes[1]), self.count)
        if setting.one_temperature:
            self.inverse = setting.same_inverse(keys.count)  # [C]
            self.rows: Tensor | None = None
        elif self.in_place:
            self.inverse, self.rows = inverse.contiguous(), None
        else:
            both = self._sum(torch.stack([torch.ones_like(self.weight), inverse]))
            self.rows = both[0]
            self.inverse = both[1] / self.rows.clamp_min(1)  # mean over the rows that share a key
        keys.inverse_temperature = self.inverse
        keys.limit = self._limits(highest)

    def _sum(self, values: Tensor) -> Tensor:
        """[P, C] of each column's pairs, of all ranks."""
        found = sum_at(self.key, values, self.count + 1)[:, :-1]
        return self.setting.sum_of_all(found) if self.by_id else found

    @property
    def count(self) -> int:
        """C"""
        assert self.setting.keys.layout is not None
        return self.setting.keys.layout.total

    def _limits(self, highest: float | Tensor | None) -> Tensor | None:
        """[P, C]: where several rows share a key, its margins start from its best positive, and it has the lowest max_cosine."""
        options = self.setting.options
        if not options.filters:
            return None
        cosine = self.cosine
        if self.in_place:
            return limits(cosine, highest, options)
        below = [-highest[None]] if isinstance(highest, Tensor) else []
        found = best_at(self.key, torch.cat([cosine, *below]), self.count + 1)[:, :-1]
        if self.by_id:
            found = self.setting.max_of_all(found)
        if below:
            return limits(finite(found[:-1]), -found[-1], options)
        return limits(finite(found), highest, options)

    def merge(self, here: slice, found: Statistics) -> None:
        """Statistics of one more tile of the columns ``here``."""
        assert found.column_maximum is not None and found.column_sum is not None
        self.top, self.total = merge(self.top, self.total, here, self.count, found.column_maximum, found.column_sum)

    def sums(self) -> Tensor:
        """float64 [P, C] this rank's sums of exponentials, to be added to the others'; its logarithms where there are none."""
        if self.top is None or self.total is None:
            some = torch.full((len(self.setting.prefixes), self.count), -torch.inf, dtype=torch.float64, device=self.setting.device)
        else:
            some = log_of_sums(self.total, self.top)
        return some if self.setting.alone else some.exp_()

    def finish_statistics(self, sums: Tensor) -> None:
        """All rows are in: the pairs' losses [P] and pulls, and every column's logsumexp and push."""
        setting, positives = self.setting, self.positives
        log = sums if setting.alone else sums.log_()
        self.log_negatives = finite(log).to(setting.fp)
        of_pairs, inverse = log, self.inverse
        if not self.in_place:
            place = self.key.clamp_max(max(self.count - 1, 0))
            of_pairs, inverse = log[:, place], inverse[place]
        gap = (of_pairs - self.cosine * inverse).to(setting.fp)
        self.losses = (softplus(gap[:, self.own]) * self.weight[self.own]).sum(1)
        push = gap.sigmoid_().mul_(self.weight).mul_(setting.prefix_weights)
        positives.column_pull = push[:, self.own] * inverse[self.own]
        self.push = push if self.in_place else self._sum(push)
        self.pair_push = push

    def add(self, here: slice, found: Gradient) -> None:
        """A tile's sums for the columns' temperatures."""
        if not self.setting.one_temperature:
            assert found.column_temperature is not None
            if self.temperature is None:
                self.temperature = found.column_temperature.new_zeros(len(found.column_temperature), self.count)
            self.temperature[:, here] += found.column_temperature

    # ---------------------------------------------------------------- gradients of temperatures that rows have for themselves
    def temperature_sums(self) -> Tensor:
        """[1, C] d column loss / d the columns' inverse temperatures, from this rank's tiles; the pairs' part comes in temperature_gradient."""
        if self.temperature is None:
            return self.setting.zeros(1, self.count)
        return self.temperature.sum(0, keepdim=True) / torch.where(self.inverse > 0, self.inverse, 1.0)

    def temperature_gradient(self, home: Tensor | None) -> Tensor:
        """[n] of the rows, each a part of its positives' means. home: the [1, M] ``temperature_sums`` of all ranks, of this rank's keys;
        None: of pairs by id, whose columns are everybody's."""
        setting, positives = self.setting, self.positives
        layout = setting.keys.layout
        assert layout is not None
        of_pairs = (self.pair_push * self.cosine).sum(0)[None]
        if isinstance(positives.pairs, PairList):
            of_column = self.temperature_sums()[0] - sum_at(self.key, of_pairs, layout.total + 1)[0, :-1]
            assert self.rows is not None
            of_column = setting.sum_of_all(of_column) / self.rows.clamp_min(1)
            return positives.pairs.per_row(of_column[positives.pairs.keys][None])[0]
        assert home is not None
        if setting.peers.world_size > 1:
            home = setting.peers.sum(home)
        of_pairs = of_pairs if self.in_place else sum_at(self.key, of_pairs, layout.total + 1)
        own = slice(layout.start, layout.start + home.shape[1])
        of_column = home[0] - of_pairs[0, own]
        if self.rows is not None:
            of_column = of_column / self.rows[own].clamp_min(1)
        of_rows = of_column[: len(setting.problem.raw_queries)] if setting.problem.diagonal else of_column[setting.problem.positive]
        return of_rows.where(setting.problem.row_valid, 0.0)[setting.share]
