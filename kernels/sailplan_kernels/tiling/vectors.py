"""The embeddings of a step, each tensor once: what products read, what ranks show each other,
and where gradients gather.

A tensor may be the queries of one pattern and the keys of another. It is brought into the form that
matrix products read once, travels once, and its gradient comes home and is finished once, whatever
the number of losses that look at it. Small tensors lie one after the other in one buffer, so that
what is done to each row is one operation for all of them.

Ranks show each other everything in ONE collective, and the gradients of what was shown come home in
one. Where the exchange keeps no whole (ring, grid), vectors travel as a stream instead and only
what belongs to a row is gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from sailplan_kernels.exchange import Exchange
from sailplan_kernels.exchange.base import Gathering, Shard, Stream
from sailplan_kernels.tiling.normalize import inverse_norms, normalized_gradient_, operand

JOINED = 4  # tensors that together take less than a budget's fourth are joined


class Layout:
    """Where each rank's rows are among everybody's: at multiples of the longest where the
    exchange keeps a whole, else side by side.
    """

    def __init__(self, sizes: Sequence[int], exchange: Exchange) -> None:
        self.sizes, self.rank = list(sizes), exchange.rank
        self.longest = max(sizes)
        padded = exchange.materializes_all
        self.starts = (
            [rank * self.longest for rank in range(len(sizes))]
            if padded
            else [0, *accumulate(sizes)][:-1]
        )
        self.total = len(sizes) * self.longest if padded else sum(sizes)
        self.compact = not padded and any(size != self.longest for size in sizes)

    @property
    def start(self) -> int:
        """Of this rank's rows."""
        return self.starts[self.rank]

    def padded(self, x: Tensor, value: int = 0) -> Tensor:
        """This rank's rows, filled up to the longest rank's."""
        missing = self.longest - len(x)
        return torch.cat([x, x.new_full((missing, *x.shape[1:]), value)]) if missing else x

    def rows(self, gathered: Tensor) -> Tensor:
        """[total, ...] from [ranks * longest, ...]."""
        if not self.compact:
            return gathered
        return torch.cat(
            [
                part[:size]
                for part, size in zip(gathered.split(self.longest), self.sizes, strict=True)
            ]
        )


