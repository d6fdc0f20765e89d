"""Shards travel round a ring, and their gradients after them: O(local) memory.

Step t: this rank works on the shard of the rank t places before it, while that shard is already on its way to the next
rank. In a round that carries gradients, a shard's gradient follows one step behind: this rank adds its own part to
what arrives and sends it on; after the last step every gradient is one place before its owner, and goes home. Bytes per
rank: 2(W-1)mD a round in the vectors' half precision, 4WmD for the gradient in fp32; memory: two shards, three gradients.

Every message of a step is posted in one batch (a send to the next rank, a receive from the one before), in the same
order on all ranks: no order of arrival can lock the ring. Peers are the group's ranks translated to global ones. The
order of summation starts behind each shard's owner, so sums equal those of AllGather up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from sailplan_kernels.exchange.all_gather import AllGather
from sailplan_kernels.exchange.base import Shard, Stream


class Ring(AllGather):
    """Exchange over a process group (None: the default group); only the stream of embeddings goes round the ring."""

    whole = False

    def stream(self, x: Tensor, sizes: list[int], accumulate: torch.dtype) -> Stream:
        return _Travelling(self, x.detach().contiguous(), sizes, accumulate)


class _Travelling:
    def __init__(self, exchange: Ring, x: Tensor, sizes: list[int], accumulate: torch.dtype) -> None:
        self.exchange, self.x, self.sizes, self.accumulate = exchange, x, sizes, accumulate
        group = exchange.group or dist.distributed_c10d._get_default_group()
        ranks, rank = exchange.world_size, exchange.rank
        self.next = dist.get_global_rank(group, (rank + 1) % ranks)
        self.before = dist.get_global_rank(group, (rank - 1) % ranks)
        self.starts = [sum(sizes[:r]) for r in range(ranks)]
        self.home: Tensor | None = None

    def shards(self, accumulate: bool = False) -> Iterator[Shard]:
        ranks, rank = self.exchange.world_size, self.exchange.rank
        current = self.x
        arriving: Tensor | None = None
        following: list[dist.Work] = []
        for step in range(ranks):
            owner, coming = (rank - step) % ranks, (rank - step - 1) % ranks
            ahead = self._empty(coming, self.x.dtype) if step + 1 < ranks else None
            travelling = self._post(current, ahead) if ahead is not None else []
            mine = self._empty(owner, self.accumulate).zero_() if accumulate else None
            if self.sizes[owner]:
                yield Shard(self.starts[owner], current, mine)
            if mine is not None:
                _wait(following)
                if arriving is not None:
                    mine += arriving
                sent, arriving = mine, self._empty(coming, self.accumulate)  # the last to come is this rank's own
                following = self._post(sent, arriving) if ranks > 1 else []
                if ranks == 1:
                    arriving = mine
            _wait(travelling)
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
        """One batch: to the next rank, from the one before; both ends know the sizes and leave out what is empty."""
        group = self.exchange.group
        messages = []
        if outgoing.numel():
            messages.append(dist.P2POp(dist.isend, outgoing, self.next, group))
        if incoming.numel():
            messages.append(dist.P2POp(dist.irecv, incoming, self.before, group))
        return dist.batch_isend_irecv(messages) if messages else []


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()
