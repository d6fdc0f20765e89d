"""Rounds over the tiles: first the statistics of all denominators, then gradients, in as much memory as the budget says.

Where a rank sees all candidates of a row at once and the engine keeps tiles, a chunk of rows sees its whole denominator: its
statistics and its gradient come out of ONE product of scores (6 NMD of matrix products). All else, as the symmetric loss and
an exchange whose shards pass by, needs two rounds: statistics of all rows and columns, then gradients (8 NMD; tiles that fit
into the memory budget are kept in between and not computed again). Their tiles are as square as the sides allow: every tile
reads and writes the gradients of its rows and of its columns, so of all tiles of one area a square moves the fewest bytes.
All Matryoshka prefixes come out of the same round: prefix p's dot product is the running sum up to its length, and each
segment's gradient product reads only its own dimensions.
"""

from __future__ import annotations

from dataclasses import replace
from math import isqrt

from sailplan_kernels.infonce.columns import Columns
from sailplan_kernels.infonce.positives import Positives
from sailplan_kernels.infonce.products import add_product
from sailplan_kernels.infonce.setting import Setting, cut, finite
from sailplan_kernels.infonce.sources import Anchors, Source, some
from sailplan_kernels.infonce.tile import Coefficients, Gradient, Rule, Tile

FEWEST_ROWS = 64  # a chunk of fewer rows is no matrix product worth its overhead: go by tiles, in two rounds
WHOLE = 128  # sides of tiles are multiples of it where they are longer, so that few blocks of a kernel or a product are ragged


