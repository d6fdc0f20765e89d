"""Ranks that would train on different data, with other settings or versions, end before they
learn anything from it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sailplan.cli.launched import launch
from sailplan.curriculum.testing import write_pack
from sailplan.data.datasets import open_datasets
from sailplan.data.plan import Plan
from sailplan.runtime import agreement, session
from sailplan.step.same_data import equal, moments
from sailplan.train.run import train
from sailplan.train.testing import metrics

sys.path.insert(0, str(Path(__file__).parent))
from jobs import job


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two nodes' folders: the second lacks a shard."""
    roots = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("part")
    for root in roots:
        write_pack(root)
    sorted((roots[1] / "things").glob("*.tar"))[-1].unlink()
    for root in roots:
        open_datasets(
            write_pack(root) if root == roots[0] else job(root, root / "runs"),
            names=["things", "choices"],
        )
    return roots


def test_a_missing_shard_is_named_with_rank_and_host(
    packs: tuple[Path, Path], tmp_path: Path
) -> None:
    ended = launch(
        lambda rank: (
            train(job(packs[rank == 2], tmp_path, parallel__timeout_seconds=60.0)) and None
        ),
        3,
    )
    assert ended.codes == [64] * 3 and len(ended.said) == 1, ended.said
    assert all(
        word in ended.said[0] for word in ("data set things", "rank 2 (", ".tar", "instead of")
    ), ended.said


@pytest.mark.parametrize("what", ["setting", "version", "code"])
def test_other_settings_versions_or_code_are_named(
    packs: tuple[Path, Path], tmp_path: Path, what: str
) -> None:
    def work(rank: int) -> None:
        config = job(packs[0], tmp_path, parallel__timeout_seconds=60.0)
        if rank == 1 and what == "setting":
            config.stages["first"].optimizer.clip_norm = 7.0
        if rank == 1 and what != "setting":
            former, key = agreement.software, "torch" if what == "version" else "code of sailplan"
            from sailplan.train import run

            run.software = lambda: {"versions": former()["versions"] | {key: "another"}}  # type: ignore[attr-defined]
        train(config)

    ended = launch(work, 2)
    assert ended.codes == [64, 64] and len(ended.said) == 1, ended.said
    named = {
        "setting": "clip_norm: 7.0",
        "version": "torch: another",
        "code": "code of sailplan: another",
    }
    assert "rank 1 (" in ended.said[0] and named[what] in ended.said[0], ended.said


def test_a_host_without_its_gpus_is_named_before_any_group_is_formed(
    packs: tuple[Path, Path], tmp_path: Path
) -> None:
    def work(rank: int) -> None:
        if rank != 1:
            session._device = lambda *arguments: torch.device("cuda", 0)
        train(job(packs[0], tmp_path, parallel__timeout_seconds=60.0))

    ended = launch(work, 3)
    assert ended.codes == [64] * 3 and len(ended.said) == 1, ended.said
    assert "GPUs: found by 2 ranks and not by 1, such as rank 1 (" in ended.said[0], ended.said


def test_a_rank_that_draws_other_records_ends_the_run_in_that_step(
    packs: tuple[Path, Path], tmp_path: Path
) -> None:
    def work(rank: int) -> None:
        if rank == 1:
            former = Plan.digest
            Plan.digest = lambda self, step: "0" * 16 if step == 1 else former(self, step)  # type: ignore[method-assign]
        train(job(packs[0], tmp_path, parallel__timeout_seconds=60.0))

    ended = launch(work, 3)
    assert ended.codes == [65] * 3 and len(ended.said) == 1, ended.said
    assert (
        "step 2" in ended.said[0] and "rank 1 (" in ended.said[0] and "0" * 16 in ended.said[0]
    ), ended.said
    assert [line["step"] for line in metrics(tmp_path / "job")] == [1], (
        "the step before it counts, it does not"
    )


@pytest.mark.parametrize("ranks", [1, 2, 7, 8192])
def test_sums_tell_equal_from_unequal_digests_exactly(ranks: int) -> None:
    own, other = moments("first", 3, ["a"]), moments("first", 3, ["b"])
    assert equal([ranks * one for one in own], ranks)
    if ranks > 1:
        assert not equal(
            [(ranks - 1) * one + two for one, two in zip(own, other, strict=True)], ranks
        )
    largest = [float(2**20 - 1)] * 3 + [float((2**20 - 1) ** 2)] * 3
    assert equal([ranks * one for one in largest], ranks)
