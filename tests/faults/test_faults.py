"""Every phase of a job ends within its limit, whatever happens to a rank, with the exit code that all ranks agree on."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from sailplan.cli.launched import Ended, launch
from sailplan.curriculum.testing import write_pack
from sailplan.data.datasets import open_datasets
from sailplan.train.run import train

sys.path.insert(0, str(Path(__file__).parent))
from jobs import LIMIT, job, strike

SECONDS = LIMIT + 10
RANKS, VICTIM = 3, 1


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("pack")
    open_datasets(write_pack(root), names=["things", "choices"])
    return root


def struck(pack: Path, runs: Path, phase: str, fault: str, turn: int = 1) -> Ended:
    config = job(pack, runs)

    def work(rank: int) -> None:
        if rank == VICTIM:
            strike(phase, fault, turn)
        train(config)

    return launch(work, RANKS, timeout=60, killed=[VICTIM] if fault in ("stop", "kill") else ())


def others(ended: Ended) -> list[int]:
    return [code for rank, code in enumerate(ended.codes) if rank != VICTIM]


PHASES = ["start", "opening data", "building the model", "data", "step", "saving", "evaluation", "preparing second"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_stopped_rank_ends_the_job_with_70(pack: Path, tmp_path: Path, phase: str) -> None:
    ended = struck(pack, tmp_path, phase, "stop")
    assert others(ended) == [70, 70], ended.said
    assert ended.codes[VICTIM] == -signal.SIGKILL and ended.seconds < SECONDS + 12, ended  # with the start of the job
    if phase != "start":  # before it, no rank has a folder to write to
        (report,) = (tmp_path / "job").glob("hang-*")
        table = (report / "table.txt").read_text().splitlines()
        assert [line.split()[0] for line in table] == ["rank", "0", "1", "2"]
        assert "(no answer)" in table[2] and "rank 1" in table[1] and "rank 1" in table[3]
        assert list(report.glob("stack-*.txt"))


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_rank_ends_the_job_with_70(pack: Path, tmp_path: Path, phase: str) -> None:
    ended = struck(pack, tmp_path, phase, "kill")
    assert others(ended) == [70, 70], ended.said
    assert "Traceback" not in "".join(ended.said) and ended.seconds < SECONDS + 12, ended
    assert sum("lost a peer" in line or "a hang" in line for line in ended.said) <= 2, ended.said


@pytest.mark.parametrize(("fault", "code"), [("bad data", 65), ("bug", 1)])
@pytest.mark.parametrize("phase", ["opening data", "step", "evaluation"])
def test_one_ranks_failure_is_the_jobs(pack: Path, tmp_path: Path, phase: str, fault: str, code: int) -> None:
    ended = struck(pack, tmp_path, phase, fault)
    assert ended.codes == [code] * RANKS, ended.said
    assert all(len(lines) == 1 for rank, lines in enumerate(ended.lines) if rank != VICTIM), ended.said
    assert all(f"[rank {rank} " in line for rank, lines in enumerate(ended.lines) for line in lines), ended.said


@pytest.mark.parametrize("phase", ["opening data", "step", "evaluation", "preparing second"])
def test_a_stop_signal_to_one_rank_is_obeyed_by_all_and_nothing_is_lost(pack: Path, tmp_path: Path, phase: str) -> None:
    ended = struck(pack, tmp_path, phase, "signal")
    assert ended.codes == [75] * RANKS and len(ended.said) == 1, ended.said
    assert launch(lambda rank: train(job(pack, tmp_path)) and None, RANKS).codes == [0] * RANKS
