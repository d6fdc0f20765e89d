"""Any number of ranks trains alike, resumes at any other, and opens few connections; the run
folder is one job's at a time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from sailplan.cli.launched import launch
from sailplan.config.compose import compose
from sailplan.config.rules import check
from sailplan.curriculum.testing import write_pack
from sailplan.data.datasets import open_datasets
from sailplan.errors import ConfigurationError
from sailplan.runtime.claim import Claim
from sailplan.runtime.groups import form_groups, leave_groups
from sailplan.train.run import train
from sailplan.train.testing import metrics
from sailplan.train.trainer import Trainer
from sailplan_kernels.testing import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
from jobs import job


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("pack")
    open_datasets(write_pack(root), names=["things", "choices"])
    return root


def trained(
    pack: Path, runs: Path, ranks: int, stop_after: int | None = None
) -> list[tuple[str, float]]:
    """Train in float64 on so many ranks, to a step; digests and losses of all steps so far."""
    config = job(pack, runs, parallel__dtype="float64", parallel__timeout_seconds=120.0)
    config.evaluation.tasks, config.order = {}, ["first"]
    config.stages["first"].steps = 4

    def work(rank: int) -> None:
        if stop_after is not None:
            former = Trainer._flags

            def flags(self: Trainer, *arguments: object) -> list[bool]:
                if (
                    self.state.step + 1 == stop_after
                ):  # before this step's message, which carries it
                    os.kill(os.getpid(), signal.SIGTERM)
                return former(self, *arguments)  # type: ignore[arg-type]

            Trainer._flags = flags  # type: ignore[method-assign]
        train(config)

    ended = launch(work, ranks, timeout=240)
    assert ended.codes == [0 if stop_after is None else 75] * ranks, ended.said
    return [(str(line["data/digest"]), float(line["loss/total"])) for line in metrics(runs / "job")]


def test_any_number_of_ranks_trains_alike_and_a_run_goes_on_at_any_other(
    pack: Path, tmp_path: Path
) -> None:
    """A step each on 8, 7, 5 and 3 ranks, and all steps on 5, against 4 ranks: digests are
    equal, losses as sums in another order allow.
    """
    expected = trained(pack, tmp_path / "4", 4)
    assert len(expected) == 4
    runs = {"5": trained(pack, tmp_path / "5", 5)}
    for ranks, last in ((8, 1), (7, 2), (5, 3), (3, None)):
        runs["8-7-5-3"] = trained(pack, tmp_path / "all", ranks, last)
        assert len(runs["8-7-5-3"]) == (last or 4)
    for name, found in runs.items():
        assert [digest for digest, _ in found] == [digest for digest, _ in expected], name
        differences = [
            abs(loss / wanted - 1) for (_, loss), (_, wanted) in zip(found, expected, strict=True)
        ]
        print(f"{name}: losses differ by {max(differences):.1e} at most")
        assert max(differences) < 1e-13, name


def test_the_full_size_run_can_be_started_at_512_ranks_as_shipped() -> None:
    check(compose(["experiment=sail_1b5"]), 512)
    with pytest.raises(
        ConfigurationError, match="global_batch=512: expected at least a row for each of 513"
    ):
        check(compose(["experiment=sail_1b5"]), 513)


@pytest.mark.parametrize("tensor", [1, 4])
def test_a_rank_of_1024_forms_few_groups(tensor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def work(rank: int, world_size: int) -> int:
        dist.destroy_process_group()
        former = dist.new_group
        monkeypatch.setattr(dist, "new_group", lambda *a, **k: made.append(a) or former(*a, **k))
        dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=1024)
        place = form_groups(tensor, torch.device("cpu"))
        assert (place.data_parallel_size, place.data_parallel_rank, place.tensor_parallel_rank) == (
            1024 // tensor,
            5 // tensor,
            5 % tensor,
        )
        leave_groups()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return len(made)

    (count,) = run_ranks(work, 1)
    assert count <= 3, "of 2 W / T + 20 that would do"


def test_sockets_of_a_rank_grow_by_three_a_rank_at_most(pack: Path, tmp_path: Path) -> None:
    def sockets(rank: int) -> None:
        def count(self: Trainer, span: object) -> None:
            dist.barrier()
            links = [
                os.readlink(f"/proc/self/fd/{name}")
                for name in os.listdir("/proc/self/fd")
                if os.path.exists(f"/proc/self/fd/{name}")
            ]
            (tmp_path / f"{dist.get_world_size()}-{rank}").write_text(
                str(sum(link.startswith("socket:") for link in links))
            )
            dist.barrier()

        Trainer._run_stage = count  # type: ignore[method-assign]  # within all callbacks
        train(
            job(
                pack,
                tmp_path,
                parallel__timeout_seconds=60.0,
                name=f"sockets-{os.environ['WORLD_SIZE']}",
            )
        )

    for ranks in (2, 4, 8):
        launch(sockets, ranks)
    most = {
        ranks: max(int((tmp_path / f"{ranks}-{rank}").read_text()) for rank in range(ranks))
        for ranks in (2, 4, 8)
    }
    assert (most[8] - most[4]) / 4 <= 3 and (most[4] - most[2]) / 2 <= 3, most


def test_a_second_job_in_a_run_folder_is_refused_and_a_crash_blocks_nobody(
    pack: Path, tmp_path: Path
) -> None:
    config = job(pack, tmp_path, parallel__timeout_seconds=60.0)

    def slow(rank: int) -> None:
        Trainer.run = lambda self: time.sleep(60)  # type: ignore[method-assign]
        train(config)

    def meanwhile(pids: list[int]) -> None:
        record = tmp_path / "job" / "running.json"
        while not (record.is_file() and "pid" in record.read_text()):
            time.sleep(0.05)
        ended = launch(lambda rank: train(config) and None, 2)
        assert ended.codes == [64, 64] and len(ended.said) == 1, ended.said
        assert "another job is writing here" in ended.said[0] and f"pid {pids[0]}" in ended.said[0]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    launch(slow, 2, during=meanwhile)
    assert launch(lambda rank: train(config) and None, 2).codes == [0, 0]
    assert not (tmp_path / "job" / "running.json").read_text()


def test_another_hosts_record_refuses_only_while_it_is_written(tmp_path: Path) -> None:
    record, done = tmp_path / "running.json", threading.Event()

    def other() -> None:
        beat = 0
        while not done.wait(0.05):
            beat += 1
            record.write_text(
                f'{{"host": "elsewhere", "pid": 1, "job": "7", "heartbeat": "{beat}"}}'
            )

    thread = threading.Thread(target=other)
    thread.start()
    try:
        time.sleep(0.2)
        with pytest.raises(ConfigurationError, match="host elsewhere, pid 1, job 7"):
            Claim(tmp_path, heartbeat=0.5)
    finally:
        done.set()
        thread.join()
    Claim(tmp_path, heartbeat=0.1).release()
