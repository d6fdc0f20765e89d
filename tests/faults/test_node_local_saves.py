"""A run that saves onto its nodes' own disks first is the run that does not, also after a kill and
with disks that are new.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from chaos import broken_pack, configuration, outcome, unlike  # it finds `jobs`, too
from jobs import strike

from sailplan.cli.launched import Ended, launch
from sailplan.config.schema import Config
from sailplan.train.run import train


def run(config: Config, *, kill: bool = False) -> Ended:
    def work(rank: int) -> None:
        if kill and rank == 1:
            strike("saving", "kill", turn=3)
        train(config)

    return launch(work, 2, timeout=120, killed=[1] if kill else [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack, and the run folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    broken_pack(folder / "pack")
    assert set(run(configuration(folder / "pack", folder)).codes) == {0}
    return folder


@pytest.mark.parametrize("copied", ["run folder", "URL"])
def test_a_killed_run_goes_on_from_the_copies_with_new_disks(
    tmp_path: Path, whole: Path, copied: str
) -> None:
    config = configuration(whole / "pack", tmp_path / "runs")
    config.checkpoint.local = str(tmp_path / "disk")
    config.checkpoint.copy_to = f"file://{tmp_path}/far" if copied == "URL" else None
    ended = run(config, kill=True)
    assert ended.codes == [70, -9], ended.said
    assert list((tmp_path / "disk/job").glob("step-*"))
    shutil.rmtree(tmp_path / "disk")
    ended = run(config)
    assert set(ended.codes) == {0}, ended.said
    assert any("fetched from" in line for line in ended.said), ended.said
    home = tmp_path / "runs/job/checkpoints"
    if copied == "URL":
        assert not home.exists()
        (tmp_path / "far/job").rename(home)
    assert unlike(outcome(tmp_path / "runs/job"), outcome(whole / "job")) == []
    if copied == "URL":
        return
    config.resume = "never"
    ended = run(config)
    assert set(ended.codes) == {64}
    assert any("holds a run already" in line for line in ended.said), ended.said


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, whole: Path) -> None:
    config = configuration(whole / "pack", tmp_path / "runs")
    config.checkpoint.local = "/proc/nowhere"
    ended = run(config)
    assert set(ended.codes) == {64}
    said = [line for line in ended.said if "checkpoint.local" in line]
    assert len(said) == 1 and "cannot be made" in said[0], ended.said
