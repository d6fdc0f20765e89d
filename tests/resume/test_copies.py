"""Copies of checkpoints elsewhere: whole ones alone count, whatever ended the others."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from sailplan.checkpoint import loading, store
from sailplan.checkpoint.background import Saver
from sailplan.checkpoint.copies import Copies
from sailplan.errors import ConfigurationError
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import RankFailure, run_ranks


def saved(root: Path, url: str, steps: range, *, asynchronous: bool = True, keep: int = 2) -> None:
    """Save so many steps of a model whose weights are the step."""
    parallel, model = join_layout(1), nn.Linear(3, 3)
    copies = Copies(url, "run")
    with Saver(parallel, asynchronous=asynchronous, keep=keep, keep_every=4, copies=copies) as one:
        for step in steps:
            with torch.no_grad():
                model.weight.fill_(step)
            folder = store.folder_of(root / "run", step)
            one.save(folder, model=model, optimizer=None, extra={"step": step})


def test_copies_follow_the_run_folder_and_load_elsewhere(tmp_path):
    url = f"file://{tmp_path}/far"

    def work(rank, size):
        saved(tmp_path, url, range(1, 8))
        return None

    run_ranks(work, 2, timeout=60)
    assert Copies(url, "run").steps() == ["step-00000004", "step-00000006", "step-00000007"]

    def elsewhere(rank, size):
        parallel, model, fetched = join_layout(1), nn.Linear(3, 3), tmp_path / "elsewhere"
        if rank == 0:
            assert Copies(url, "run").fetch_newer(fetched, "step-00000007") is None
            assert Copies(url, "run").fetch_newer(fetched, "") == fetched / "step-00000007"
        torch.distributed.barrier()
        found = store.newest_whole(fetched, parallel)
        extra = loading.load(found, model=model, optimizer=None, parallel=parallel, verified=True)
        return extra["step"], float(model.weight[0, 0])

    assert run_ranks(elsewhere, 2, timeout=60) == [(7, 7.0)] * 2


def test_a_file_system_in_memory(tmp_path):
    def work(rank, size):
        saved(tmp_path, "memory://far", range(1, 4), asynchronous=False)
        copies = Copies("memory://far", "run")
        folder = copies.fetch_newer(tmp_path / "elsewhere", "")
        assert folder is not None and store.is_complete(folder)
        return copies.steps()

    assert run_ranks(work, 1, timeout=60) == [["step-00000002", "step-00000003"]]


@pytest.mark.parametrize("moment", ["before a file", "before the seal"])
def test_killed_while_a_copy_is_made_the_one_before_is_taken(tmp_path, moment):
    url = f"file://{tmp_path}/far"

    def work(rank, size):
        saved(tmp_path, url, range(1, 2))
        copies = Copies(url, "run")
        former = type(copies._files).put_file

        def put(self, source, target, **options):
            if source.endswith("COMPLETE" if moment == "before the seal" else "__0_0.distcp"):
                os.kill(os.getpid(), signal.SIGKILL)
            return former(self, source, target, **options)

        type(copies._files).put_file = put
        saved(tmp_path, url, range(2, 3), asynchronous=False)

    with pytest.raises(RankFailure):  # of a rank that was killed, or of one that lost it
        run_ranks(work, 2, timeout=60)
    copies = Copies(url, "run")
    assert copies.steps() == ["step-00000001"]
    fetched = copies.fetch_newer(tmp_path / "elsewhere", "")
    assert fetched is not None and fetched.name == "step-00000001" and store.is_complete(fetched)
    assert store.latest(tmp_path / "run") == store.folder_of(tmp_path / "run", 2), "it was sealed"

    def again(rank, size):
        saved(tmp_path, url, range(2, 4))

    run_ranks(again, 2, timeout=60)
    assert copies.steps() == ["step-00000002", "step-00000003"]


def test_a_target_that_refuses_is_said_and_the_checkpoint_stays(tmp_path, capfd):
    (tmp_path / "far").write_text("a file where a folder is needed")

    def work(rank, size):
        saved(tmp_path, f"file://{tmp_path}/far", range(1, 3))

    run_ranks(work, 2, timeout=60)
    assert store.latest(tmp_path / "run") == store.folder_of(tmp_path / "run", 2)
    said = [line for line in capfd.readouterr().err.splitlines() if "could not be copied" in line]
    assert len(said) == 2 and "the run folder has it" in said[0]


def test_a_url_that_nothing_opens_is_one_line():
    with pytest.raises(ConfigurationError, match=r"checkpoint\.copy_to=nowhere://x: "):
        Copies("nowhere://x", "run")
