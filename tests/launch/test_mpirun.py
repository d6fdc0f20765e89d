"""A real mpirun, of Open MPI and of MPICH: its variables are understood, a run is the local one, and
a refusal is its exit code.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sailplan.cli.testing import write_project
from sailplan.train.testing import metrics

sys.path.insert(0, str(Path(__file__).parent))
from hosts import environment

RUNNERS = {"Open MPI": "mpirun.openmpi", "MPICH": "mpiexec.hydra"}
ROOT_TOO = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
OTHERS = ("RANK", "WORLD_SIZE", "MASTER_", "OMPI_", "PMI_", "MPI_", "SLURM_")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("project")
    write_project(root)
    done = call(root, [], "train", "name=local")
    assert done.returncode == 0, done.stderr
    return root


def call(root: Path, launcher: list[str], *line: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the small experiment under a launcher."""
    kept = {name: value for name, value in environment().items() if not name.startswith(OTHERS)}
    return subprocess.run(
        [*launcher, sys.executable, "-m", "sailplan", *line, "experiment=small"],
        cwd=root,
        env=kept | ROOT_TOO,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("kind", RUNNERS)
def test_ranks_of_mpirun_find_each_other_and_train_as_one_process(project: Path, kind: str) -> None:
    if shutil.which(RUNNERS[kind]) is None:
        pytest.skip(f"SKIPPED, nothing ran under {kind}: no {RUNNERS[kind]}: make cluster-packages")
    few = ["--oversubscribe"] if kind == "Open MPI" else []
    launcher = [RUNNERS[kind], *few, "-n", "2"]
    name = f"name={RUNNERS[kind]}"
    checked = call(project, launcher, "check", name)
    assert checked.returncode == 0, checked.stderr
    assert "check: 2 ranks on 1 host: ready" in checked.stdout
    trained = call(project, launcher, "train", name)
    assert trained.returncode == 0, trained.stderr
    digests = [
        [(line["step"], line["data/digest"]) for line in metrics(project / "runs" / run)]
        for run in (RUNNERS[kind], "local")
    ]
    assert digests[0] == digests[1] and len(digests[0]) == 2
    refused = call(project, launcher, "train", name)
    assert refused.returncode == 64 and "holds a run already" in refused.stderr
