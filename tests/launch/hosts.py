"""Several hosts on one machine: network namespaces with addresses, host names, files of host
names and process numbers of their own, joined by a bridge in a namespace of its own.

Killing a host ends all of its processes at once, without a word to anybody: a lost node. Needs
root, and `ip` and `unshare`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENTER = """hostname "$1"; mount --bind "$2" /etc/hosts; shift 2
while [[ $1 != -- ]]; do mount --bind "$1" "$2"; shift 2; done
shift; exec "$@"
"""


def why_not() -> str:
    """Return why this machine cannot make hosts, "" where it can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is not installed: make cluster-packages"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return tried.stderr.strip() if tried.returncode else ""


@dataclass
class Host:
    """A host; `names` is its /etc/hosts."""

    name: str
    address: str
    namespace: str
    names: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(
        self,
        *command: str,
        variables: Mapping[str, str] | None = None,
        mounts: Mapping[Path, Path] | None = None,
        folder: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command here. mounts: folders of this host that lie in the place of others."""
        pairs = [str(part) for place, own in (mounts or {}).items() for part in (own, place)]
        line = [
            *("ip", "netns", "exec", self.namespace),
            *("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("bash", "-ec", ENTER, "bash", self.name, str(self.names), *pairs, "--", *command),
        ]
        process = subprocess.Popen(
            line,
            env=environment() | dict(variables or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder or ROOT,
        )
        self.processes.append(process)
        return process

    def kill(self) -> None:
        """End all processes of the host, as a power cut does."""
        for process in self.processes:
            process.kill()


def environment() -> dict[str, str]:
    """Return this process's variables without those of a launcher, with the sources' places."""
    dropped = ("NODE", "MASTER_", "PROCESSES_", "SLURM", "RDZV", "RANK", "WORLD_SIZE", "LOCAL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    sources = os.pathsep.join(str(ROOT / part) for part in ("framework", "kernels"))
    return kept | {"PYTHONPATH": sources, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@contextmanager
def hosts(count: int, *, own_name_on_loopback: Sequence[int] = ()) -> Iterator[list[Host]]:
    """Make hosts node-a, node-b, ...; remove them, and what runs on them, at the end.

    own_name_on_loopback: hosts whose own name has the address 127.0.1.1, Debian's default.
    """
    label = f"sailplan-{os.getpid()}"
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    made = [
        Host(
            f"node-{'abcdefgh'[number]}",
            f"10.77.0.{number + 1}",
            f"{label}-{number}",
            folder / str(number),
        )
        for number in range(count)
    ]
    try:
        _ip("netns", "add", label)
        _ip("-n", label, "link", "add", "br0", "type", "bridge")
        _ip("-n", label, "link", "set", "br0", "up")
        for number, host in enumerate(made):
            lines = ["127.0.0.1 localhost"]
            lines += [f"127.0.1.1 {host.name}"] if number in own_name_on_loopback else []
            lines += [f"{each.address} {each.name}" for each in made]
            host.names.write_text("\n".join(lines) + "\n")
            _ip("netns", "add", host.namespace)
            _ip(
                *f"link add v{number} netns {label} type veth peer eth0 netns {host.namespace}".split()
            )
            _ip(*f"-n {label} link set v{number} master br0 up".split())
            _ip(*f"-n {host.namespace} addr add {host.address}/24 dev eth0".split())
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")
        yield made
    finally:
        for host in made:
            host.kill()
            for process in host.processes:
                process.communicate()
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", label], capture_output=True, check=False)
        shutil.rmtree(folder)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def wait_all(processes: Sequence[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str]]:
    """Return exit code and output of each; fail the test where one does not end in time."""
    found = []
    for process in processes:
        try:
            output = process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            for one in processes:
                one.send_signal(signal.SIGKILL)
            rest = [one.communicate()[0] for one in processes]
            raise AssertionError(f"still running after {timeout} s: {rest}") from None
        found.append((process.returncode, output))
    return found
