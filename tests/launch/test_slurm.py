"""A real Slurm: a job survives a stopped rank, a lost node and its own early warning; an array embeds.

NIGHTLY=1 adds what takes minutes: a lost node, and srun without a launcher.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from sailplan.cli.testing import write_project
from sailplan.export.vector_folder import VectorFolder
from sailplan.train.testing import metrics

sys.path.insert(0, str(Path(__file__).parent))
from hosts import ROOT
from slurm import Slurm, slurm, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"SKIPPED, nothing ran under Slurm: {REASON}")
nightly = pytest.mark.skipif("NIGHTLY" not in os.environ, reason="takes minutes: NIGHTLY=1")
STEPS = 100
TRAIN = ("train", "experiment=small", f"stages.only.steps={STEPS}", "checkpoint.every_steps=5")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("project")
    write_project(root)
    (root / "launch").symlink_to(ROOT / "launch")
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with ExitStack() as stack:
        try:
            started = stack.enter_context(slurm(3))
        except (AssertionError, OSError) as error:  # the machine's Slurm, not what is tested here
            pytest.skip(f"SKIPPED, nothing ran under Slurm, which did not start: {error}")
        yield started


def submit(cluster: Slurm, project: Path, *command: str) -> str:
    """Submit the job script for two nodes, which are all this machine; return the job's number."""
    options = ["sbatch", "--parsable", "--nodes=2", "--output", str(project / "job-%j.txt")]
    variables = {"PYTHON": sys.executable, "MASTER_ADDR": "127.0.0.1", "GRACE": "6"}
    script = str(ROOT / "launch" / "slurm.sbatch")
    return cluster.call(*options, script, *command, cwd=project, **variables)


def reached(cluster: Slurm, project: Path, job: str, name: str, step: int) -> None:
    """Wait for a step of a run; fail the test where its job ends before."""

    def there() -> bool:
        state = cluster.job(job)["JobState"]
        assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), said(project, job)
        return any(line["step"] >= step for line in metrics(project / "runs" / name))

    cluster.wait(f"step {step}", there, 200)


def said(project: Path, job: str) -> str:
    return (project / f"job-{job}.txt").read_text()