def tile_sides(n: int, m: int, area: int) -> tuple[int, int]:
    """Rows and columns of tiles of at most ``area`` pairs that cover n x m: as square as n and m allow, and of about equal size."""
    rows = _equal_parts(n, max(16, min(n, isqrt(area))))
    columns = _equal_parts(m, max(64, min(m, area // rows)))
    return _equal_parts(n, max(16, min(n, area // columns))), columns


def _equal_parts(whole: int, most: int) -> int:
    """The length of about equal parts, none above ``most``, in whole WHOLEs if they are longer."""
    most -= most % WHOLE if most > WHOLE else 0
    part = -(-whole // -(-whole // most)) if whole else most
    return -(-part // WHOLE) * WHOLE if part > WHOLE else max(part, 1)


class Rounds:
    """``rows`` and ``pairs``: the chunks of both kinds of anchors that a round goes through, in the same order."""

    def __init__(self, setting: Setting, sources: list[Source], positives: Positives, columns: Columns | None) -> None:
        self.setting, self.sources, self.positives, self.columns = setting, sources, positives, columns
        self.kept: dict[tuple[int, int, int, int], Tile] = {}
        self.kept_bytes = 0

    def run(self) -> None:
        setting, positives = self.setting, self.positives
        n, blocks = len(setting.queries), [(source, rule) for source in self.sources for _, rule in source.blocks]
        width = max(1, sum(len(source.candidates.valid) for source, _ in blocks))
        at_once = setting.budget // (width * max(self._pair_bytes(rule, True) for _, rule in blocks))
        # Of several positives a row each may be an anchor, and a chunk of few rows have many.
        one_pass = setting.exchange.whole and self.columns is None and not (setting.problem.by_id and positives.anchors is not None)
        one_pass &= all(setting.engine.kept_bytes(rule, setting.queries.dtype) for _, rule in blocks)
        if one_pass and at_once >= min(n, FEWEST_ROWS):
            self.room, self.tile_columns = float("inf"), width
            chunks = cut(0, n, max(at_once, 1))
            for rows, of_rows in zip(chunks, positives.of_rows(chunks), strict=True):
                self._statistics([rows], [of_rows])
                self._gradient([rows], [of_rows], [of_rows])
            return
        # Half of the budget for the tile at work, half for tiles that wait for their gradient.
        self.room = setting.budget // 2
        area = max(1, self.room // max(self._pair_bytes(rule, True) for _, rule in blocks))
        step, self.tile_columns = tile_sides(n, max(len(source.candidates.valid) for source in self.sources), area)
        chunks, pairs = cut(0, n, step), cut(0, len(positives.pairs.rows), step)
        self._statistics(chunks, pairs)
        if self.columns is not None:
            self.columns.finish_statistics()
        self._gradient(chunks, pairs, positives.of_rows(chunks))

    def _pair_bytes(self, rule: Rule, keep: bool) -> int:
        return self.setting.engine.pair_bytes(rule, keep, self.setting.queries.dtype)

    def _statistics(self, rows: list[slice], pairs: list[slice]) -> None:
        setting, engine = self.setting, self.setting.engine
        for s, source in enumerate(self.sources):
            for shard in source.stream.shards():
                for part in cut(0, len(shard.vectors), self.tile_columns):
                    columns = source.columns(shard, part, setting.prefixes, setting.inverse)
                    here = slice(shard.start + part.start, shard.start + part.stop)
                    for b, (anchors, rule) in enumerate(source.blocks):
                        for chunk in pairs if anchors.by_pair else rows:
                            a_pair = engine.kept_bytes(rule, setting.queries.dtype)
                            size = (chunk.stop - chunk.start) * (part.stop - part.start) * a_pair
                            keep = setting.any_gradient and a_pair > 0 and self.kept_bytes + size <= self.room
                            tile = engine.tile(some(anchors.side, chunk), columns, rule, keep)
                            found = tile.statistics()
                            anchors.merge(chunk, found)
                            if self.columns is not None and rule.columns:
                                self.columns.merge(here, found)
                            if keep:
                                self.kept[s, b, here.start, chunk.start] = tile
                                self.kept_bytes += size

    def _gradient(self, rows: list[slice], pairs: list[slice], of_rows: list[slice]) -> None:
        """``of_rows``: the pairs of each chunk of rows."""
        setting, positives = self.setting, self.positives
        if not setting.any_gradient:
            return
        coefficients = {(False, chunk.start): self._coefficients(positives.queries, chunk, here) for chunk, here in zip(rows, of_rows, strict=True)}
        if positives.anchors is not None:
            coefficients |= {(True, chunk.start): self._coefficients(positives.anchors, chunk, chunk) for chunk in pairs}
        whole = slice(pairs[0].start, pairs[-1].stop) if pairs else slice(0, 0)
        for s, source in enumerate(self.sources):
            for shard in source.stream.shards(accumulate=source.needed):
                for part in cut(0, len(shard.vectors), self.tile_columns):
                    columns = source.columns(shard, part, setting.prefixes, setting.inverse)
                    here = slice(shard.start + part.start, shard.start + part.stop)
                    for b, (anchors, rule) in enumerate(source.blocks):
                        for chunk in pairs if anchors.by_pair else rows:
                            side, of_tile = some(anchors.side, chunk), coefficients[anchors.by_pair, chunk.start]
                            if self.columns is not None and rule.columns:
                                log, push = self.columns.log_negatives[:, here], self.columns.push[:, here]
                                of_tile = replace(of_tile, column_log_negatives=log.contiguous(), column_push=push.contiguous())
                            tile = self.kept.pop((s, b, here.start, chunk.start), None) or setting.engine.tile(side, columns, rule, False)
                            found = tile.gradient(of_tile)
                            d_columns = None if shard.gradient is None else shard.gradient[part]
                            first = 0
                            for end, weight in zip(setting.prefixes, found.weights, strict=True):
                                if anchors.gradient is not None:
                                    add_product(anchors.gradient[chunk, first:end], weight, columns.vectors[:, first:end])
                                if d_columns is not None:
                                    add_product(d_columns[:, first:end], weight.T, side.vectors[:, first:end])
                                first = end
                            self._add_sums(source, anchors, rule, chunk, here, found)
                if source is self.sources[0] and setting.problem.by_id:
                    positives.add_gradient(shard, whole)
        self.kept_bytes = 0

    def _coefficients(self, anchors: Anchors, chunk: slice, pairs: slice) -> Coefficients:
        return Coefficients(finite(anchors.log_negatives(chunk)).contiguous(), self.positives.push_of(anchors, chunk, pairs))

    def _add_sums(self, source: Source, anchors: Anchors, rule: Rule, chunk: slice, here: slice, found: Gradient) -> None:
        if rule.moments:
            anchors.moment[:, chunk] += found.row_moment
            source.moment[:, here] += found.column_moment
            anchors.temperature[chunk] += found.row_temperature.sum(0) / anchors.side.inverse_temperature[chunk]
        if self.columns is not None and rule.columns:
            self.columns.add(here, found)
