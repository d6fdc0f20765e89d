"""Risks: a script that does not parse, that starts something else than it says, loses an exit
code, or fails late on a missing variable.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
NODE = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-a"}


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NODE", "MASTER_", "PROCESSES_", "SLURM_", "RENDEZVOUS"))
    }
    environment = {**kept, "PYTHON": sys.executable, "SAILPLAN_DRY_RUN": "1", **variables}
    return subprocess.run(
        [str(LAUNCH / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_executable(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck() -> None:
    checked = subprocess.run(
        ["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_local_starts_n_ranks_with_arguments_untouched() -> None:
    result = run("local.sh", "3", "train", "experiment=quickstart", "name=two words", "order=[a,b]")
    line = shlex.split(result.stdout)
    assert line[:3] == [sys.executable, "-m", "sailplan.runtime.torchrun"]
    assert line[line.index("--nproc-per-node") + 1] == "3" and "--standalone" in line
    assert line[-6:] == [
        "-m",
        "sailplan",
        "train",
        "experiment=quickstart",
        "name=two words",
        "order=[a,b]",
    ]


def test_every_node_of_several_gets_its_place() -> None:
    line = shlex.split(run("torchrun.sh", "train", "seed=1", **NODE, PROCESSES_PER_NODE="8").stdout)
    options = dict(itertools.pairwise(line))
    assert [
        options[f"--{name}"]
        for name in ("nnodes", "node-rank", "nproc-per-node", "master-addr", "master-port")
    ] == ["2", "1", "8", "node-a", "29500"]
    assert line[-4:] == ["-m", "sailplan", "train", "seed=1"]


def test_preflight_checks_with_the_same_ranks() -> None:
    line = shlex.split(run("preflight.sh", "2", "experiment=quickstart").stdout)
    assert (
        line[-4:] == ["-m", "sailplan", "check", "experiment=quickstart"]
        and "--nproc-per-node" in line
    )


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "said"),
    [
        ("local.sh", [], {}, "usage: launch/local.sh N"),
        ("local.sh", ["train", "seed=1"], {}, "N is 'train'"),
        ("local.sh", ["0", "train"], {}, "N is '0'"),
        ("local.sh", ["2", "train"], {"PYTHON": "no-such-python"}, "PYTHON is 'no-such-python'"),
        ("preflight.sh", [], {}, "expected a number of processes"),
        ("torchrun.sh", ["train"], {}, "NODES is not set"),
        ("torchrun.sh", ["train"], {**NODE, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ("torchrun.sh", ["train"], {**NODE, "NODE_RANK": "2"}, "NODE_RANK is '2', expected 0..1"),
        ("torchrun.sh", ["train"], {**NODE, "NODES": "two"}, "NODES is 'two'"),
        ("torchrun.sh", [], NODE, "no command given"),
        ("elastic.sh", ["train"], {"NODES": "2:4"}, "RENDEZVOUS is not set"),
        ("elastic.sh", ["train"], {"NODES": "4:2", "RENDEZVOUS": "a:1"}, "NODES is '4:2'"),
        ("slurm.sbatch", ["train"], {}, "expected a Slurm job"),
    ],
)
def test_wrong_use_is_one_line_and_a_failure(
    script: str, arguments: list[str], variables: dict[str, str], said: str
) -> None:
    result = run(script, *arguments, **variables)
    assert result.returncode == 64
    assert result.stdout == "" and said in result.stderr and len(result.stderr.splitlines()) == 1


def test_an_exit_code_of_the_ranks_comes_through() -> None:
    paths = os.pathsep.join([str(ROOT / "framework"), str(ROOT / "kernels")])
    result = run("local.sh", "1", "no-such-command", SAILPLAN_DRY_RUN="0", PYTHONPATH=paths)
    assert result.returncode == 64, result.stderr
    assert "unknown command 'no-such-command'" in result.stderr


def slurm_commands(folder: Path, step: str) -> dict[str, str]:
    """Small commands in the place of Slurm's: `srun` runs the task here, `scontrol` names the
    node and notes a requeue.
    """
    folder.mkdir()
    (folder / "scontrol").write_text(
        "#!/bin/bash\n[[ $1 == show ]] && echo JobId=$3 ExcNodeList=node-z\n"
        f'[[ $1 == requeue ]] && echo "$2" > {folder}/requeued\n'
        f'[[ $1 == update ]] && echo "$@" >> {folder}/updates\ntrue\n'
    )
    (folder / "srun").write_text(f"#!/bin/bash\n{step}\n")
    for name in ("scontrol", "srun"):
        (folder / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node-a",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NODEID": "0",
    }
    sources = os.pathsep.join([str(ROOT / "framework"), str(ROOT / "kernels")])
    return {
        **job,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": sources,
        "JOB_NOTES_FOLDER": str(folder / "notes"),
    }


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, 0, False),
        (1, 0, False),
        (64, 0, False),
        (65, 0, False),
        (70, 0, True),
        (70, 3, False),
        (75, 3, True),
        (75, 100, False),
    ],
)
def test_slurm_passes_exit_codes_and_requeues_what_another_start_can_help(
    tmp_path: Path, code: int, restarts: int, requeued: bool
) -> None:
    commands = slurm_commands(tmp_path / "bin", f"exit {code}")
    result = run("slurm.sbatch", "train", **commands, SLURM_RESTART_COUNT=str(restarts))
    assert result.returncode == code, result.stderr
    assert (tmp_path / "bin" / "requeued").exists() == requeued
    assert ("the limit" in result.stderr) == (code in (70, 75) and not requeued)


def test_slurm_starts_each_node_through_torchrun_and_resumes(tmp_path: Path) -> None:
    step = 'shift 5; NODE_RANK=0 exec launch/torchrun.sh "$@"'  # without the shell of a task
    line = shlex.split(
        run("slurm.sbatch", "train", "name=x", **slurm_commands(tmp_path / "bin", step)).stdout
    )
    assert line[-4:] == ["sailplan", "train", "name=x", "resume=auto"], line
    assert (
        line[line.index("--master-addr") + 1] == "node-a"
        and line[line.index("--master-port") + 1] == "20007"
    )
    kept = run("slurm.sbatch", "train", "resume=never", **slurm_commands(tmp_path / "two", step))
    assert shlex.split(kept.stdout)[-1] == "resume=never"


@pytest.mark.parametrize(
    ("task", "first", "last", "count", "parts", "code", "wanted"),
    [
        (2, 0, 3, 4, "", 0, "2/4"),
        (2, 2, 2, 1, "4", 0, "2/4"),
        (2, 2, 2, 1, "", 64, "submit with --array=0-0"),
        (1, 1, 4, 4, "", 64, "submit with --array=0-3"),
    ],
)
def test_a_task_of_a_job_array_embeds_its_part(
    tmp_path: Path,
    task: int,
    first: int,
    last: int,
    count: int,
    parts: str,
    code: int,
    wanted: str,
) -> None:
    commands = slurm_commands(tmp_path / "bin", 'shift 5; NODE_RANK=0 exec launch/torchrun.sh "$@"')
    commands |= {
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_MIN": str(first),
        "SLURM_ARRAY_TASK_MAX": str(last),
        "SLURM_ARRAY_TASK_COUNT": str(count),
        "PARTS": parts,
    }
    result = run("slurm.sbatch", "embed", "--dataset", "things", **commands)
    assert result.returncode == code, result.stderr
    if code == 0:
        assert shlex.split(result.stdout)[-5:] == [
            "embed",
            "--dataset",
            "things",
            "--part",
            wanted,
        ]
    else:
        assert wanted in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_job_ends_when_a_node_does_not_follow_and_goes_on_without_it(tmp_path: Path) -> None:
    """node-b's launcher noted 70 and named node-b's neighbour; its task stays, as on a dead node."""
    step = 'echo 70 > "$SAILPLAN_JOB_NOTES/code-node-b"; touch "$SAILPLAN_JOB_NOTES/lost-node-c"\n'
    commands = slurm_commands(tmp_path / "bin", step + "exec sleep 60")
    began = time.monotonic()
    commands |= {"GRACE": "1", "SLURM_JOB_NUM_NODES": "2"}
    result = run("slurm.sbatch", "train", **commands)
    assert result.returncode == 70 and time.monotonic() - began < 40, result.stderr
    updates = (tmp_path / "bin" / "updates").read_text()
    assert "ExcNodeList=node-z,node-c" in updates, updates
    assert "nodes did not end within 1 s" in result.stderr


def test_elastic_gives_torchrun_its_nodes_restarts_and_waits() -> None:
    variables = {"NODES": "2:4", "RENDEZVOUS": "node-a:29400", "RESTARTS": "5", "SILENCE": "6"}
    line = shlex.split(run("elastic.sh", "train", "seed=1", **variables).stdout)
    options = dict(itertools.pairwise(line))
    assert [options[f"--{name}"] for name in ("nnodes", "max-restarts", "rdzv-endpoint")] == [
        "2:4",
        "5",
        "node-a:29400",
    ]
    waits = "last_call_timeout=30,keep_alive_interval=2,keep_alive_max_attempt=3"
    assert options["--rdzv-conf"] == waits and line[-3:] == ["train", "seed=1", "resume=auto"]


def test_slurm_hands_the_early_warning_on_and_waits_for_the_save(tmp_path: Path) -> None:
    step = (
        f"trap 'sleep 0.5; exit 75' USR1; touch {tmp_path}/ready; while true; do sleep 0.05; done"
    )
    environment = {**os.environ, **slurm_commands(tmp_path / "bin", step), "PYTHON": sys.executable}
    job = subprocess.Popen(
        [str(LAUNCH / "slurm.sbatch"), "train"], env=environment, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=30)
    assert job.returncode == 75
    assert (tmp_path / "bin" / "requeued").read_text() == "7\n"
