"""Several hosts, made of network namespaces: what is refused at the start, and what goes on when a
host is lost.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sailplan.cli.testing import write_project
from sailplan.train.testing import metrics

sys.path.insert(0, str(Path(__file__).parent))
from hosts import ROOT, Host, hosts, wait_all, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(
    bool(REASON), reason=f"SKIPPED, nothing was launched on several hosts: {REASON}"
)
SECONDS = 240.0


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("project")
    write_project(root)
    yield root


def static(made: list[Host], project: Path, *command: str, local_runs: int | None = None) -> list:
    """Start the same line on all hosts; return exit code and output of each."""
    return wait_all(launched(made, project, *command, local_runs=local_runs), SECONDS)


def launched(
    made: list[Host], project: Path, *command: str, local_runs: int | None = None
) -> list[subprocess.Popen[str]]:
    """Start the same line on all hosts."""
    processes = []
    for number, host in enumerate(made):
        own = project / "runs-of-its-own"
        own.mkdir(exist_ok=True)
        (project / "runs").mkdir(exist_ok=True)
        place = {"NODES": str(len(made)), "NODE_RANK": str(number), "MASTER_ADDR": made[0].name}
        processes.append(
            host.start(
                str(ROOT / "launch" / "torchrun.sh"),
                *command,
                folder=project,
                variables=place | {"PYTHON": sys.executable},
                mounts={project / "runs": own} if number == local_runs else None,
            )
        )
    return processes


def test_what_keeps_hosts_apart_is_named_with_its_remedy(project: Path) -> None:
    """Two faults in one launch: the name stops the ranks, before the folder could."""
    with hosts(2, own_name_on_loopback=[1]) as made:
        ended = static(made, project, "train", "experiment=small")
    said = "\n".join(output for _, output in ended)
    assert [code for code, _ in ended] == [64, 64], said
    assert "host node-b: own name node-b has the address 127.0.1.1" in said, said
    assert "export GLOO_SOCKET_IFNAME=eth0" in said and "Traceback" not in said, said


def test_a_run_folder_of_each_host_is_refused_beside_all_that_is_well(project: Path) -> None:
    with hosts(2) as made:
        (first, table), (second, other) = static(
            made, project, "check", "experiment=small", local_runs=1
        )
    said = (table + other).splitlines()
    assert (first, second) == (64, 64), said
    line = "runs=runs: runs is not one folder for all hosts: rank 1 (node-b) does not see a file"
    assert sum(line in each and "sailplan: check: 1 problem" in each for each in said) == 1, said
    rows = {line.split("  ")[0]: line for line in table.splitlines()}
    assert "check" in rows and not any(line.startswith("network") for line in other.splitlines())
    assert "node-a 10.77.0.1 (eth0), node-b 10.77.0.2 (eth0)" in rows["network"], table
    assert "node-a - node-b" in rows["bandwidth"], table
    for what in ("clocks", "descriptors", "free space", "bandwidth", "data set things"):
        assert " ok " in rows[what], table


def test_the_survivor_of_a_lost_host_goes_on_and_has_each_step_once(project: Path) -> None:
    run = project / "runs" / "elastic"
    variables = {"NODES": "1:2", "RENDEZVOUS": "node-a:29400", "WAIT": "4", "SILENCE": "3"}
    line = ["train", "experiment=small", "name=elastic", "stages.only.steps=60"]
    with hosts(2) as made:
        processes = [
            host.start(
                str(ROOT / "launch" / "elastic.sh"),
                *line,
                "checkpoint.every_steps=5",
                folder=project,
                variables=variables | {"PYTHON": sys.executable},
            )
            for host in made
        ]
        deadline = time.monotonic() + SECONDS
        while not any(line["step"] >= 12 for line in metrics(run)):
            assert time.monotonic() < deadline and processes[0].poll() is None
            time.sleep(0.05)
        made[1].kill()
        (code, output), _ = wait_all(processes, SECONDS)
    assert code == 0, output
    assert "rank 1 (node-b), which said nothing before" in output, output
    found = metrics(run)
    assert [line["step"] for line in found] == list(range(1, 61))
    local = ["train", "experiment=small", "name=local", "stages.only.steps=60"]
    command = [sys.executable, "-W", "ignore", "-m", "sailplan", *local]
    subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=SECONDS)
    assert [line["data/digest"] for line in found] == [
        line["data/digest"] for line in metrics(project / "runs" / "local")
    ]


@pytest.mark.skipif(
    "NIGHTLY" not in os.environ, reason="SKIPPED, four hosts: run by make test-nightly"
)
def test_four_hosts_train_as_one_process_does_and_a_lost_one_ends_all(project: Path) -> None:
    line = ["train", "experiment=small", "stages.only.steps=40", "checkpoint.every_steps=5"]
    run = project / "runs" / "four"
    with hosts(4) as made:
        ended = static(made, project, *line, "name=four")
        assert [code for code, _ in ended] == [0] * 4, ended
        command = [sys.executable, "-W", "ignore", "-m", "sailplan", *line, "name=one"]
        subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=SECONDS)
        digests = [
            [each["data/digest"] for each in metrics(folder)]
            for folder in (run, project / "runs" / "one")
        ]
        assert digests[0] == digests[1] and len(digests[0]) == 40
        lost = project / "runs" / "lost"
        processes = launched(made, project, *line, "name=lost", "stages.only.steps=100000")
        deadline = time.monotonic() + SECONDS
        while not any(each["step"] >= 3 for each in metrics(lost)):
            assert time.monotonic() < deadline and processes[0].poll() is None
            time.sleep(0.05)
        made[2].kill()
        began = time.monotonic()
        ended = wait_all([processes[number] for number in (0, 1, 3)], SECONDS)
    said = "\n".join(output for _, output in ended)
    assert [code for code, _ in ended] == [70] * 3, said
    assert time.monotonic() - began < 40, said
    assert said.count("rank 2 (node-c), which said nothing before") == 1, said
    assert "Traceback" not in said, said
