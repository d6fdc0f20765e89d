"""Ranks stand in a grid of r rows (nodes) and c columns: shards travel down their column, and a
row shows each other what came.

A ring over nodes (ring.py) in which all ranks of a node lend a hand: each passes its own column's
shard on to the next node, and the c shards of a stop are gathered inside the node. Gradients are
summed inside the node (reduce-scatter) and follow their shard. Bytes of one rank and round, W = r c
ranks, m rows of D dimensions a rank, half precision out, fp32 back:

| exchange | across nodes, out and back | inside the node, out and back | shards and gradients in memory |
|---|---|---|---|
| grid | 2(r-1)mD, 4rmD | 2r(c-1)mD, 4r(c-1)mD | c + 2, c + 3 |
| the other way round: gather, then pass blocks on | 2(r-1)cmD, 4rcmD | 2(c-1)mD, 4(c-1)mD | 2c, 3c |
| ring, at a node's edge; the others send nothing across | 2(W-1)mD, 4WmD | | 2, 3 |
| all-gather, whatever the library's way at least | 2(r-1)mD, 4(r-1)mD | | W, W |

So this way round: no rank of a node sends across what another of it sends too, and all links of a
node are in use. In a square the memory is that of sqrt(W) shards.

A row is a node where the ranks stand on several nodes with equally many neighbours on each (seen by
host name), and otherwise as near to the square root of W as W divides. A prime W on one node gives
rows of one rank: the plain ring.
The group of a row is made once for a process group, by its own ranks and nobody else, who must have
made equally many groups before. The order of summation is another than AllGather's: results are
equal up to rounding.
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Sequence
from itertools import groupby
from weakref import WeakKeyDictionary

import torch.distributed as dist

from sailplan_kernels.exchange.all_gather import AllGather
from sailplan_kernels.exchange.local import Local
from sailplan_kernels.exchange.ring import Ring

_rows: WeakKeyDictionary[dist.ProcessGroup, dict[int, AllGather]] = WeakKeyDictionary()


class Grid(Ring):
    """Exchange over a process group (None: the default group); the stream of embeddings goes
    over the grid.

    columns: ranks of a row, a divisor of the group's size; None: see above. Making the first of a
    group is a collective.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, columns: int | None = None) -> None:
        super().__init__(group)
        if columns is None:
            columns = width_of_row(
                self.sizes(zlib.crc32(socket.gethostname().encode()))
            )  # any number of each rank's
        if columns < 1 or self.world_size % columns:
            raise ValueError(
                f"columns: found {columns}, expected a divisor of the group's {self.world_size} "
                "ranks"
            )
        self.row = Local() if columns == 1 else self._row(columns)

    def _row(self, columns: int) -> AllGather:
        group = self.group or dist.distributed_c10d._get_default_group()
        known = _rows.setdefault(group, {})
        if columns not in known:
            first = self.rank - self.rank % columns
            members = [dist.get_global_rank(group, rank) for rank in range(first, first + columns)]
            # Rows of other grids are made by other ranks, at times of their own: only members meet
            # here.
            known[columns] = AllGather(
                dist.new_group(
                    members,
                    backend=dist.get_backend_config(group),
                    use_local_synchronization=True,
                    sort_ranks=False,
                )
            )
        return known[columns]


def width_of_row(hosts: Sequence[int]) -> int:
    """Ranks of a row, from every rank's host: the node where neighbours share it in equal
    numbers, else the divisor nearest to the root.
    """
    runs = [len(list(run)) for _, run in groupby(hosts)]
    if len(runs) > 1 and len(set(runs)) == 1:
        return runs[0]
    ranks = len(hosts)
    return min(
        (c for c in range(1, ranks + 1) if ranks % c == 0), key=lambda c: abs(c - ranks**0.5)
    )
