"""What each rank sees of its host, gathered once and judged by all ranks alike.

One gather of about 1 kB a rank. Clocks are compared after a barrier, which all ranks leave within
the time of a message.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from sailplan.errors import ConfigurationError
from sailplan.preflight.findings import Findings, names, size
from sailplan.preflight.gpus import GpuFacts, gpu_facts
from sailplan.runtime.agreement import differences
from sailplan.runtime.environment import host_name, local_rank
from sailplan.runtime.network import CHOSEN, interfaces, listening_address, way_to
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import from_all_ranks

ROUNDS = 5  # of comparing clocks; the middle one counts
SKEW = 0.5  # seconds; the table of a hang compares the ranks' clocks to a second
SHARED_MEMORY = 2**30  # bytes; loader workers hand their batches over there
SETTINGS = {"cpu": ("GLOO_",), "cuda": ("NCCL_", "TORCH_NCCL_", "GLOO_")}
SLOWING = {
    "NCCL_IB_DISABLE": "InfiniBand is off",
    "NCCL_P2P_DISABLE": "GPUs of a node do not reach each other directly",
    "NCCL_SHM_DISABLE": "shared memory is off",
}


@dataclass(frozen=True)
class RankFacts:
    """What a rank sees; sizes in bytes, clock in seconds after rank 0's."""

    rank: int
    host: str
    local_rank: int
    address: str
    interface: str
    descriptors: int
    free_runs: int
    free_temporary: int
    shared_memory: int
    clock: float
    settings: dict[str, str] = field(default_factory=dict)
    infiniband: dict[str, str] = field(default_factory=dict)  # device -> state of its first port
    gpu: GpuFacts | None = None


