"""How ranks show each other their embeddings: one interface, several ways."""

from sailplan_kernels.exchange.all_gather import AllGather
from sailplan_kernels.exchange.base import Exchange, Shard, Stream
from sailplan_kernels.exchange.grid import Grid
from sailplan_kernels.exchange.local import Local
from sailplan_kernels.exchange.ring import Ring
from sailplan_kernels.exchange.row_split import RowSplit
from sailplan_kernels.exchange.symmetric_memory import SymmetricMemory

# Name in configuration files -> class, which takes a process group. Those that run everywhere, and
# all.
EXCHANGES: dict[str, type[AllGather]] = {"all_gather": AllGather, "ring": Ring, "grid": Grid}
ALL_EXCHANGES: dict[str, type[AllGather]] = {**EXCHANGES, "symmetric_memory": SymmetricMemory}

__all__ = [
    "ALL_EXCHANGES",
    "EXCHANGES",
    "AllGather",
    "Exchange",
    "Grid",
    "Local",
    "Ring",
    "RowSplit",
    "Shard",
    "Stream",
    "SymmetricMemory",
]
