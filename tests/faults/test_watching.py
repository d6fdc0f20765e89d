"""A run's alerts and measures on real ranks: a slow rank, a rank that hangs for a while, and what
every run logs of tokens, FLOP, memory and waits.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sailplan.cli.launched import launch
from sailplan.config.schema import Config
from sailplan.curriculum.testing import write_pack
from sailplan.data.collate import Collator
from sailplan.data.datasets import open_datasets
from sailplan.train import trainer
from sailplan.train.run import train
from sailplan.train.testing import metrics

sys.path.insert(0, str(Path(__file__).parent))
from jobs import job

STEPS = 12
ROOM = "sailplan.train.callbacks"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("pack")
    open_datasets(write_pack(root), names=["things", "choices"])
    return root


def settings(pack: Path, runs: Path, seconds: float = 60.0, **alerts: Any) -> Config:
    config = job(pack, runs, parallel__timeout_seconds=seconds)
    config.order = ["first"]
    config.stages["first"].steps, config.evaluation.tasks = STEPS, {}
    config.checkpoint.every_steps = 0
    config.callbacks["throughput"] = {
        "_target_": f"{ROOM}.throughput.Throughput",
        "every": 3,
        "peak": 1e12,
    }
    config.callbacks["alerts"] = {"_target_": f"{ROOM}.alerts.Alerts", "window": 4} | alerts
    return config


def test_measures_of_all_ranks_and_a_slow_one_is_named(pack: Path, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        former = trainer._awaited

        def slow(loader: Any) -> Any:  # after what the thread reads ahead, which hides some of it
            for batches in former(loader):
                time.sleep(0.4 if rank == 1 else 0.0)
                yield batches

        trainer._awaited = slow
        train(settings(pack, tmp_path, straggler=0.02))  # on a busy machine steps are long

    ended = launch(work, 2, timeout=90)
    assert ended.codes == [0, 0], ended.said
    lines = metrics(tmp_path / "job")
    measured = [line for line in lines if "tokens_per_second" in line]
    assert [line["step"] for line in measured] == [3, 6, 9, 12]
    for line in measured:
        assert line["tokens_per_second"] > 0 and line["memory/peak_bytes"] > 1e7
        assert line["flop_per_step"] > 1e5 and line["data/modality/vision"] == 1.0
        rate = line["flop_per_second"]
        assert rate > 0 and line["mfu"] == pytest.approx(rate / 2e12)
        assert line["ranks/slowest"] == 1 and line["ranks/slowest_in"] == "data"
    (fired,) = (line for line in lines if "alert/straggler" in line)
    assert "rank 1 takes" in fired["alert/straggler"]
    assert any("alert: straggler: rank 1" in line for line in ended.said), ended.said


def test_no_progress_for_half_the_limit_is_an_alert_before_it_is_a_hang(
    pack: Path, tmp_path: Path
) -> None:
    def work(rank: int) -> None:
        former = Collator.batches

        def late(self: Collator, step: int) -> Any:
            time.sleep(6.0 if step == 5 and rank == 1 else 0.0)
            return former(self, step)

        Collator.batches = late  # type: ignore[method-assign]
        train(settings(pack, tmp_path, seconds=30.0, hang=0.1))

    ended = launch(work, 2, timeout=90)
    assert ended.codes == [0, 0], ended.said
    hangs = [line for line in ended.said if "alert: hang: no progress on any rank" in line]
    assert hangs and "timeout_seconds=30" in hangs[0], ended.said


def test_counted_flop_are_those_of_the_matrix_products(pack: Path, tmp_path: Path) -> None:
    """Twice the rows, twice the products: but for those of the loss, which are few here."""
    found = {}
    for rows in (8, 16):
        config = settings(pack, tmp_path / str(rows))
        config.global_batch = rows
        ended = launch(lambda rank, config=config: train(config) and None, 1, timeout=90)
        assert ended.codes == [0], ended.said
        (*_, last) = (
            line for line in metrics(tmp_path / str(rows) / "job") if "flop_per_step" in line
        )
        found[rows] = last["flop_per_step"]
    assert 1.7 < found[16] / found[8] < 2.3, found


def test_every_panel_of_the_dashboard_has_its_series(pack: Path, tmp_path: Path) -> None:
    """In a run with an evaluation, a broken record and a step that is not finite."""
    import data_faults
    import test_quarantine

    from sailplan.observe.dashboard import dashboard, series_of

    broken = tmp_path / "pack"
    shutil.copytree(pack, broken)
    data_faults.overwrite(broken, 3, ".webp", b"")

    def work(rank: int) -> None:
        test_quarantine.poison()
        config = settings(broken, tmp_path)
        config.data.bad_sample_limit = 0.5
        config.evaluation = job(broken, tmp_path).evaluation
        train(config)

    ended = launch(work, 1, timeout=90)
    assert ended.codes == [0], ended.said
    names = {name for line in metrics(tmp_path / "job") for name in line}
    for file in (tmp_path / "job" / "evaluation").glob("*.json"):
        for task, found in json.loads(file.read_text())["tasks"].items():
            names |= {f"evaluation/{task}/{metric}" for metric in found}
    empty = {
        panel
        for panels in dashboard().values()
        for panel, patterns in panels.items()
        if not series_of(patterns, names)
    }
    assert not empty and sum(map(len, dashboard().values())) > 15