def gather_facts(parallel: Parallel, runs: Path) -> list[RankFacts]:
    """Return what every rank sees, in rank order. A collective.

    runs: a folder that exists, or that will be made below one that does.
    """
    own, address = listening_address()
    way = way_to(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    interface = own.removeprefix(f"{CHOSEN}=") if own.startswith(CHOSEN) else _interface_of(address)
    shared = Path("/dev/shm")
    facts = RankFacts(
        rank=parallel.rank,
        host=host_name(),
        local_rank=local_rank(),
        address=address or "none",
        interface=interface or (way[0] if way else "?"),
        descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        free_runs=_free(runs),
        free_temporary=_free(Path(tempfile.gettempdir())),
        shared_memory=shutil.disk_usage(shared).total if shared.is_dir() else 0,
        clock=_clock(parallel),
        settings={
            key: value
            for key, value in sorted(os.environ.items())
            if key.startswith(SETTINGS[parallel.device.type])
        },
        infiniband=_infiniband(),
        gpu=gpu_facts(parallel.device) if parallel.device.type == "cuda" else None,
    )
    found: list[RankFacts] = from_all_ranks(parallel, facts)
    return found


def _interface_of(address: str | None) -> str:
    return next((name for name, known in interfaces().items() if address in known), "")


def _free(folder: Path) -> int:
    there = next((one for one in (folder, *folder.absolute().parents) if one.is_dir()), Path("/"))
    return shutil.disk_usage(there).free


def _clock(parallel: Parallel) -> float:
    """Return by how many seconds this rank's clock is ahead of rank 0's."""
    ahead = []
    for _ in range(ROUNDS):
        parallel.barrier()
        times = torch.tensor([time.time()], dtype=torch.float64)
        first = times.clone().to(parallel.device)
        dist.broadcast(first, src=0)
        ahead.append(float(times.item() - first.item()))
    return statistics.median(ahead)


def _infiniband() -> dict[str, str]:
    ports = sorted(Path("/sys/class/infiniband").glob("*/ports/1/state"))
    found = {}
    for port in ports:
        try:
            found[port.parts[-4]] = port.read_text().strip().rpartition(": ")[2]
        except OSError:
            found[port.parts[-4]] = "cannot be read"
    return found


def judge_hosts(facts: Sequence[RankFacts], findings: Findings, needed_bytes: int) -> None:
    """Add the rows of network, clocks, descriptors, space and communication settings.

    needed_bytes: what the run's checkpoints will take.
    """
    firsts = [fact for fact in facts if fact.local_rank == 0]
    findings.add(
        "network",
        "ok" if len(firsts) > 1 else "note",
        names([f"{fact.host} {fact.address} ({fact.interface})" for fact in firsts])
        + ("" if len(firsts) > 1 else "; one host: nothing leaves it"),
    )
    _judge_clocks(firsts, findings)
    _judge_descriptors(facts, findings)
    _judge_space(firsts, findings, needed_bytes)
    _judge_settings(firsts, findings, any(fact.gpu for fact in facts))


def _judge_clocks(firsts: Sequence[RankFacts], findings: Findings) -> None:
    if len(firsts) == 1:
        return findings.add("clocks", "note", "one host: nothing to compare")
    apart = max(
        firsts, key=lambda fact: abs(fact.clock - statistics.median(f.clock for f in firsts))
    )
    spread = max(fact.clock for fact in firsts) - min(fact.clock for fact in firsts)
    if spread <= SKEW:
        return findings.add("clocks", "ok", f"{spread:.3f} s apart at most")
    return findings.add(
        "clocks",
        "warning",
        f"{spread:.1f} s apart, expected at most {SKEW} s ({apart.host} is {apart.clock:+.1f} s from "
        f"{firsts[0].host}): set them by NTP, or the table of a hang names the wrong ranks",
    )


def _judge_descriptors(facts: Sequence[RankFacts], findings: Findings) -> None:
    needed = 3 * len(facts) + 300  # connections to all ranks, mapped shards, pipes of workers
    least = min(facts, key=lambda fact: fact.descriptors)
    if least.descriptors >= needed:
        return findings.add("descriptors", "ok", f"{least.descriptors} a rank, {needed} needed")
    return findings.refuse(
        "descriptors",
        ConfigurationError(
            f"ulimit -n: found {least.descriptors} on {least.host}, expected {needed} for "
            f"{len(facts)} ranks; raise the hard limit there"
        ),
    )


def _judge_space(firsts: Sequence[RankFacts], findings: Findings, needed: int) -> None:
    def least(of: Callable[[RankFacts], int]) -> RankFacts:
        return min(firsts, key=of)

    runs = least(lambda fact: fact.free_runs)
    findings.add(
        "free space",
        "ok" if runs.free_runs >= needed else "warning",
        f"{size(runs.free_runs)} below the runs folder, checkpoints take about {size(needed)}"
        + ("" if runs.free_runs >= needed else ": free some, or lower checkpoint.keep"),
    )
    shared = least(lambda fact: fact.shared_memory)
    temporary = least(lambda fact: fact.free_temporary)
    small = shared.shared_memory < SHARED_MEMORY
    findings.add(
        "local space",
        "warning" if small else "ok",
        f"/dev/shm {size(shared.shared_memory)} on {shared.host}, {size(temporary.free_temporary)} "
        f"for temporary files on {temporary.host}"
        + ("; loader workers need more of /dev/shm (docker run --shm-size=8g)" if small else ""),
    )


def _judge_settings(firsts: Sequence[RankFacts], findings: Findings, gpus: bool) -> None:
    first = firsts[0]
    shown = ", ".join(f"{key}={value}" for key, value in first.settings.items()) or "none set"
    unlike = [
        f"{fact.host}: {line}"
        for fact in firsts
        for line in differences(first.settings, fact.settings)
        if "SOCKET_IFNAME" not in line  # interfaces may have other names on other hosts
    ]
    slow = [
        f"{key}: {meaning}" for key, meaning in SLOWING.items() if first.settings.get(key) == "1"
    ]
    down = [
        f"{fact.host}: {device} is {state}"
        for fact in firsts
        for device, state in fact.infiniband.items()
        if state != "ACTIVE"
    ]
    problems = [*unlike, *slow, *(down if gpus else [])]
    by = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if gpus else "gloo on CPUs"
    ports = f"; {len(first.infiniband)} InfiniBand devices" if first.infiniband else ""
    findings.add(
        "communication",
        "warning" if problems else "ok",
        f"{by}, {shown}{ports}" + (f"; {names(problems)}" if problems else ""),
    )
