"""How parameters lie on the ranks when the configuration leaves it open: cut inside a node,
copied over nodes.

Gathering parameters and reducing gradients over all ranks crosses the network between nodes with
every byte of the model; inside a node it does not, and between nodes each rank then sends its part
of the gradients alone.
"""

from __future__ import annotations

from sailplan.config.schema import ParallelConfig


def sharding_of(config: ParallelConfig, data_parallel: int, nodes: int) -> tuple[str, int]:
    """Return (shard, hybrid or replicate; copies of the parameters) for so many data-parallel
    ranks on so many nodes.

    `parallel.sharding=auto`: hybrid with one copy a node where there are several nodes with several
    data-parallel ranks each, else shard.
    """
    if config.sharding == "hybrid":
        return "hybrid", config.replicas
    if config.sharding != "auto":
        return config.sharding, data_parallel if config.sharding == "replicate" else 1
    if nodes > 1 and data_parallel > nodes and data_parallel % nodes == 0:
        return "hybrid", nodes
    return "shard", 1
