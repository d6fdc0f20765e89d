"""Rounds over the tiles: first the statistics of all denominators, then gradients, in as much
memory as the budget says.

Where a rank sees all candidates of a row at once and the engine keeps tiles, a chunk of rows sees
its whole denominator: its statistics and its gradient come out of ONE product of scores (6 NMD of
matrix products). All else, as the symmetric loss and an exchange whose shards pass by, needs two
rounds: statistics of all rows and columns, then gradients (8 NMD; tiles that fit into the memory
budget are kept in between and not computed again). Their tiles are as square as the sides allow:
every tile reads and writes the gradients of its rows and of its columns, so of all tiles of one
area a square moves the fewest bytes. All Matryoshka prefixes come out of the same round: prefix p's
dot product is the running sum up to its length, and each segment's gradient product reads only its
own dimensions.
"""

from __future__ import annotations

from dataclasses import replace
from math import isqrt

from sailplan_kernels.infonce.blocks import CandidateBlock, QueryBlock, some
from sailplan_kernels.infonce.forward_context import ForwardContext, cut
from sailplan_kernels.infonce.positives import Positives
from sailplan_kernels.infonce.symmetric_term import SymmetricTerm
from sailplan_kernels.tiling.products import add_product
from sailplan_kernels.tiling.tile import Coefficients, Gradient, MaskConfig, Tile

FEWEST_ROWS = (
    64  # a chunk of fewer rows is no matrix product worth its overhead: go by tiles, in two rounds
)
# Sides of tiles are multiples of it where they are longer, so that few blocks of a kernel or a
# product are ragged
WHOLE = 128


