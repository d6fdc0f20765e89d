"""The pairs of a row and its positive: their cosines, their losses, and what they do to gradients.

A positive never enters a tile: loss = softplus(log_negatives - logit), and its pull has the coefficient
sigmoid(log_negatives - logit), which stays exact where 1 - p would cancel. A row pays the mean over its positives. With
key negatives each pair has a denominator of its own: the row's negatives, and the keys scored against its positive.

Positives may be any rank's keys: their pairs are looked at while the keys' shards are in memory anyway, in a round of their
own before the statistics and in the round of gradients. Those given by index are this rank's and need no round.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from sailplan_kernels.exchange.base import Shard, Stream
from sailplan_kernels.infonce.normalize import inverse_norms
from sailplan_kernels.infonce.pairs import sum_at
from sailplan_kernels.infonce.products import add_scaled_rows, prefix_dots, row_dots, softplus
from sailplan_kernels.infonce.setting import Setting, cut, finite
from sailplan_kernels.infonce.sources import Anchors, positive_anchors, query_anchors


class Positives:
    """E pairs of this rank's share of n rows, P prefixes."""

    def __init__(self, setting: Setting, key_stream: Stream) -> None:
        problem, pairs = setting.problem, setting.problem.pairs
        self.setting, self.pairs = setting, pairs
        found = setting.zeros(len(setting.prefixes), len(pairs.rows))
        self.norm = torch.empty_like(found)  # product of both inverse norms
        vectors = setting.queries.new_empty(len(pairs.rows), setting.queries.shape[1]) if setting.options.key_negatives else None
        for shard in key_stream.shards() if problem.by_id else [self.own_shard(None)]:
            for here in self._inside(shard, slice(0, len(pairs.rows))):
                rows, keys = pairs.rows[here], shard.vectors[pairs.keys[here] - shard.start]
                self.norm[:, here] = setting.query_norm[:, rows] * inverse_norms(keys, setting.prefixes, setting.fp)
                found[:, here] = prefix_dots(setting.queries[rows], keys, setting.prefixes, setting.fp)
                if vectors is not None:
                    vectors[here] = keys
        self.cosine = found.mul_(self.norm)
        self.logits = self.cosine * setting.inverse[pairs.rows]
        if problem.key_correction is not None:
            self.logits -= problem.key_correction[pairs.keys]
        weight = problem.row_weight / 2 if setting.options.symmetric else problem.row_weight
        self.weight = (weight / pairs.counts.clamp_min(1))[pairs.rows]
        self.column_pull: Tensor | None = None  # [P, E] the column loss's
        self.queries = query_anchors(setting, finite(pairs.best(self.cosine)))
        self.anchors = None if vectors is None else positive_anchors(setting, self.queries, vectors)

    def mean_cosine(self) -> Tensor:
        """[n] of each row's positives, longest prefix; 0 where it has none."""
        return self.pairs.per_row(self.cosine[-1:])[0] / self.pairs.counts.clamp_min(1)

    def of_rows(self, chunks: list[slice]) -> list[slice]:
        """The pairs of each chunk of rows; the chunks follow each other."""
        edges = torch.tensor([chunk.start for chunk in chunks], device=self.pairs.rows.device)
        starts = [*torch.searchsorted(self.pairs.rows, edges).tolist(), len(self.pairs.rows)]
        return [slice(*edge) for edge in pairwise(starts)]

    def own_shard(self, gradient: Tensor | None) -> Shard:
        """This rank's keys, where all positives by index are."""
        return Shard(self.setting.problem.own_keys.start, self.setting.keys, gradient)

    def _inside(self, shard: Shard, pairs: slice) -> Iterator[slice | Tensor]:
        """Places in the list of those pairs whose key is in this shard, some at a time."""
        problem = self.setting.problem
        if not problem.by_id:
            if shard.start == problem.own_keys.start and len(shard.vectors):
                yield from cut(pairs.start, pairs.stop, self.setting.rows_at_once)
            return
        keys = self.pairs.keys[pairs]
        here = (keys >= shard.start) & (keys < shard.start + len(shard.vectors))
        yield from (here.nonzero()[:, 0] + pairs.start).split(self.setting.rows_at_once)

    # ---------------------------------------------------------------- denominators, once they are complete
    def log_negatives(self, here: slice | Tensor) -> Tensor:
        """[P, e] of each pair; minus infinity without negatives."""
        of_row = self.queries.log_negatives(self.pairs.rows[here])
        return of_row if self.anchors is None else torch.logaddexp(of_row, self.anchors.log_negatives(here))

    def push(self, here: slice | Tensor) -> Tensor:
        """[P, e] d loss / d the pair's log_negatives."""
        return self.weight[here] * self.setting.prefix_weights * torch.sigmoid(self.log_negatives(here) - self.logits[:, here])

    def push_of(self, anchors: Anchors, rows: slice, pairs: slice) -> Tensor:
        """[P, n or E] d loss / d the anchors' own logsumexp: of consecutive rows, or of their pairs."""
        push = self.push(pairs)
        if self.anchors is not None:
            own = anchors.log_negatives(pairs if anchors.by_pair else self.pairs.rows[pairs])
            share = (own - self.log_negatives(pairs)).exp()  # of this part of the denominator
            push = torch.where(own.isinf(), 0.0, push * share)
        return push if anchors.by_pair else sum_at(self.pairs.rows[pairs] - rows.start, push, rows.stop - rows.start)

    def losses(self) -> Tensor:
        """[P]"""
        everything = slice(0, len(self.pairs.rows))
        return (self.weight * softplus(self.log_negatives(everything) - self.logits)).sum(1)

    def correct(self) -> Tensor:
        """bool [n], whether a positive of the row beats all negatives; longest prefix."""
        top = self.queries.top[-1:]
        if self.anchors is not None:
            top = torch.maximum(top, self.pairs.best(self.anchors.top[-1:]))
        return self.setting.problem.row_valid & (top < self.pairs.best(self.logits[-1:]))[0]

    # ---------------------------------------------------------------- gradients
    def pull(self, here: slice | Tensor) -> Tensor:
        """[P, e] minus d loss / d the pair's cosine."""
        pull = self.push(here) * self.setting.inverse[self.pairs.rows[here]]
        return pull if self.column_pull is None else pull + self.column_pull[:, here]

    def add_gradient(self, shard: Shard, pairs: slice) -> None:
        """What rows whose denominators are complete and their positives in this shard do to each other's vectors."""
        setting = self.setting
        for here in self._inside(shard, pairs):
            rows, keys, first = self.pairs.rows[here], self.pairs.keys[here] - shard.start, 0
            pull = self.pull(here) * self.norm[:, here]
            for s, end in enumerate(setting.prefixes):
                weight = -pull[s:].sum(0)
                if self.queries.gradient is not None:
                    add_scaled_rows(self.queries.gradient[:, first:end], rows, shard.vectors[keys, first:end], weight)
                if shard.gradient is not None:
                    add_scaled_rows(shard.gradient[:, first:end], keys, setting.queries[rows, first:end], weight)
                first = end

    def add_temperature(self) -> None:
        """To the queries' anchors: all that their tiles did not say about the inverse temperature."""
        if not self.setting.needs.temperature:
            return
        queries, anchors, pairs = self.queries, self.anchors, self.pairs
        if anchors is not None:
            if not anchors.moments and anchors.gradient is not None:
                anchors.temperature += row_dots(anchors.side.vectors, anchors.gradient, self.setting.rows_at_once) / anchors.side.inverse_temperature
            queries.temperature += pairs.per_row(anchors.temperature[None])[0]
        read = not queries.moments and queries.gradient is not None
        if read and queries.gradient is not None:
            queries.temperature += row_dots(self.setting.queries, queries.gradient, self.setting.rows_at_once) / self.setting.inverse
        if not (read and self.setting.problem.by_id):  # else the pairs have left their part in the gradient by now
            queries.temperature -= pairs.per_row(self.push(slice(0, len(pairs.rows))) * self.cosine).sum(0)

    def add_moments(self, key_moment: Tensor) -> None:
        """To those of the queries and of all keys [P, C]."""
        moment = self.pull(slice(0, len(self.pairs.rows))) * self.cosine
        self.queries.moment -= self.pairs.per_row(moment)
        if self.anchors is not None:
            moment = moment - self.anchors.moment
        key_moment -= sum_at(self.pairs.keys, moment, key_moment.shape[1])

    def keys_home(self, key_stream: Stream) -> Tensor | None:
        """[M, D] the keys' gradient: from the stream's rounds, as positives, and as anchors of whatever rank."""
        setting, needed, everything = self.setting, self.setting.needs.keys, slice(0, len(self.pairs.rows))
        as_anchors = None if self.anchors is None else self.anchors.gradient
        if not setting.problem.by_id:
            own = self.own_shard(key_stream.finish() if needed else None)
            self.add_gradient(own, everything)
            if as_anchors is not None:
                self._scatter(own, as_anchors)
            return own.gradient
        if as_anchors is None:
            return key_stream.finish() if needed else None
        again = key_stream if setting.exchange.whole else setting.exchange.stream(setting.keys, setting.problem.key_sizes, setting.gradient_dtype)
        for shard in again.shards(accumulate=True):
            self._scatter(shard, as_anchors)
        return again.finish() if again is key_stream else key_stream.finish() + again.finish()

    def _scatter(self, shard: Shard, gradient: Tensor) -> None:
        """The anchors' [E, D] to the keys of this shard that they are."""
        for here in self._inside(shard, slice(0, len(self.pairs.rows))):
            assert shard.gradient is not None
            shard.gradient.index_put_((self.pairs.keys[here] - shard.start,), gradient[here], accumulate=True)
