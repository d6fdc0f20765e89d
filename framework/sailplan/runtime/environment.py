"""What the launcher's environment variables say of this process, read without importing torch."""

from __future__ import annotations

import os

from sailplan.errors import ConfigurationError


def fill_in_slurm() -> None:
    """Fill in torchrun's variables where only srun started the tasks.

    Raises ConfigurationError where srun's say nothing of the first node's name.
    """
    if (
        "RANK" not in os.environ
        and "SLURM_PROCID" in os.environ
        and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    ):
        for name, source in (
            ("RANK", "SLURM_PROCID"),
            ("WORLD_SIZE", "SLURM_NTASKS"),
            ("LOCAL_RANK", "SLURM_LOCALID"),
        ):
            os.environ[name] = os.environ[source]
        if "MASTER_ADDR" not in os.environ:
            raise ConfigurationError(
                "MASTER_ADDR is not set under srun: export the first node's name "
                "(launch/slurm.sbatch does it)"
            )
        os.environ.setdefault("MASTER_PORT", "29500")


def world_size_from_environment() -> int:
    """Return the number of processes of this launch; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def node_count(world_size: int) -> int:
    """Return the nodes of the world, from the launcher's LOCAL_WORLD_SIZE; 1 without it, or
    where it does not divide the world.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return world_size // local if 0 < local <= world_size and world_size % local == 0 else 1


def is_main_by_environment() -> bool:
    """Return whether this is the launch's first process, or the only one; for work that needs
    one process and no group.
    """
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
