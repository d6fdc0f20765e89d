"""A real Slurm on one machine: a controller and several node daemons, with a munge of their own.

Everything lies in one folder and listens on free ports; the machine's own Slurm, if there is one,
is not touched. Needs root, and Debian's packages slurm-wlm and munge.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hosts import environment

DAEMONS = ("munged", "slurmctld", "slurmd")
CONF = """ClusterName=sailplan
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=5
MinJobAge=600
SlurmctldPort={port}
"""


def why_not() -> str:
    """Return why this machine cannot run a Slurm, "" where it can."""
    if os.geteuid() != 0:
        return "starting a Slurm needs root"
    missing = [name for name in DAEMONS if shutil.which(name, path="/usr/sbin:/usr/bin") is None]
    return f"{missing[0]} is not installed: make cluster-packages" if missing else ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Slurm:
    """A running Slurm with nodes n0, n1, ..."""

    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def variables(self) -> dict[str, str]:
        return environment() | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(
        self, *line: str, cwd: Path | None = None, seconds: float = 60, **variables: str
    ) -> str:
        """Return what one of Slurm's commands prints."""
        found = subprocess.run(
            line,
            env=self.variables | variables,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert found.returncode == 0, (line, found.stdout, found.stderr)
        return found.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows of a job."""
        words = self.call("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Return when the condition holds; fail the test where it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{self.logs()}"
            time.sleep(0.2)

    def start_again(self, number: str) -> None:
        """Shorten the two minutes for which Slurm holds a job that was put back."""
        self.wait("pending", lambda: self.job(number)["JobState"] == "PENDING", 60)
        time.sleep(6)  # nodes have revoked the former start's credential, and would revoke this one
        self.wait("started again", lambda: self._begun(number), 60)

    def _begun(self, number: str) -> bool:
        if self.job(number)["JobState"] != "PENDING":
            return True
        subprocess.run(
            ["scontrol", "update", f"JobId={number}", "StartTime=now"],
            env=self.variables,
            capture_output=True,
            check=False,
        )
        time.sleep(0.5)
        return False

    def kill_node(self, name: str) -> None:
        """End a node's daemon and all processes of its tasks at once: a lost node."""
        pids = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                variables = (place / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"SLURMD_NODENAME={name}".encode() in variables and (
                f"SLURM_CONF={self.folder}/slurm.conf".encode() in variables
            ):
                pids.append(int(place.name))
        pids.append(int((self.folder / f"slurmd-{name}.pid").read_text()))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def logs(self) -> str:
        return "\n".join(path.read_text()[-1500:] for path in sorted(self.folder.glob("*.log")))


@contextmanager
def slurm(nodes: int) -> Iterator[Slurm]:
    """Start a Slurm of so many nodes; end it, and everything that it started, at the end."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    cluster, host = Slurm(folder), socket.gethostname().partition(".")[0]
    lines = [CONF.format(host=host, folder=folder, port=free_port())]
    for number in range(nodes):
        name = f"n{number}"
        (folder / f"spool-{name}").mkdir()
        place = f"NodeHostName={host} NodeAddr=127.0.0.1 Port={free_port()}"
        lines.append(f"NodeName={name} {place} CPUs={os.cpu_count()} RealMemory=1000\n")
    lines.append(
        f"PartitionName=ci Nodes=n[0-{nodes - 1}] Default=YES MaxTime=INFINITE State=UP "
        "OverSubscribe=FORCE:4\n"
    )
    (folder / "slurm.conf").write_text("".join(lines))
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    try:
        munge = [f"--{part}-file={folder}/munge.{part}" for part in ("key", "pid", "log", "seed")]
        _daemon(
            cluster, "munged", "--foreground", "--force", *munge, f"--socket={folder}/munge.socket"
        )
        cluster.wait("munge", (folder / "munge.socket").exists, 20)
        _daemon(cluster, "slurmctld", "-D", "-c")
        for number in range(nodes):
            _daemon(cluster, "slurmd", "-D", "-N", f"n{number}")
        cluster.wait("idle nodes", lambda: _idle(cluster) == nodes, 40)
        yield cluster
    finally:
        for daemon in reversed(cluster.daemons):
            daemon.terminate()
        _end_all(cluster)
        shutil.rmtree(folder, ignore_errors=True)


def _daemon(cluster: Slurm, name: str, *arguments: str) -> None:
    path = shutil.which(name, path="/usr/sbin:/usr/bin")
    with open(cluster.folder / f"{name}.out", "ab") as out:
        line = [str(path), *arguments]
        cluster.daemons.append(
            subprocess.Popen(line, env=cluster.variables, stdout=out, stderr=out)
        )


def _idle(cluster: Slurm) -> int:
    found = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%T"],
        env=cluster.variables,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.split().count("idle")


def _end_all(cluster: Slurm) -> None:
    """Kill what is left of the daemons, and of the jobs' processes, which name this Slurm."""
    mark = f"SLURM_CONF={cluster.folder}/slurm.conf".encode()
    for daemon in cluster.daemons:
        try:
            daemon.wait(timeout=8)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (place / "environ").read_bytes().split(b"\0"):
                os.kill(int(place.name), signal.SIGKILL)
        except OSError:
            continue
