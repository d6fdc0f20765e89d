"""Make the exchange of vectors between ranks from this rank's place in the world."""

from __future__ import annotations

from sailplan.errors import ConfigurationError
from sailplan.runtime.process import Parallel
from sailplan_kernels.exchange import ALL_EXCHANGES, AllGather, Local, RowSplit
from sailplan_kernels.exchange.base import Exchange


def exchange_of(parallel: Parallel, kind: str = "all_gather") -> Exchange:
    """Return the exchange over this rank's data-parallel group.

    kind: a name in ALL_EXCHANGES. Raises ConfigurationError for one that cannot work here.
    """
    if parallel.data_parallel_size == 1:
        return Local()
    try:
        return ALL_EXCHANGES[kind](parallel.data_parallel_group)
    except ValueError as error:
        raise ConfigurationError(f"parallel.exchange={kind}: {error}") from error


def training_exchange(parallel: Parallel, kind: str) -> Exchange:
    """Return `exchange_of`, with the rows of a loss split among tensor-parallel peers, who hold
    the same embeddings.
    """
    exchange = exchange_of(parallel, kind)
    return (
        exchange
        if parallel.tensor_parallel_size == 1
        else RowSplit(exchange, AllGather(parallel.tensor_parallel_group))
    )
