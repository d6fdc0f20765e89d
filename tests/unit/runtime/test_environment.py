"""Ranks of srun and mpirun must find each other by what those say, and none may guess."""

from __future__ import annotations

import os

import pytest

from sailplan.errors import ConfigurationError
from sailplan.runtime.environment import fill_in_launcher, first_node, tasks_of_nodes

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
INTEL = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "3",  # of the job; the step has its own
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2,1(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (SRUN, ("3", "4", "0", "1", "gpu07", "20007")),
        (OPEN_MPI | {"MASTER_ADDR": "a"}, ("3", "4", "1", "2", "a", "29500")),
        (INTEL, ("3", "4", "3", "4", "127.0.0.1", "29500")),
    ],
    ids=["srun", "open-mpi", "intel"],
)
def test_torchruns_variables_are_filled_in(found: dict[str, str], expected: tuple[str]) -> None:
    os.environ |= found
    fill_in_launcher()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert tuple(os.environ[name] for name in names) == expected


def test_a_batch_script_a_single_task_and_torchrun_are_left_as_they_are() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    for found in (batch, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, OPEN_MPI | {"RANK": "0"}):
        os.environ.clear()
        os.environ |= found
        fill_in_launcher()
        assert os.environ == found


def test_what_mpirun_does_not_say_is_asked_for() -> None:
    os.environ |= OPEN_MPI
    with pytest.raises(ConfigurationError, match="MASTER_ADDR: not set under Open MPI's mpirun"):
        fill_in_launcher()
    os.environ.clear()
    os.environ |= {"PMI_RANK": "0", "PMI_SIZE": "2"}
    with pytest.raises(ConfigurationError, match="MPI_LOCALRANKID: not set by MPICH"):
        fill_in_launcher()


def test_slurms_lists_are_read() -> None:
    assert [first_node(each) for each in ("n0", "n[0-3,7]", "gpu[07-09]-ib,x", "a,b", "")] == [
        "n0",
        "n0",
        "gpu07-ib",
        "a",
        "",
    ]
    assert tasks_of_nodes("2(x3),1") == [2, 2, 2, 1] and tasks_of_nodes("many") == []
