"""What the launcher's environment variables say of this process, read without importing torch.

torchrun's names are the ones that everything reads. srun and the two families of mpirun have names
of their own for the same facts, which are translated once, at the start of a command.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

from sailplan.errors import ConfigurationError

START = "SAILPLAN_START"  # which start of the ranks this is, in a store that outlives them
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPI: dict[str, tuple[str, str, str, str]] = {
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


def fill_in_launcher() -> None:
    """Fill in torchrun's variables where srun or mpirun started the tasks; do nothing elsewhere.

    Raises ConfigurationError where the first node's name, or a rank's place on its node, is not
    to be known.
    """
    if "RANK" not in os.environ:
        os.environ |= _of_slurm(os.environ) or _of_mpi(os.environ)


def _of_slurm(found: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables of a task of srun; nothing where its step has one task, or in
    a batch script, which is no step.
    """
    if int(found.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    counts, node = (
        tasks_of_nodes(found.get("SLURM_STEP_TASKS_PER_NODE", "")),
        int(found.get("SLURM_NODEID", "0")),
    )
    filled = {
        "RANK": found["SLURM_PROCID"],
        "WORLD_SIZE": found["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": found["SLURM_LOCALID"],
        "MASTER_ADDR": found.get("MASTER_ADDR") or first_node(found.get("SLURM_STEP_NODELIST", "")),
        "MASTER_PORT": found.get("MASTER_PORT")
        or str(20000 + int(found.get("SLURM_JOB_ID", "0")) % 20000),
    }
    if not filled["MASTER_ADDR"]:
        raise ConfigurationError(
            "MASTER_ADDR: not set, and srun names no nodes, expected the first node's name; export "
            "it (launch/slurm.sbatch does)"
        )
    return filled | ({"LOCAL_WORLD_SIZE": str(counts[node])} if node < len(counts) else {})


def _of_mpi(found: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables of a process of mpirun; nothing where there is only one."""
    for launcher, names in MPI.items():
        if int(found.get(names[1], "1")) == 1:
            continue
        lacking = [name for name in names if name not in found]
        if lacking:
            raise ConfigurationError(
                f"{lacking[0]}: not set by {launcher}'s mpirun, expected beside {names[1]}; export "
                "RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE for each process, or use "
                "launch/torchrun.sh"
            )
        filled = dict(zip(NAMES, (found[name] for name in names), strict=True))
        one_node = filled["WORLD_SIZE"] == filled["LOCAL_WORLD_SIZE"]
        address = found.get("MASTER_ADDR") or ("127.0.0.1" if one_node else "")
        if not address:
            raise ConfigurationError(
                f"MASTER_ADDR: not set under {launcher}'s mpirun on several nodes, expected the "
                "first node's name; export it for all (Open MPI: mpirun -x MASTER_ADDR=NODE)"
            )
        return filled | {
            "MASTER_ADDR": address,
            "MASTER_PORT": found.get("MASTER_PORT", "29500"),
        }
    return {}


def first_node(nodes: str) -> str:
    """Return the first name of Slurm's list of nodes: "gpu[07-09,12],login" is "gpu07"."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""


def tasks_of_nodes(text: str) -> list[int]:
    """Return Slurm's number of tasks on each node: "2(x3),1" is 2, 2, 2, 1; empty if unreadable."""
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            return []
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def world_size_from_environment() -> int:
    """Return the number of processes of this launch; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size(world_size: int) -> int:
    """Return the number of ranks on this host; all of the world where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def local_rank() -> int:
    """Return this rank's number on its host; 0 where the launcher does not say."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def node_count(world_size: int) -> int:
    """Return the nodes of the world, from the launcher's LOCAL_WORLD_SIZE; 1 without it, or
    where it does not divide the world.
    """
    local = local_world_size(world_size)
    return world_size // local if 0 < local <= world_size and world_size % local == 0 else 1


def is_main_by_environment() -> bool:
    """Return whether this is the launch's first process, or the only one; for work that needs
    one process and no group.
    """
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def host_name() -> str:
    """Return the name of this host as its scheduler knows it, so that it can be excluded by it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