class Vectors:
    """n rows of D dimensions, of which P prefixes are looked at; ``scores``: dtype of norms and
    moments.
    """

    def __init__(
        self,
        x: Tensor,
        valid: Tensor | None,
        prefixes: tuple[int, ...],
        scores: torch.dtype,
        dtype: torch.dtype,
        gradients: torch.dtype,
    ) -> None:
        self.x, self.valid, self.prefixes, self.scores, self.dtype, self.gradients = (
            x,
            valid,
            prefixes,
            scores,
            dtype,
            gradients,
        )
        self.uses = 0  # of losses
        self.operand = self.norms = x  # set by ``prepare``
        self.scale: Tensor | None = None  # [n] by what rows were multiplied
        self.group: _Group
        self.here = slice(0, len(x))  # in the group
        # Of those that all ranks see:
        self.layout: Layout | None = None
        self.needed = False  # whether any rank needs their gradient
        self.whole: Tensor | None = None  # [total, D]
        self.whole_norms: Tensor | None = None  # [P, total]
        self.whole_gradient: Tensor | None = None
        self.whole_moment: Tensor | None = None  # [P, total] sum of G * cosine
        self.stream: Stream | None = None
        self.exchange: Exchange
        self.waiting: _Sent | None = None

    def also_invalid(self, valid: Tensor | None) -> None:
        """Another loss looks at them, to which other rows are padding: only what is padding to
        all is.
        """
        self.valid = None if self.valid is None or valid is None else self.valid | valid

    def show(self, exchange: Exchange, sizes: Sequence[int], needed: bool) -> None:
        """All ranks are to see them."""
        self.layout, self.exchange = Layout(sizes, exchange), exchange
        self.needed = self.needed or needed

    # ---------------------------------------------------------------- own rows
    @property
    def gradient(self) -> Tensor:
        """[n, D] sum so far, of the operand."""
        return self.group.gradient_of(self)

    @property
    def moment(self) -> Tensor:
        """[P, n] sum so far of G * cosine."""
        return self.group.moment_of(self)

    # ---------------------------------------------------------------- everybody's
    def shards(self, accumulate: bool = False, at_once: bool = False) -> Iterator[Shard]:
        """One round over all ranks' rows, own rows first; ``at_once``: in one piece, where they
        are whole.
        """
        assert self.layout is not None
        if not self.exchange.materializes_all:
            assert self.stream is not None
            yield from self.stream.shards(accumulate)
            return
        if accumulate and self.whole_gradient is None:
            shape = (self.layout.total, self.operand.shape[1])
            alone = self.exchange.world_size == 1
            self.whole_gradient = (
                self.gradient
                if alone
                else torch.zeros(shape, dtype=self.gradients, device=self.operand.device)
            )
        start, stop, total = (
            self.layout.start,
            self.layout.start + len(self.operand),
            self.layout.total,
        )
        own, longest = (start, stop), self.layout.longest
        for first, last in (
            ((0, total),) if at_once else (own, (0, start), (start + longest, total))
        ):
            if last > first:
                vectors = self.operand if (first, last) == own else self.everyone()[first:last]
                yield Shard(
                    first,
                    vectors,
                    self.whole_gradient[first:last]
                    if accumulate and self.whole_gradient is not None
                    else None,
                )

    def everyone(self) -> Tensor:
        """[total, D], waited for."""
        self.arrive()
        assert self.whole is not None
        return self.whole

    def arrive(self) -> None:
        """Wait for what is under way."""
        if self.waiting is not None:
            self.waiting.arrive()

    def add_moment(self, here: slice, moment: Tensor) -> None:
        """[P, columns] to those of candidates ``here``."""
        assert self.layout is not None
        if self.whole_moment is None:
            if moment.shape[1] == self.layout.total:
                self.whole_moment = moment
                return
            self.whole_moment = moment.new_zeros(len(moment), self.layout.total)
        self.whole_moment[:, here] += moment


class _Group:
    """Rows that lie one after the other."""

    def __init__(self, members: list[Vectors], at_once: int) -> None:
        self.members, self.at_once = members, at_once
        first = members[0]
        if len(members) > 1:
            self.operand, start = torch.cat([v.operand for v in members]), 0
            for v in members:
                v.here = slice(start, start + len(v.operand))
                v.operand, start = self.operand[v.here], v.here.stop
        else:
            self.operand = first.operand
        self.norms = inverse_norms(self.operand, first.prefixes, first.scores)
        for v in members:
            v.group, v.norms = self, self.norms[:, v.here]
        self.gradient: Tensor | None = None
        self.moment: Tensor | None = None

    def gradient_of(self, v: Vectors) -> Tensor:
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.operand, dtype=v.gradients)
        return self.gradient[v.here] if len(self.members) > 1 else self.gradient

    def moment_of(self, v: Vectors) -> Tensor:
        if self.moment is None:
            self.moment = torch.zeros_like(self.norms)
        return self.moment[:, v.here]

    def finish(self, peers: Exchange) -> None:
        """From the operands' gradients to those of what was given, in place; sums over the peers
        of what each has done.
        """
        if self.gradient is None:
            return
        if peers.world_size > 1:
            self.gradient = peers.sum(self.gradient)
            self.moment = None if self.moment is None else peers.sum(self.moment)
        scales = [v.scale for v in self.members]
        scale = None
        if any(x is not None for x in scales):
            scale = torch.cat(
                [
                    torch.ones_like(v.norms[0]) if x is None else x
                    for v, x in zip(self.members, scales, strict=True)
                ]
            )
        normalized_gradient_(
            self.gradient,
            self.operand,
            self.norms,
            self.members[0].prefixes,
            self.moment,
            scale,
            self.at_once,
        )