def tile_sides(n: int, m: int, area: int) -> tuple[int, int]:
    """Rows and columns of tiles of at most ``area`` pairs that cover n x m: as square as n and m
    allow, and of about equal size.
    """
    rows = _equal_parts(n, max(16, min(n, isqrt(area))))
    columns = _equal_parts(m, max(64, min(m, area // rows)))
    return _equal_parts(n, max(16, min(n, area // columns))), columns


def _equal_parts(whole: int, most: int) -> int:
    """The length of about equal parts, none above ``most``, in whole WHOLEs if they are longer."""
    most -= most % WHOLE if most > WHOLE else 0
    part = -(-whole // -(-whole // most)) if whole else most
    return -(-part // WHOLE) * WHOLE if part > WHOLE else max(part, 1)


class ExchangeSchedule:
    """``rows`` and ``pairs``: the chunks of both kinds of anchors that a round goes through, in
    the same order.
    """

    def __init__(
        self,
        context: ForwardContext,
        sources: list[CandidateBlock],
        positives: Positives,
        columns: SymmetricTerm | None,
        budget: int,
    ) -> None:
        self.context, self.sources, self.positives, self.columns = (
            context,
            sources,
            positives,
            columns,
        )
        self.kept: dict[tuple[int, int, int, int], Tile] = {}
        self.kept_bytes = 0
        n, blocks = (
            context.rows,
            [(source, rule) for source in sources for _, rule in source.blocks],
        )
        width = max(1, sum(source.count for source, _ in blocks))
        pair_bytes = max(self._pair_bytes(rule, True) for _, rule in blocks)
        at_once = budget // (width * pair_bytes)
        # Of several positives a row each may be an anchor, and a chunk of few rows have many.
        several = context.inputs.wanted is not None and positives.anchors is not None
        keeps = all(
            context.engine.kept_bytes(rule, context.queries.operand.dtype) for _, rule in blocks
        )
        self.one_pass = (
            context.exchange.materializes_all
            and columns is None
            and not several
            and keeps
            and at_once >= min(n, FEWEST_ROWS)
        )
        if self.one_pass:
            self.room, self.tile_columns = float("inf"), width
            self.rows = cut(0, n, max(at_once, 1)) or [slice(0, 0)]
        else:
            # Half of the budget for the tile at work, half for tiles that wait for their gradient.
            self.room = budget // 2
            step, self.tile_columns = tile_sides(
                n, max(source.count for source in sources), max(1, self.room // pair_bytes)
            )
            self.rows = cut(0, n, step) or [slice(0, 0)]
        self.at_once = self.tile_columns >= max(
            source.count for source in sources
        )  # each shard is one tile

    def _pair_bytes(self, rule: MaskConfig, cached: bool) -> int:
        return self.context.engine.pair_bytes(rule, cached, self.context.queries.operand.dtype)

    def statistics(self) -> None:
        """Of all rows and columns; where one pass does it, gradients too."""
        positives = self.positives
        if self.one_pass:
            for rows, of_rows in zip(self.rows, positives.pairs.of_chunks(self.rows), strict=True):
                self._statistics([rows], [of_rows])
                positives.complete(rows, of_rows)
                self._gradient([rows], [of_rows])
        else:
            self.pairs = (
                self.rows
                if not positives.pairs.listed
                else cut(0, positives.pairs.count, max(1, self.rows[0].stop))
            )
            self._statistics(self.rows, self.pairs)

    def gradients(self) -> None:
        """All denominators are complete."""
        if not self.one_pass:
            self._gradient(self.rows, self.pairs)

    def complete(self) -> None:
        """After the statistics of all ranks, where one pass has not done it."""
        if not self.one_pass:
            for rows, of_rows in zip(
                self.rows, self.positives.pairs.of_chunks(self.rows), strict=True
            ):
                self.positives.complete(rows, of_rows)

    def _statistics(self, rows: list[slice], pairs: list[slice]) -> None:
        context, engine = self.context, self.context.engine
        dtype = context.queries.operand.dtype
        for s, source in enumerate(self.sources):
            for shard in source.vectors.shards(at_once=self.at_once):
                for part in cut(0, len(shard.vectors), self.tile_columns):
                    columns = source.columns(shard, part)
                    here = slice(shard.start + part.start, shard.start + part.stop)
                    for b, (anchors, rule) in enumerate(source.blocks):
                        for chunk in not_empty(pairs if anchors.by_pair else rows):
                            a_pair = engine.kept_bytes(rule, dtype)
                            size = (chunk.stop - chunk.start) * (part.stop - part.start) * a_pair
                            cached = (
                                context.any_gradient
                                and a_pair > 0
                                and self.kept_bytes + size <= self.room
                            )
                            tile = engine.tile(some(anchors.side, chunk), columns, rule, cached)
                            found = tile.statistics()
                            anchors.merge(chunk, found)
                            if self.columns is not None and rule.columns:
                                self.columns.merge(here, found)
                            if cached:
                                self.kept[s, b, here.start, chunk.start] = tile
                                self.kept_bytes += size

    def _gradient(self, rows: list[slice], pairs: list[slice]) -> None:
        context, positives = self.context, self.positives
        if not context.any_gradient:
            return
        whole = slice(pairs[0].start, pairs[-1].stop) if pairs else slice(0, 0)
        latest = positives.query_coefficients[len(positives.query_coefficients) - len(rows) :]
        coefficients = {
            (False, chunk.start): of_chunk for chunk, of_chunk in zip(rows, latest, strict=True)
        }
        if positives.anchors is not None:
            coefficients |= {
                (True, chunk.start): positives.anchor_coefficients(chunk) for chunk in pairs
            }
        if context.inputs.wanted is not None:
            positives.make_positive_grad()
        for s, source in enumerate(self.sources):
            for shard in source.vectors.shards(
                accumulate=source.vectors.needed, at_once=self.at_once
            ):
                for part in cut(0, len(shard.vectors), self.tile_columns):
                    columns = source.columns(shard, part)
                    here = slice(shard.start + part.start, shard.start + part.stop)
                    for b, (anchors, rule) in enumerate(source.blocks):
                        for chunk in not_empty(pairs if anchors.by_pair else rows):
                            side, of_tile = (
                                some(anchors.side, chunk),
                                self._of_tile(
                                    coefficients[anchors.by_pair, chunk.start], rule, here
                                ),
                            )
                            tile = self.kept.pop(
                                (s, b, here.start, chunk.start), None
                            ) or context.engine.tile(side, columns, rule, False)
                            found = tile.gradient(of_tile)
                            d_columns = None if shard.gradient is None else shard.gradient[part]
                            first = 0
                            for end, weight in zip(context.prefixes, found.weights, strict=True):
                                if anchors.gradient is not None:
                                    add_product(
                                        anchors.gradient[chunk, first:end],
                                        weight,
                                        columns.vectors[:, first:end],
                                    )
                                if d_columns is not None:
                                    add_product(
                                        d_columns[:, first:end],
                                        weight.T,
                                        side.vectors[:, first:end],
                                    )
                                first = end
                            self._add_sums(source, anchors, rule, chunk, here, found)
                if source is self.sources[0] and context.inputs.wanted is not None:
                    positives.add_gradient(shard, whole)
        self.kept_bytes = 0

    def _of_tile(self, of_rows: Coefficients, rule: MaskConfig, here: slice) -> Coefficients:
        if self.columns is None or not rule.columns:
            return of_rows
        log, negative_grad = (
            self.columns.log_negatives[:, here],
            self.columns.negative_grad[:, here],
        )
        return replace(
            of_rows,
            column_log_negatives=log.contiguous(),
            column_negative_grad=negative_grad.contiguous(),
        )

    def _add_sums(
        self,
        source: CandidateBlock,
        anchors: QueryBlock,
        rule: MaskConfig,
        chunk: slice,
        here: slice,
        found: Gradient,
    ) -> None:
        if rule.moments:
            per_row = self.context.needs.temperature and not self.context.one_temperature
            anchors.add_sums(chunk, found, per_row)
            if source.vectors.needed and len(self.context.prefixes) > 1:
                source.vectors.add_moment(here, found.column_moment)
        if self.columns is not None and rule.columns:
            self.columns.add(here, found)


def not_empty(chunks: list[slice]) -> list[slice]:
    """A rank without rows has a chunk of none, and no tile."""
    return [chunk for chunk in chunks if chunk.stop > chunk.start]
