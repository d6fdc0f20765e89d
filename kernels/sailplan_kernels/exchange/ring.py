"""Shards travel round a ring, and their gradients after them: O(local) memory.

Step t: this rank works on the shard of the rank t places before it, while that shard is already on
its way to the next rank. In a round that carries gradients, a shard's gradient follows one step
behind: this rank adds its own part to what arrives and sends it on; after the last step every
gradient is one place before its owner, and goes home. Bytes per
rank: 2(W-1)mD a round in the vectors' half precision, 4WmD for the gradient in fp32; memory: two
shards, three gradients.

Every message of a step is posted in one batch (a send to the next rank, a receive from the one
before), in the same order on all ranks: no order of arrival can lock the ring. Peers are the
group's ranks translated to global ones. The order of summation starts behind each shard's owner, so
sums equal those of AllGather up to rounding.

A grid (grid.py) is this ring with several ranks at each of its stops, who show each other what has
arrived.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from sailplan_kernels.exchange.all_gather import AllGather
from sailplan_kernels.exchange.base import Exchange, Shard, Stream
from sailplan_kernels.exchange.local import Local


class Ring(AllGather):
    """Exchange over a process group (None: the default group); only the stream of embeddings
    goes round the ring.
    """

    materializes_all = False
    row: Exchange = Local()  # who stands at the same stop

    def stream(self, x: Tensor, sizes: list[int], accumulate: torch.dtype) -> Stream:
        return _Travelling(self, x.detach().contiguous(), sizes, accumulate)


class _Travelling:
    def __init__(
        self, exchange: Ring, x: Tensor, sizes: list[int], accumulate: torch.dtype
    ) -> None:
        self.exchange, self.x, self.sizes, self.accumulate = exchange, x, sizes, accumulate
        group = exchange.group or dist.distributed_c10d._get_default_group()
        ranks, rank, self.row = exchange.world_size, exchange.rank, exchange.row
        self.next = dist.get_global_rank(group, (rank + self.row.world_size) % ranks)
        self.before = dist.get_global_rank(group, (rank - self.row.world_size) % ranks)
        self.home: Tensor | None = None

    def shards(self, accumulate: bool = False) -> Iterator[Shard]:
        ranks, rank, width = self.exchange.world_size, self.exchange.rank, self.row.world_size
        current = self.x
        arriving: Tensor | None = None
        following: list[dist.Work] = []
        for step in range(0, ranks, width):
            owner, coming = (rank - step) % ranks, (rank - step - width) % ranks
            first = owner - self.row.rank
            # A stop without rows has nothing to show, and all who stand there know it.
            row = self.row if any(self.sizes[first : first + width]) else Local()
            shown = row.stream(current, self.sizes[first : first + width], self.accumulate)
            ahead = self._empty(coming, self.x.dtype) if step + width < ranks else None
            travelling = self._post(current, ahead) if ahead is not None else []
            start = sum(self.sizes[:first])
            yield from (
                Shard(start + s.start, s.vectors, s.gradient)
                for s in shown.shards(accumulate)
                if len(s.vectors)
            )
            if accumulate:
                mine = shown.finish()
                _wait(following)
                if arriving is not None:
                    mine += arriving
                arriving = None  # its memory, before the next one takes its own
                arriving = (
                    mine if ranks == width else self._empty(coming, self.accumulate)
                )  # the last to come is this rank's own
                following = self._post(mine, arriving) if ranks > width else []
            _wait(travelling)
            del shown  # likewise
            if ahead is not None:
                current = ahead
        if accumulate:
            _wait(following)
            self.home = arriving

    def finish(self) -> Tensor:
        return torch.zeros_like(self.x, dtype=self.accumulate) if self.home is None else self.home

    def _empty(self, owner: int, dtype: torch.dtype) -> Tensor:
        return self.x.new_empty((self.sizes[owner], *self.x.shape[1:]), dtype=dtype)

    def _post(self, outgoing: Tensor, incoming: Tensor) -> list[dist.Work]:
        """One batch: to the next rank, from the one before; both ends know the sizes and leave
        out what is empty.
        """
        group = self.exchange.group
        messages = []
        if outgoing.numel():
            messages.append(dist.P2POp(dist.isend, outgoing, self.next, group))
        if incoming.numel():
            messages.append(dist.P2POp(dist.irecv, incoming, self.before, group))
        return dist.batch_isend_irecv(messages) if messages else []


def _wait(works: list[dist.Work]) -> None:
    """And let go of the tensors that they hold."""
    while works:
        works.pop().wait()