def ranks_of(name: str) -> dict[int, int]:
    """Return the process of each rank of a run."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            variables = (place / "environ").read_bytes().split(b"\0")
            words = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((each[5:] for each in variables if each.startswith(b"RANK=")), None)
        if rank is not None and f"name={name}".encode() in words:
            found.setdefault(int(rank), int(place.name))
    return found


def back(cluster: Slurm, job: str, restarts: int, without: str = "(null)") -> None:
    """Wait until a job was put back so many times, with these nodes left out."""
    wanted = {"Restarts": str(restarts), "ExcNodeList": without}
    cluster.wait(str(wanted), lambda: cluster.job(job).items() >= wanted.items(), 200)


def finished(cluster: Slurm, project: Path, job: str, name: str) -> None:
    cluster.wait("the end", lambda: cluster.job(job)["JobState"] == "COMPLETED", 200)
    found = metrics(project / "runs" / name)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    local = [sys.executable, "-W", "ignore", "-m", "sailplan", *TRAIN, f"name={name}-local"]
    subprocess.run(local, cwd=project, check=True, capture_output=True, timeout=200)
    whole = metrics(project / "runs" / f"{name}-local")
    assert [line["data/digest"] for line in found] == [line["data/digest"] for line in whole]


def test_a_stopped_rank_and_a_warning_put_the_job_back_and_it_ends_as_a_local_run(
    cluster: Slurm, project: Path
) -> None:
    job = submit(cluster, project, *TRAIN, "name=stopped", "parallel.timeout_seconds=10")
    reached(cluster, project, job, "stopped", 8)
    os.kill(ranks_of("stopped")[1], signal.SIGSTOP)
    back(cluster, job, 1, without="n1")
    assert "nodes did not end within 6 s: ending them" in said(project, job)
    cluster.start_again(job)
    assert cluster.job(job)["NodeList"] == "n[0,2]"
    reached(cluster, project, job, "stopped", 20)
    cluster.call("scancel", "--signal=USR1", "--batch", job)  # as before the time limit
    back(cluster, job, 2, without="n1")
    assert "exit code 75: back into the queue" in said(project, job)
    cluster.start_again(job)
    finished(cluster, project, job, "stopped")
    assert not list((project / ".slurm").glob("*")), "notes of a job that is done"


def test_an_array_of_jobs_embeds_what_one_command_does(cluster: Slurm, project: Path) -> None:
    """Four parts that end in another order, one of them of an array of its own."""

    def local(*line: str) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "sailplan", *line]
        subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=200)

    local("train", "experiment=small", "name=model")
    view = ["--run-folder", "runs/model", "--dataset", "things", "--view", "item"]
    embed = ["embed", *view, "--shard-rows", "5"]
    local(*embed, "--out", "whole")
    command = [str(ROOT / "launch" / "slurm.sbatch"), *embed, "--out", "parts"]
    options = ["sbatch", "--parsable", "--output", str(project / "task-%a.txt")]
    variables = {"PYTHON": sys.executable, "MASTER_ADDR": "127.0.0.1"}
    array = cluster.call(*options, "--hold", "--array=0-3", *command, cwd=project, **variables)

    def done(*tasks: str) -> bool:
        return all(cluster.job(task)["JobState"] == "COMPLETED" for task in tasks)

    cluster.call("scancel", f"{array}_2")  # its part is done by a later job
    for task in (3, 0):
        cluster.call("scontrol", "release", f"{array}_{task}")
    cluster.wait("two parts", lambda: done(f"{array}_3", f"{array}_0"), 200)
    cluster.call("scontrol", "release", f"{array}_1")
    cluster.wait("the third part", lambda: done(f"{array}_1"), 100)
    assert not (project / "parts" / "embeddings.json").exists()
    assert "2/4" in (project / "task-1.txt").read_text()
    again = cluster.call(*options, "--array=2", *command, cwd=project, PARTS="4", **variables)
    cluster.wait("the last part", lambda: done(f"{again}_2"), 100)
    wholes, parts = VectorFolder(project / "whole"), VectorFolder(project / "parts")
    names = ["embeddings.json", *(path.name for path in (project / "whole").glob("*.txt"))]
    assert len(names) == 11
    for name in names:
        assert (project / "whole" / name).read_bytes() == (project / "parts" / name).read_bytes()
    rows = np.arange(wholes.rows)
    assert np.allclose(wholes.take(rows), parts.take(rows), atol=1e-5)


def sweep(cluster: Slurm, project: Path, name: str, *line: str) -> subprocess.Popen[bytes]:
    """Start a sweep over two seeds, whose jobs have two ranks each, by submitit."""
    command = [sys.executable, "-m", "sailplan", "train", "-m", "experiment=small", "seed=0,1"]
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2"]
    with open(project / f"{name}.txt", "wb") as out:
        return subprocess.Popen(
            [*command, *launcher, f"name={name}", "resume=auto", *line],
            cwd=project,
            env=cluster.variables,
            stdout=out,
            stderr=out,
        )


def swept(project: Path, name: str, started: subprocess.Popen[bytes], *line: str) -> None:
    """Wait for a sweep, whose runs equal local ones."""
    try:
        code = started.wait(200)
    finally:
        started.kill()
    said = (project / f"{name}.txt").read_text()
    assert code == 0 and said.count(": done") == 2, said
    for seed in (0, 1):
        local = [sys.executable, "-W", "ignore", "-m", "sailplan", "train", "experiment=small"]
        local += [f"name={name}-local-{seed}", f"seed={seed}", *line]
        subprocess.run(local, cwd=project, check=True, capture_output=True, timeout=200)
        digests = [
            [(each["step"], each["data/digest"]) for each in metrics(project / "runs" / run)]
            for run in (f"{name}-seed={seed}", f"{name}-local-{seed}")
        ]
        assert digests[0] == digests[1] and digests[0]


def test_submitit_starts_the_jobs_of_a_sweep(cluster: Slurm, project: Path) -> None:
    swept(project, "sweep", sweep(cluster, project, "sweep"))


@nightly
def test_submitit_s_early_warning_is_a_save_and_a_job_that_goes_on(
    cluster: Slurm, project: Path
) -> None:
    steps = (f"stages.only.steps={STEPS}", "checkpoint.every_steps=1000")
    started = sweep(cluster, project, "warned", *steps)
    run = project / "runs" / "warned-seed=0"
    cluster.wait("step 8", lambda: len(metrics(run)) >= 8, 200)
    queued = cluster.call("squeue", "--noheader", "--format=%i", "--name=sailplan").split()
    warned = next(job for job in queued if job.endswith("_0"))
    cluster.call("scancel", "--signal=USR2", warned)
    cluster.wait("a checkpoint", lambda: any(run.glob("checkpoints/step-*/COMPLETE")), 60)
    cluster.start_again(warned)
    swept(project, "warned", started, *steps)


@nightly
def test_a_lost_node_puts_the_job_back_without_it(cluster: Slurm, project: Path) -> None:
    job = submit(cluster, project, *TRAIN, "name=lost")
    reached(cluster, project, job, "lost", 8)
    gone = cluster.call("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()[-1]
    cluster.kill_node(gone)
    back(cluster, job, 1, without=gone)
    # As Slurm does by itself after SlurmdTimeout.
    cluster.call("scontrol", "update", f"NodeName={gone}", "State=DOWN", "Reason=lost")
    cluster.start_again(job)
    finished(cluster, project, job, "lost")


@nightly
def test_srun_alone_starts_ranks_that_find_each_other(cluster: Slurm, project: Path) -> None:
    line = ["srun", "--ntasks=2", "--nodes=1", sys.executable, "-m", "sailplan", *TRAIN]
    variables = {"MASTER_ADDR": "127.0.0.1"}
    cluster.call(*line, "name=alone", "stages.only.steps=3", cwd=project, seconds=200, **variables)
    assert len(metrics(project / "runs" / "alone")) == 3
