"""The batch step of a Slurm job: starts the nodes' launchers, ends them together, and decides what
becomes of the job.

srun waits for a task on a dead node until Slurm gives the node up, which takes minutes. Each
launcher therefore leaves its exit code in a folder that all nodes see, and ranks name hosts that did
not answer; once one node has failed, the others have `GRACE` seconds. A job that was stopped (75)
goes back into the queue, one that lost a rank or hung (70) as well, a limited number of times and
without the hosts that were named. All other codes end the job. A task of a job array embeds its part.
Use: python -m sailplan.runtime.slurm_job train experiment=... name=... (see launch/slurm.sbatch)
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from sailplan.errors import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_HANG,
    EXIT_STOPPED,
    ConfigurationError,
)
from sailplan.runtime.environment import first_node
from sailplan.runtime.leaving import JOB_NOTES, say

GRACE = 30.0  # seconds for the other nodes, from the first failure
PRIORITY = (EXIT_HANG, 65, 64, EXIT_FAILURE, EXIT_STOPPED)  # of the nodes' codes; a lost one is 70
STEP = 'NODE_RANK=$SLURM_NODEID exec launch/torchrun.sh "$@"'


class Job:
    """One start of this job. notes: a folder on a file system of all nodes."""

    def __init__(self, notes: Path, grace: float = GRACE) -> None:
        self.number = os.environ["SLURM_JOB_ID"]
        self.nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
        self.notes, self.grace = notes, grace
        self._asked = False  # to stop

    def run(self, arguments: list[str]) -> int:
        """Run a command on all nodes; return the job's exit code."""
        shutil.rmtree(self.notes, ignore_errors=True)
        self.notes.mkdir(parents=True)
        line = ["srun", "--kill-on-bad-exit=0", "bash", "-c", STEP, "torchrun", *arguments]
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._ask)
        step = subprocess.Popen(line, env=os.environ | self._variables())
        return self._ended(self._wait(step))

    def _variables(self) -> dict[str, str]:
        found = dict(os.environ)
        ranks = found.get("PROCESSES_PER_NODE") or found.get("SLURM_GPUS_ON_NODE") or "1"
        # jobs that share a node must not share a port
        port = found.get("MASTER_PORT") or str(20000 + int(self.number) % 20000)
        return {
            "MASTER_ADDR": found.get("MASTER_ADDR") or first_node(found["SLURM_JOB_NODELIST"]),
            "MASTER_PORT": port,
            "NODES": str(self.nodes),
            "PROCESSES_PER_NODE": ranks,
            JOB_NOTES: str(self.notes.absolute()),
        }

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def _wait(self, step: subprocess.Popen[bytes]) -> int:
        """Return srun's exit code; end it where nodes do not follow one that failed."""
        failed_at = None
        while (code := step.poll()) is None:
            time.sleep(0.2)
            if self._asked:  # Slurm's early warning: srun passes it on to its tasks
                self._asked = False
                step.send_signal(signal.SIGUSR1)
            if failed_at is None and any(code not in (0, EXIT_STOPPED) for code in self.codes()):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > self.grace:
                say(f"job {self.number}: nodes did not end within {self.grace:.0f} s: ending them")
                _scancel("--signal=KILL", f"{self.number}.0")
                step.kill()
                step.wait()
                return EXIT_HANG
        return code

    def codes(self) -> list[int]:
        """Return the exit codes of the nodes that have left."""
        return [int(path.read_text()) for path in sorted(self.notes.glob("code-*"))]

    def lost(self) -> list[str]:
        """Return the hosts whose ranks did not answer."""
        return [path.name.removeprefix("lost-") for path in sorted(self.notes.glob("lost-*"))]

    def _ended(self, step_code: int) -> int:
        """Return the job's code from its nodes': all must have left for it to be done, or a stop."""
        codes = self.codes()
        if not codes:  # launchers that did not start, or that are not ours
            return step_code if 0 <= step_code < 128 else EXIT_FAILURE
        if len(codes) < self.nodes and not set(codes) - {EXIT_DONE, EXIT_STOPPED}:
            return EXIT_HANG
        return next((code for code in PRIORITY if code in codes), EXIT_DONE)


def settle(job: Job, code: int) -> None:
    """Put the job back into the queue, where that is what its code asks for."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    limits = {
        EXIT_STOPPED: int(os.environ.get("REQUEUES_AFTER_STOP", "100")),
        EXIT_HANG: int(os.environ.get("REQUEUES_AFTER_HANG", "3")),
    }
    if code not in limits:
        return
    if restarts >= limits[code]:
        say(
            f"job {job.number}: exit code {code} after {restarts} restarts, the limit: it ends here"
        )
        return
    lost = job.lost() if code == EXIT_HANG else []
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of the requeue, which ends this script
    without = f" without {', '.join(lost)}" if lost else ""
    say(f"job {job.number}: exit code {code}: back into the queue{without}")
    subprocess.run(["scontrol", "requeue", job.number], check=False)
    if lost:
        _exclude(job.number, lost)


def _exclude(number: str, hosts: list[str]) -> None:
    """Leave hosts out of the job's next start, beside those that it left out before.

    A running job's list cannot be changed: this is tried until the requeue has been done.
    """
    shown = subprocess.run(
        ["scontrol", "show", "job", number], capture_output=True, text=True, check=False
    ).stdout
    former = next((w.partition("=")[2] for w in shown.split() if w.startswith("ExcNodeList=")), "")
    wanted = ",".join(dict.fromkeys([*former.replace("(null)", "").split(","), *hosts])).strip(",")
    for _ in range(50):
        update = ["scontrol", "update", f"JobId={number}", f"ExcNodeList={wanted}"]
        if subprocess.run(update, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.2)
    say(f"job {number}: ExcNodeList={wanted} was not taken: exclude {', '.join(hosts)} by hand")


def _scancel(*arguments: str) -> None:
    subprocess.run(["scancel", *arguments], capture_output=True, check=False)


def part_of_array() -> list[str]:
    """Return the flags of `embed` that name this task's part of a job array; [] outside of one.

    Raises ConfigurationError for an array of which Slurm's variables do not give the parts.
    """
    task, parts = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ.get("PARTS")
    if task is None:
        return []
    tasks = int(os.environ["SLURM_ARRAY_TASK_COUNT"])
    if not parts and int(os.environ["SLURM_ARRAY_TASK_MAX"]) != tasks - 1:
        first, last = os.environ["SLURM_ARRAY_TASK_MIN"], os.environ["SLURM_ARRAY_TASK_MAX"]
        raise ConfigurationError(
            f"--array: found {tasks} tasks from {first} to {last}, expected all from 0 on: submit "
            f"with --array=0-{tasks - 1}, or export PARTS, the number of parts, to run some again"
        )
    return ["--part", f"{task}/{parts or tasks}"]


def main(arguments: list[str]) -> int:
    """Run the batch step; return the job's exit code."""
    if arguments[:1] == ["embed"] and "--part" not in arguments:
        try:
            arguments = [*arguments, *part_of_array()]
        except ConfigurationError as error:
            say(str(error))
            return error.exit_code
    if arguments[:1] == ["train"] and not any(word.startswith("resume=") for word in arguments):
        arguments = [*arguments, "resume=auto"]
    folder = Path(os.environ.get("JOB_NOTES_FOLDER", ".slurm"))
    job = Job(folder / os.environ["SLURM_JOB_ID"], float(os.environ.get("GRACE", GRACE)))
    code = job.run(arguments)
    settle(job, code)
    shutil.rmtree(job.notes, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
