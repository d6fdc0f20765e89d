"""Every phase of a job ends within its limit, whatever happens to a rank, with the exit code
that all ranks agree on.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from sailplan.checkpoint.store import latest
from sailplan.cli.launched import Ended, launch
from sailplan.curriculum.testing import write_pack
from sailplan.data.datasets import open_datasets
from sailplan.train.run import train
from sailplan.train.testing import metrics

sys.path.insert(0, str(Path(__file__).parent))
from jobs import LIMIT, job, strike

SECONDS = LIMIT + 10
RANKS, VICTIM = 3, 1


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("pack")
    open_datasets(write_pack(root), names=["things", "choices"])
    return root


def struck(pack: Path, runs: Path, phase: str, fault: str, limit: float = LIMIT) -> Ended:
    config = job(pack, runs, parallel__timeout_seconds=limit)

    def work(rank: int) -> None:
        if rank == VICTIM:
            strike(phase, fault)
        train(config)

    return launch(work, RANKS, timeout=90, killed=[VICTIM] if fault in ("stop", "kill") else ())


def others(ended: Ended) -> list[int]:
    return [code for rank, code in enumerate(ended.codes) if rank != VICTIM]


# Each names another place to wait: the store, a group's start, the loader, a step's collectives, a
# save's own group, and a tile of the search. What a phase is called does not matter to the watch,
# so a phase is struck by one fault where both would show the same.
STOPPED = ["start", "step", "saving", "evaluation"]
KILLED = ["opening data", "data", "preparing second"]


@pytest.mark.parametrize("phase", STOPPED)
def test_a_stopped_rank_ends_the_job_with_70(pack: Path, tmp_path: Path, phase: str) -> None:
    ended = struck(pack, tmp_path, phase, "stop")
    assert others(ended) == [70, 70], ended.said
    assert ended.codes[VICTIM] == -signal.SIGKILL and ended.seconds < SECONDS + 12, (
        ended.seconds
    )  # with the start of the job
    if phase != "start":  # before it, no rank has a folder to write to
        (report,) = (tmp_path / "job").glob("hang-*")
        table = (report / "table.txt").read_text().splitlines()
        assert [line.split()[0] for line in table] == ["rank", "0", "1", "2"]
        # A slow machine may keep one of the others from saying whom it waits for.
        assert "(no answer)" in table[2] and ("rank 1" in table[1] or "rank 1" in table[3])
        assert list(report.glob("stack-*.txt"))


@pytest.mark.parametrize("phase", KILLED)
def test_a_killed_rank_ends_the_job_with_70(pack: Path, tmp_path: Path, phase: str) -> None:
    ended = struck(pack, tmp_path, phase, "kill")
    assert others(ended) == [70, 70], ended.said
    assert "Traceback" not in "".join(ended.said) and ended.seconds < SECONDS + 12, ended.seconds
    assert sum("lost a peer" in line or "a hang" in line for line in ended.said) <= 2, ended.said


@pytest.mark.parametrize(
    ("phase", "fault", "code"),
    [("opening data", "bad data", 65), ("step", "bad data", 65), ("evaluation", "bug", 1)],
)
def test_one_ranks_failure_is_the_jobs(
    pack: Path, tmp_path: Path, phase: str, fault: str, code: int
) -> None:
    ended = struck(pack, tmp_path, phase, fault, limit=60.0)
    assert ended.codes == [code] * RANKS, ended.said
    assert all(len(lines) == 1 for rank, lines in enumerate(ended.lines) if rank != VICTIM), (
        ended.said
    )
    assert all(
        f"[rank {rank} " in line for rank, lines in enumerate(ended.lines) for line in lines
    ), ended.said


@pytest.mark.parametrize("phase", ["step", "preparing second"])
def test_a_stop_signal_to_one_rank_is_obeyed_by_all_and_nothing_is_lost(
    pack: Path, tmp_path: Path, phase: str
) -> None:
    ended = struck(pack, tmp_path, phase, "signal", limit=60.0)
    assert ended.codes == [75] * RANKS and len(ended.said) == 1, ended.said
    if phase == "preparing second":
        assert (
            latest(tmp_path / "job" / "checkpoints")
            == tmp_path / "job" / "checkpoints" / "step-00000003"
        )
        resumed = launch(
            lambda rank: train(job(pack, tmp_path, parallel__timeout_seconds=60.0)) and None,
            RANKS,
            timeout=90,
        )
        assert resumed.codes == [0] * RANKS, resumed.said
        assert [line["step"] for line in metrics(tmp_path / "job") if "loss/total" in line] == [
            1,
            2,
            3,
            4,
            5,
            6,
        ]