def prepare(vectors: Sequence[Vectors], budget: int, at_once: int) -> list[_Group]:
    """Operands and norms of all; small ones are joined."""
    kinds: dict[tuple, list[Vectors]] = {}
    for v in vectors:
        v.operand, v.scale = operand(v.x, v.valid, v.dtype, at_once)
        kinds.setdefault((v.prefixes, v.scores, v.operand.dtype), []).append(v)
    groups = []
    for members in kinds.values():
        together = sum(v.operand.nbytes for v in members) <= budget // JOINED
        groups += (
            [_Group(members, at_once)] if together else [_Group([v], at_once) for v in members]
        )
    return groups


class _Sent:
    """Everything that this rank shows the others, on its way: vectors and their norms, and what
    losses say of rows.
    """

    def __init__(
        self, exchange: Exchange, vectors: Sequence[Vectors], notes: Sequence[Tensor]
    ) -> None:
        self.vectors, self.exchange = vectors, exchange
        parts = []
        for v in vectors:
            assert v.layout is not None
            parts += [v.layout.padded(v.operand)] if exchange.materializes_all else []
            parts.append(v.layout.padded(v.norms.T))
            v.waiting = self
        self.work: Gathering | None = exchange.gather_parts([*parts, *notes])
        if not exchange.materializes_all:
            for v in vectors:
                assert v.layout is not None
                v.stream = exchange.stream(v.operand, v.layout.sizes, v.gradients)
        self.notes: list[Tensor] = []

    def arrive(self) -> list[Tensor]:
        """Wait; the notes of all ranks, as they were gathered."""
        if self.work is not None:
            parts, self.work = iter(self.work.wait()), None
            for v in self.vectors:
                assert v.layout is not None
                v.whole = next(parts) if self.exchange.materializes_all else None
                v.whole_norms = v.layout.rows(next(parts)).T.contiguous()
                v.waiting = None
            self.notes = list(parts)
        return self.notes


def send(exchange: Exchange, vectors: Sequence[Vectors], notes: Sequence[Tensor]) -> _Sent:
    """Show the other ranks these vectors and notes: one collective, under way when this returns
    (streams start theirs).
    """
    return _Sent(exchange, vectors, notes)


def bring_home(
    exchange: Exchange, vectors: Sequence[Vectors], sums: Sequence[tuple[Tensor, Layout]]
) -> list[Tensor]:
    """Add to each rank's own rows the gradients and moments that all ranks have gathered for
    them: one collective.

    sums: [Q, total] of losses, by candidate; they come back [Q, own]. Streams bring their own
    gradients.
    """
    wanted = [v for v in vectors if v.needed]
    alone = exchange.world_size == 1
    parts: list[Tensor] = []
    for v in wanted:
        assert v.layout is not None
        if exchange.materializes_all and not alone:
            shape = (v.layout.total, v.operand.shape[1])
            whole = v.whole_gradient
            parts.append(
                torch.zeros(shape, dtype=v.gradients, device=v.operand.device)
                if whole is None
                else whole
            )
            v.whole_gradient = None
        if len(v.prefixes) > 1:
            moment = (
                v.norms.new_zeros(len(v.norms) - 1, v.layout.total)
                if v.whole_moment is None
                else v.whole_moment[:-1]
            )
            parts.append(_by_rank(moment, v.layout))
    parts += [_by_rank(x, layout) for x, layout in sums]
    found = iter(exchange.reduce_scatter_parts(parts) if parts else [])
    for v in wanted:
        assert v.layout is not None
        n = len(v.operand)
        if alone and exchange.materializes_all:
            pass  # their place is this rank's own
        else:
            home = next(found)[:n] if v.stream is None else v.stream.finish()
            if v.group.gradient is None and len(v.group.members) == 1:
                v.group.gradient = home
            else:
                v.gradient.add_(home)
        if len(v.prefixes) > 1:
            v.moment[:-1].add_(next(found)[:n].T)
            v.whole_moment = None
    return [next(found)[: layout.sizes[layout.rank]].T for _, layout in sums]


def _by_rank(x: Tensor, layout: Layout) -> Tensor:
    """[ranks * longest, Q] from [Q, total], so that each rank's part is in one piece."""
    return (
        torch.cat([layout.padded(part) for part in x.T.split(layout.sizes)])
        if layout.compact
        else x.T.contiguous()
    )
