"""The driver of the loss: ranks, blocks of candidates, positives, normalisation. What happens inside a tile is an engine's.

Where a rank sees all candidates of a row at once, a chunk of rows sees its whole denominator: its statistics and its
gradient come out of ONE product of scores (6 NMD of matrix products). The symmetric loss, and an exchange whose shards
pass by, need two rounds: statistics of all rows and columns, then gradients (8 NMD; tiles that fit into the memory
budget are kept in between and not computed again). All Matryoshka prefixes come out of the same round: prefix p's dot
product is the running sum up to its length, and each segment's gradient product reads only its own dimensions.

The positive never enters a tile: loss = softplus(lse_neg - s_pos), its pull has the coefficient sigmoid(lse_neg - s_pos),
which stays exact where 1 - p would cancel. Positives by id (pairs.py) may be any rank's keys: their pairs are looked at
while the keys' shards are in memory anyway, in a round of their own before the statistics and in the round of gradients.

Candidates of a row: keys; with the options other queries, other keys scored against the positive, everybody's hard
negatives; and its own hard negatives, which are no tile but [N, H].

A cosine is <x_p, y_p> a_p b_p with inverse prefix norms a, b, so d cos / dx = y_p a_p b_p - cos a_p^2 x_p. All terms of
the longest prefix that are parallel to x, the second above all, are taken out at once in the end (normalize.py).

Collectives, all inside the forward, depend only on what all ranks agreed on in problem.py. Differentiable once.
Where peers hold the same rows (exchange/row_split.py) each does its share of them against all candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sailplan_kernels.exchange.base import Shard, Stream
from sailplan_kernels.exchange.row_split import peers_of, shares
from sailplan_kernels.infonce.masks import Candidates, best_per_key, limits, lowest_per_key
from sailplan_kernels.infonce.normalize import inverse_norms, normalized_gradient_, operand
from sailplan_kernels.infonce.pairs import Pairs, sum_at
from sailplan_kernels.infonce.problem import Problem
from sailplan_kernels.infonce.products import add_product, prefix_dots, row_dots, softplus
from sailplan_kernels.infonce.tile import Coefficients, Engine, Rule, Side, Statistics, Tile

FEWEST_ROWS = 64  # a chunk of fewer rows is no matrix product worth its overhead: go by tiles, in two rounds
PAIRS_AT_ONCE = 1024  # rows whose positives are looked at together


def fused_loss(problem: Problem, engine: Engine) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's weighted loss (0-d), loss of each prefix [P], and of the longest prefix the positives' cosines [N] and
    the rows that are right [N]. Differentiable once.
    """
    longest = problem.options.prefixes[-1]
    vectors = [x if x.shape[-1] == longest else x[..., :longest] for x in (problem.raw_queries, problem.raw_keys, problem.raw_hard)]
    return _Fused.apply(problem, engine, *vectors, problem.inverse_temperature, problem.column_inverse_temperature)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, engine, queries, keys, hard, inverse_temperature, column_inverse_temperature):
        work = _Work(problem, engine, queries, keys, hard, inverse_temperature, column_inverse_temperature)
        work.run()
        ctx.gradients = [x if needed else None for x, needed in zip(work.finish(), ctx.needs_input_grad[2:], strict=True)]
        ctx.dtypes = [x.dtype for x in (queries, keys, hard, inverse_temperature, column_inverse_temperature)]
        losses, positive, correct = work.losses, work.all_positive[-1], work.all_correct
        ctx.mark_non_differentiable(losses, positive, correct)
        return (losses * work.prefix_weights).sum(), losses, positive, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        """The gradients wait in full precision, are scaled where they are and given away: no copy, so no second time."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("infonce: found a second backward of one call, expected one; call infonce again")
        return None, None, *(None if x is None else x.mul_(gradient).to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True))


@dataclass
class _Block:
    """Rows scored against the candidates of a source, and where the rows' gradient goes (None: nobody needs it)."""

    rows: Side
    rule: Rule
    gradient: Tensor | None
    moment: Tensor  # [P, N] sum of G * cosine


@dataclass
class _Source:
    """Candidates of one kind, as they come from the exchange."""

    stream: Stream
    candidates: Candidates
    needed: bool  # whether any rank needs their gradient
    blocks: list[_Block]
    moment: Tensor  # [P, C]
    correction: Tensor | None = None
    limit: Tensor | None = None  # [P, C]
    inverse_temperature: Tensor | None = None  # [C]
    norms: dict[int, Tensor] = field(default_factory=dict)

    def columns(self, shard: Shard, part: slice, prefixes: tuple[int, ...], like: Tensor) -> Side:
        """Columns ``part`` of a shard."""
        if shard.start not in self.norms:
            self.norms[shard.start] = inverse_norms(shard.vectors, prefixes, like.dtype)
        here = slice(shard.start + part.start, shard.start + part.stop)
        inverse = self.inverse_temperature
        return Side(
            vectors=shard.vectors[part],
            inverse_norm=self.norms[shard.start][:, part],
            tags=self.candidates.tags[here],
            valid=self.candidates.valid[here],
            limit=None if self.limit is None else self.limit[:, here],
            inverse_temperature=like.new_ones(part.stop - part.start) if inverse is None else inverse[here],
            correction=None if self.correction is None else self.correction[here],
        )


class _Work:
    """The working state of one forward: of this rank's share of the rows, unless it says whole."""

    def __init__(self, problem, engine, queries, keys, hard, inverse_temperature, column_inverse):
        self.peers = peers_of(problem.exchange)
        self.share_sizes, share = shares(len(queries), self.peers)
        self.whole, problem = problem, problem.share(share)
        self.problem, self.options, self.needs, self.engine = problem, problem.options, problem.needs, engine
        self.exchange, self.prefixes, self.fp = problem.exchange, problem.options.prefixes, problem.row_weight.dtype
        options, needs = problem.options, problem.needs
        # What was given and which of its rows are padding; and what the products read of it.
        self.given = [(queries, self.whole.query_valid), (keys, problem.key_valid), (hard.flatten(0, 1), self.whole.hard_valid.flatten())]
        operands = [operand(x, valid, problem.operand_dtype) for x, valid in self.given]
        (self.whole_queries, self.keys, flat_hard), self.copied = zip(*operands, strict=True)
        self.whole_hard = flat_hard.view(hard.shape)
        self.queries, self.hard = self.whole_queries[share], self.whole_hard[share]
        self.inverse, self.column_inverse = inverse_temperature[share].contiguous(), column_inverse
        key_stream = self.exchange.stream(self.keys, problem.key_sizes, self.fp)  # on its way while positives are scored
        self.prefix_weights = problem.row_weight.new_tensor(options.prefix_weights)
        self.weight = problem.row_weight / 2 if options.symmetric else problem.row_weight
        self.query_norm, self.key_norm = (inverse_norms(x, self.prefixes, self.fp) for x in (self.queries, self.keys))
        if problem.pairs is None:
            self.positive = score = self._positive_cosines()
        else:
            self.positive, score = self._pair_cosines(problem.pairs, key_stream)
        self.all_positive = self._of_all_peers(score.T).T
        shape = (len(self.prefixes), len(self.queries))
        self.row_top = self.weight.new_full(shape, -torch.inf)
        self.row_sum = self.weight.new_zeros(shape)
        self.d_queries = torch.zeros_like(self.queries, dtype=self.fp) if needs.queries else None
        self.d_hard = torch.zeros_like(self.hard, dtype=self.fp) if needs.hard else None
        self.d_anchors: Tensor | None = None
        self.d_inverse = torch.zeros_like(self.inverse)
        self.kept: dict[tuple[int, int, int, int], Tile] = {}
        self.kept_bytes = 0.0
        self.row_moment = self.weight.new_zeros(shape)
        self._make_sources(key_stream)
        self._own_hard_statistics()

    def _positive_cosines(self) -> Tensor:
        """[P, N]; blockwise, as the positives' keys are a copy."""
        found = self.query_norm.new_empty(self.query_norm.shape)
        for start in range(0, len(self.queries), PAIRS_AT_ONCE):
            rows = slice(start, start + PAIRS_AT_ONCE)
            found[:, rows] = prefix_dots(self.queries[rows], self.keys[self.problem.positive[rows]], self.prefixes, self.fp)
        return found * self.query_norm * self.key_norm[:, self.problem.positive]

    def _pair_cosines(self, pairs: Pairs, key_stream: Stream) -> tuple[Tensor, Tensor]:
        """Looks at all pairs; each row's best cosine and their mean, [P, N], 0 where there is none."""
        found = self.query_norm.new_empty((len(self.prefixes), len(pairs.rows)))
        self.pair_norm = torch.empty_like(found)  # product of both inverse norms
        for shard in key_stream.shards():
            for here in pairs_in(pairs, shard, slice(0, len(self.queries))):
                rows, vectors = pairs.rows[here], shard.vectors[pairs.keys[here] - shard.start]
                self.pair_norm[:, here] = self.query_norm[:, rows] * inverse_norms(vectors, self.prefixes, self.fp)
                found[:, here] = prefix_dots(self.queries[rows], vectors, self.prefixes, self.fp)
        self.pair_cosine = found.mul_(self.pair_norm)
        correction = self.problem.key_correction
        logits = self.pair_cosine * self.inverse[pairs.rows]
        self.pair_logits = logits if correction is None else logits.sub_(correction[pairs.keys])
        self.pair_starts = [0, *pairs.counts.cumsum(0).tolist()]
        self.pair_weight = (self.weight / pairs.counts.clamp_min(1))[pairs.rows]
        return finite(pairs.best(self.pair_cosine)), pairs.per_row(self.pair_cosine) / pairs.counts.clamp_min(1)

    # ---------------------------------------------------------------- candidates
    def _make_sources(self, key_stream: Stream) -> None:
        problem, options, needs = self.problem, self.options, self.needs
        # Without prefixes and columns the temperature's sum is <query, its gradient>: no work inside the tile.
        inside = len(self.prefixes) > 1 or (needs.temperature and (options.symmetric or not needs.queries))
        rule = Rule(self.prefixes, problem.tags_in_use, columns=False, moments=inside)
        rows = Side(
            vectors=self.queries,
            inverse_norm=self.query_norm,
            tags=problem.anchor_tags,
            valid=problem.query_valid,
            limit=limits(self.positive, problem.max_negative_score, options),
            inverse_temperature=self.inverse,
        )
        query_block = lambda rule: _Block(rows, rule, self.d_queries, self.row_moment)  # noqa: E731
        self.sources = [self._source(key_stream, problem.all_keys, needs.keys, [query_block(replace(rule, columns=options.symmetric))])]
        keys = self.sources[0]
        keys.correction = problem.key_correction
        if options.symmetric:
            whole = self.whole
            best = torch.stack([best_per_key(whole.positive, x, whole.row_valid, len(self.keys)) for x in self.all_positive], 1)
            highest = torch.full_like(best[:, 0], torch.inf)
            if whole.max_negative_score is not None:
                highest = lowest_per_key(whole.positive, whole.max_negative_score, whole.row_valid, len(self.keys))
            gathered = self.exchange.gather(torch.stack([self.column_inverse.detach(), highest, *best.unbind(1)], 1), problem.key_sizes)
            keys.inverse_temperature = gathered[:, 0].contiguous()
            keys.limit = limits(gathered[:, 2:].T.contiguous(), gathered[:, 1], options)
            self.column_top, self.column_sum = torch.full_like(keys.moment, -torch.inf), torch.zeros_like(keys.moment)
            self.column_temperature = torch.zeros_like(keys.moment)
        if options.query_negatives:
            stream = self.exchange.stream(self.whole_queries, problem.query_sizes, self.fp)
            self.sources.append(self._source(stream, problem.all_queries, needs.queries, [query_block(rule)]))
        if options.key_negatives:
            anchors = self.keys[problem.positive]
            self.d_anchors = torch.zeros_like(anchors, dtype=self.fp) if needs.keys else None
            self.anchor_moment = torch.zeros_like(self.row_moment)
            side = replace(rows, vectors=anchors, inverse_norm=self.key_norm[:, problem.positive])
            # Where nobody needs the keys' gradient there is no sum to read the temperature's from.
            rule_of_anchors = replace(rule, moments=inside or (needs.temperature and not needs.keys))
            keys.blocks.append(_Block(side, rule_of_anchors, self.d_anchors, self.anchor_moment))
        if options.shared_hard_negatives:
            stream = self.exchange.stream(self.whole_hard.flatten(0, 1), problem.hard_sizes, self.fp)
            self.sources.append(self._source(stream, problem.all_hard, needs.hard, [query_block(replace(rule, tags_in_use=()))]))

    def _source(self, stream: Stream, candidates: Candidates, needed: bool, blocks: list[_Block]) -> _Source:
        count = len(candidates.valid)
        return _Source(stream, candidates, needed, blocks, self.row_moment.new_zeros(len(self.prefixes), count))

    @property
    def own_hard(self) -> bool:
        return self.hard.shape[1] > 0 and not self.options.shared_hard_negatives

    def _own_hard_statistics(self) -> None:
        """Cosines [P, N, H] of the rows' own hard negatives, and their part of the denominators."""
        if not self.own_hard:
            return
        flat = self.hard.flatten(0, 1)
        shape = (len(self.prefixes), *self.hard.shape[:2])
        self.hard_norm = inverse_norms(flat, self.prefixes, self.fp).view(shape)
        self.hard_cosine = self.query_norm[:, :, None] * self.hard_norm
        for rows in cut(len(self.queries), PAIRS_AT_ONCE):
            self.hard_cosine[:, rows] *= prefix_dots(self.queries[rows, None], self.hard[rows], self.prefixes, self.fp)
        keep = self.problem.hard_valid.expand(shape)
        limit = self.sources[0].blocks[0].rows.limit
        if limit is not None:
            keep = keep & (self.hard_cosine <= limit[:, :, None])
        self.hard_logits = (self.hard_cosine * self.inverse[:, None]).masked_fill(~keep, -torch.inf)
        self.row_top = self.hard_logits.amax(2)
        self.row_sum = (self.hard_logits - finite(self.row_top)[:, :, None]).exp().sum(2)

    # ---------------------------------------------------------------- rounds
    def run(self) -> None:
        n, width = len(self.queries), sum(len(s.candidates.valid) * len(s.blocks) for s in self.sources)
        scale = torch.finfo(self.fp).bits / 32
        budget = self.options.memory_budget / scale
        kept = max(self.engine.pair_bytes(b.rule, True) for s in self.sources for b in s.blocks)
        anew = max(self.engine.pair_bytes(b.rule, False) for s in self.sources for b in s.blocks)
        at_once = int(budget // max(1, width * kept))
        if self.exchange.whole and not self.options.symmetric and at_once >= min(n, FEWEST_ROWS):
            self.budget, self.tile_columns = float("inf"), max(width, 1)
            for rows in cut(n, max(at_once, 1)):
                self._statistics([rows])
                self._gradient([rows])
        else:
            # Half of the budget for the tile at work, half for tiles that wait for their gradient.
            self.budget, area = budget / 2, max(1, int(budget / 2 // anew))
            step = min(max(n, 1), max(16, min(area // max(width, 1), 4096) if area // max(width, 1) >= FEWEST_ROWS else int(area**0.5)))
            self.tile_columns = max(64, area // step)
            chunks = cut(n, step)
            self._statistics(chunks)
            if self.options.symmetric:
                self._finish_columns()
            self._gradient(chunks)
        self._finish_rows()

    def _statistics(self, chunks: list[slice]) -> None:
        for s, source in enumerate(self.sources):
            for shard in source.stream.shards():
                for part in cut(len(shard.vectors), self.tile_columns):
                    columns = source.columns(shard, part, self.prefixes, self.inverse)
                    for b, block in enumerate(source.blocks):
                        for rows in chunks:
                            size = (rows.stop - rows.start) * (part.stop - part.start) * self.engine.pair_bytes(block.rule, True)
                            keep = self._any_gradient and self.kept_bytes + size <= self.budget
                            tile = self.engine.tile(some(block.rows, rows), columns, block.rule, keep)
                            found = tile.statistics()
                            merge(self.row_top[:, rows], self.row_sum[:, rows], found.row_maximum, found.row_sum)
                            if block.rule.columns:
                                here = slice(shard.start + part.start, shard.start + part.stop)
                                self._merge_columns(here, found)
                            if keep:
                                self.kept[s, b, shard.start + part.start, rows.start] = tile
                                self.kept_bytes += size

    def _merge_columns(self, here: slice, found: Statistics) -> None:
        assert found.column_maximum is not None and found.column_sum is not None
        merge(self.column_top[:, here], self.column_sum[:, here], found.column_maximum, found.column_sum)

    @property
    def _any_gradient(self) -> bool:
        needs = self.needs
        return needs.queries or needs.keys or needs.hard or needs.temperature

    def _gradient(self, chunks: list[slice]) -> None:
        if not self._any_gradient:
            return
        log_negatives = {rows.start: self._log_negatives(rows) for rows in chunks}
        push = {rows.start: self._push(rows, log_negatives[rows.start]) for rows in chunks}
        for s, source in enumerate(self.sources):
            for shard in source.stream.shards(accumulate=source.needed):
                for part in cut(len(shard.vectors), self.tile_columns):
                    columns = source.columns(shard, part, self.prefixes, self.inverse)
                    here = slice(shard.start + part.start, shard.start + part.stop)
                    for b, block in enumerate(source.blocks):
                        for rows in chunks:
                            tile = self.kept.pop((s, b, here.start, rows.start), None)
                            side = some(block.rows, rows)
                            if tile is None:
                                tile = self.engine.tile(side, columns, block.rule, False)
                            coefficients = Coefficients(finite(log_negatives[rows.start]), push[rows.start])
                            if block.rule.columns:
                                coefficients = replace(
                                    coefficients, column_log_negatives=self.column_log[:, here], column_push=self.column_push[:, here]
                                )
                            found = tile.gradient(coefficients)
                            start = 0
                            for end, weight in zip(self.prefixes, found.weights, strict=True):
                                segment = slice(start, end)
                                if block.gradient is not None:
                                    add_product(block.gradient[rows, segment], weight, columns.vectors[:, segment])
                                if shard.gradient is not None:
                                    add_product(shard.gradient[part, segment], weight.T, side.vectors[:, segment])
                                start = end
                            if block.rule.moments:
                                block.moment[:, rows] += found.row_moment
                                source.moment[:, here] += found.column_moment
                                self.d_inverse[rows] += found.row_temperature.sum(0) / self.inverse[rows]
                            if block.rule.columns and found.column_temperature is not None:
                                self.column_temperature[:, here] += found.column_temperature
                if s == 0 and self.problem.pairs is not None and chunks:
                    self._pairs_gradient(self.problem.pairs, shard, slice(chunks[0].start, chunks[-1].stop))
        self.kept_bytes = 0.0

    def _pairs_gradient(self, pairs: Pairs, shard: Shard, chunk: slice) -> None:
        """What consecutive rows, whose statistics are complete, and their positives in this shard do to each other."""
        for here in pairs_in(pairs, shard, chunk):
            rows, keys, first = pairs.rows[here], pairs.keys[here] - shard.start, 0
            pull = self._pair_push(pairs, here) * self.inverse[rows] * self.pair_norm[:, here]
            for s, end in enumerate(self.prefixes):
                weight = pull[s:].sum(0)[:, None]
                for target, index, other in ((self.d_queries, rows, shard.vectors[keys, first:end]), (shard.gradient, keys, self.queries[rows, first:end])):
                    if target is not None:
                        target[:, first:end].index_put_((index,), -weight * other.to(self.fp), accumulate=True)
                first = end

    def _pair_gap(self, pairs: Pairs, here: Tensor | slice) -> Tensor:
        return self._log_negatives(pairs.rows[here]) - self.pair_logits[:, here]

    def _pair_push(self, pairs: Pairs, here: Tensor | slice) -> Tensor:
        """[P, e] d loss / d log_negatives by way of each pair."""
        return self.pair_weight[here] * self.prefix_weights[:, None] * torch.sigmoid(self._pair_gap(pairs, here))

    # ---------------------------------------------------------------- denominators
    def _log_negatives(self, rows: slice | Tensor) -> Tensor:
        """[P, r] of rows whose statistics are complete; minus infinity without negatives."""
        return self.row_sum[:, rows].log() + finite(self.row_top[:, rows])

    def _gap(self, rows: slice, log_negatives: Tensor) -> Tensor:
        return log_negatives - (self.positive[:, rows] * self.inverse[rows] - self.problem.positive_correction[rows])

    def _push(self, rows: slice, log_negatives: Tensor) -> Tensor:
        pairs = self.problem.pairs
        if pairs is not None:
            here = slice(self.pair_starts[rows.start], self.pair_starts[rows.stop])
            return sum_at(pairs.rows[here] - rows.start, self._pair_push(pairs, here), rows.stop - rows.start)
        return self.weight[rows] * self.prefix_weights[:, None] * torch.sigmoid(self._gap(rows, log_negatives))

    def _finish_columns(self) -> None:
        """Columns are complete when all ranks' rows are in: merge, and put the positives' loss and pull on their own rank."""
        problem = self.problem
        highest = self.exchange.max(self.peers.max(self.column_top))
        total = self.exchange.sum(self.peers.sum(self.column_sum * (self.column_top - finite(highest)).exp()))
        log_negatives = total.log() + finite(highest)
        self.row_of_column_inverse = self.column_inverse[problem.positive]
        gap = log_negatives[:, problem.own_keys][:, problem.positive] - self.positive * self.row_of_column_inverse
        self.column_losses = (self.weight * softplus(gap)).sum(1)
        self.column_row_push = self.weight * self.prefix_weights[:, None] * torch.sigmoid(gap)
        push = self.column_row_push.new_zeros(len(self.keys), len(self.prefixes))
        push.index_put_((problem.positive,), self.column_row_push.T.contiguous(), accumulate=True)
        self.column_push = self.exchange.gather(self.peers.sum(push), problem.key_sizes).T.contiguous()
        self.column_log = finite(log_negatives)

    def _finish_rows(self) -> None:
        """Loss, and the part of the gradients that is not in tiles: positives and own hard negatives."""
        problem, everyone = self.problem, slice(0, len(self.queries))
        log_negatives = self._log_negatives(everyone)
        pairs = problem.pairs
        if pairs is None:
            self.losses = (self.weight * softplus(self._gap(everyone, log_negatives))).sum(1)
            self.correct = problem.row_valid & (self.row_top[-1] < self.positive[-1] * self.inverse - problem.positive_correction)
        else:
            self.losses = (self.pair_weight * softplus(self._pair_gap(pairs, slice(None)))).sum(1)
            self.correct = problem.row_valid & (self.row_top[-1] < pairs.best(self.pair_logits)[-1])
        push = self._push(everyone, log_negatives)
        self.pull = push * self.inverse
        if self.options.symmetric:
            self.losses = self.losses + self.column_losses
            self.pull = self.pull + self.column_row_push * self.row_of_column_inverse
        self.losses, self.all_correct = self.peers.sum(self.losses), self._of_all_peers(self.correct)
        if not self._any_gradient:
            return
        if self.needs.temperature:
            if not self.sources[0].blocks[0].rule.moments and self.d_queries is not None:
                self.d_inverse += row_dots(self.queries, self.d_queries) / self.inverse
            if self.options.key_negatives and not self.sources[0].blocks[1].rule.moments and self.d_anchors is not None:
                self.d_inverse += row_dots(self.sources[0].blocks[1].rows.vectors, self.d_anchors) / self.inverse
        if pairs is None:
            self.d_inverse -= (push * self.positive).sum(0)
            self.row_moment -= self.pull * self.positive
        else:
            moment = self._pair_push(pairs, slice(None)) * self.pair_cosine
            keys = self.sources[0]
            if keys.blocks[0].rule.moments or self.d_queries is None:  # else the pairs are in d_queries, which was asked above
                self.d_inverse -= pairs.per_row(moment).sum(0)
            moment *= self.inverse[pairs.rows]
            self.row_moment -= pairs.per_row(moment)
            keys.moment -= sum_at(pairs.keys, moment, keys.moment.shape[1])
        if self.own_hard:
            self._own_hard_gradient(log_negatives, push)

    def _own_hard_gradient(self, log_negatives: Tensor, push: Tensor) -> None:
        share = (self.hard_logits - finite(log_negatives)[:, :, None]).exp_() * push[:, :, None]
        if self.needs.temperature:
            self.d_inverse += (share * self.hard_cosine).sum((0, 2))
        share *= self.inverse[:, None]
        self.hard_moment = share * self.hard_cosine
        self.row_moment += self.hard_moment.sum(2)
        share = share * self.query_norm[:, :, None] * self.hard_norm
        for start in range(0, len(self.queries), PAIRS_AT_ONCE):
            rows, first = slice(start, start + PAIRS_AT_ONCE), 0
            for s, end in enumerate(self.prefixes):
                weight = share[s:, rows].sum(0)[:, :, None]
                if self.d_queries is not None:
                    self.d_queries[rows, first:end] += (weight * self.hard[rows, :, first:end]).sum(1)
                if self.d_hard is not None:
                    self.d_hard[rows, :, first:end] = weight * self.queries[rows, None, first:end]
                first = end

    # ---------------------------------------------------------------- gradients come home
    def finish(self) -> tuple[Tensor | None, ...]:
        """Those of queries, keys, hard negatives and both inverse temperatures."""
        problem, exchange, options, needs = self.problem, self.exchange, self.options, self.needs
        if not self._any_gradient:
            return (None,) * 5
        streams = iter(self.sources)
        source = next(streams)
        several = len(self.prefixes) > 1
        d_keys = source.stream.finish() if needs.keys else None
        key_moment = self._home(source, problem.key_sizes) if several and needs.keys else None
        if options.query_negatives:
            source = next(streams)
            if self.d_queries is not None:
                self.d_queries += self._own_share(source.stream.finish())
                if several:
                    self.row_moment += self._own_share(self._home(source, problem.query_sizes).T).T
        if options.shared_hard_negatives:
            source = next(streams)
            if needs.hard:
                self.d_hard = self._own_share(source.stream.finish().view(self.whole_hard.shape))
                if several:
                    moment = self._own_share(self._home(source, problem.hard_sizes).T.reshape(*self.whole_hard.shape[:2], -1))
                    self.hard_moment = moment.permute(2, 0, 1)
        if problem.pairs is None:
            self._positives_gradient(d_keys, key_moment)
        if several:
            self._norms_gradient(self.queries, self.query_norm, self.row_moment, self.d_queries)
            self._norms_gradient(self.keys, self.key_norm, key_moment, d_keys)
            if self.hard.shape[1] and self.d_hard is not None:
                flat = self.hard.flatten(0, 1)
                norm = inverse_norms(flat, self.prefixes, self.fp)
                self._norms_gradient(flat, norm, self.hard_moment.flatten(1), self.d_hard.view(flat.shape))
        d_column = None
        if options.symmetric and needs.temperature:
            moment = exchange.reduce_scatter(self.column_temperature.sum(0), problem.key_sizes)
            d_column = torch.where(self.column_inverse > 0, moment / self.column_inverse, 0.0)
            own = -(self.column_row_push * self.positive).sum(0)
            d_column.index_put_((problem.positive,), own, accumulate=True)
        of_rows = [None if x is None else self._of_all_peers(x) for x in (self.d_queries, self.d_hard, self.d_inverse)]
        of_keys = [None if x is None else self._sum_over_peers(x) for x in (d_keys, d_column)]
        vectors = [of_rows[0], of_keys[0], None if of_rows[1] is None else of_rows[1].flatten(0, 1)]
        for gradient, (x, valid), copied in zip(vectors, self.given, self.copied, strict=True):
            if gradient is not None:
                normalized_gradient_(gradient, x, valid, copied)
        return of_rows[0], of_keys[0], of_rows[1], of_rows[2], of_keys[1]

    def _sum_over_peers(self, x: Tensor) -> Tensor:
        return x if self.peers.world_size == 1 else self.peers.sum(x)

    def _of_all_peers(self, x: Tensor) -> Tensor:
        """[whole N, ...] the rows [n, ...] of all shares."""
        return self.peers.gather(x.contiguous(), self.share_sizes)

    def _own_share(self, x: Tensor) -> Tensor:
        """[n, ...] this rank's rows of the sum over peers of [whole N, ...]."""
        return self.peers.reduce_scatter(x.contiguous(), self.share_sizes)

    def _home(self, source: _Source, sizes: list[int]) -> Tensor:
        """[P, own] sums over ranks."""
        return self.exchange.reduce_scatter(source.moment.T.contiguous(), sizes).T.contiguous()

    def _positives_gradient(self, d_keys: Tensor | None, key_moment: Tensor | None) -> None:
        index = self.problem.positive
        pull = self.pull * self.query_norm * self.key_norm[:, index]
        for start in range(0, len(self.queries), PAIRS_AT_ONCE):
            rows, first = slice(start, start + PAIRS_AT_ONCE), 0
            here = index[rows]
            change = None if d_keys is None else self.queries.new_empty((len(here), self.keys.shape[1]), dtype=self.fp)
            for s, end in enumerate(self.prefixes):
                weight = pull[s:, rows].sum(0)[:, None]
                if self.d_queries is not None:
                    self.d_queries[rows, first:end].addcmul_(self.keys[here, first:end].to(self.fp), weight, value=-1)
                if change is not None:
                    torch.mul(self.queries[rows, first:end].to(self.fp), -weight, out=change[:, first:end])
                first = end
            if d_keys is not None and change is not None:
                if self.d_anchors is not None:
                    change += self.d_anchors[rows]
                d_keys.index_put_((here,), change, accumulate=True)
        if key_moment is not None:
            moment = -(self.pull * self.positive)
            if self.d_anchors is not None:
                moment = moment + self.anchor_moment
            own = key_moment.T.contiguous().index_put_((index,), moment.T.contiguous(), accumulate=True)
            key_moment.copy_(own.T)

    def _norms_gradient(self, x: Tensor, norm: Tensor, moment: Tensor | None, target: Tensor | None) -> None:
        """Minus x_p * inverse_norm^2 * moment, of all prefixes but the longest, each on its own dimensions."""
        if target is None or moment is None:
            return
        share, first = (norm.square() * moment)[:-1], 0
        for s, end in enumerate(self.prefixes[:-1]):
            target[:, first:end].addcmul_(x[:, first:end].to(self.fp), share[s:].sum(0)[:, None], value=-1)
            first = end


# -------------------------------------------------------------------- small things
def finite(x: Tensor) -> Tensor:
    """Minus infinity, the maximum or logsumexp of nothing, as 0, so that differences stay defined."""
    return torch.where(x.isinf(), 0.0, x)


def merge(top: Tensor, total: Tensor, other_top: Tensor, other_total: Tensor) -> None:
    """Join (maximum, sum of exponentials) with another, in place."""
    highest = torch.maximum(top, other_top)
    shift = finite(highest)
    total.copy_(total * (top - shift).exp() + other_total * (other_top - shift).exp())
    top.copy_(highest)


def pairs_in(pairs: Pairs, shard: Shard, rows: slice) -> Iterator[Tensor]:
    """Places in the list of the pairs of these rows with keys of this shard, some at a time."""
    here = (pairs.keys >= shard.start) & (pairs.keys < shard.start + len(shard.vectors))
    here &= (pairs.rows >= rows.start) & (pairs.rows < rows.stop)
    yield from here.nonzero()[:, 0].split(PAIRS_AT_ONCE)


def cut(n: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def some(side: Side, rows: slice) -> Side:
    """Those rows of a side."""
    return Side(
        vectors=side.vectors[rows],
        inverse_norm=side.inverse_norm[:, rows],
        tags=side.tags[rows],
        valid=side.valid[rows],
        limit=None if side.limit is None else side.limit[:, rows],
        inverse_temperature=side.inverse_temperature[rows],
        correction=None if side.correction is None else side.correction[rows],
    )
