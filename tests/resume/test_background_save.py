"""A save in the background keeps the state of its step while training moves on, and its errors
and its death are safe.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from sailplan.checkpoint import loading, seal, store
from sailplan.checkpoint.background import Saver
from sailplan.errors import SailplanError
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import RankFailure, run_ranks


def job(rank):
    parallel = join_layout(1)
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    return parallel, model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    for parameter in model.parameters():
        torch.distributed.all_reduce(
            parameter.grad
        )  # on the default group, at the same time as the writers' messages
    optimizer.step()


def hold_the_writer():
    """Makes the writing of tensors wait for the returned event: a slow disk."""
    import torch.distributed.checkpoint.filesystem as filesystem

    go, real = threading.Event(), filesystem._write_item

    def slow(*arguments, **options):
        assert go.wait(30)
        return real(*arguments, **options)

    filesystem._write_item = slow
    return go


@pytest.mark.parametrize("world", [1, 2])
def test_steps_run_during_a_save_and_the_saved_state_is_that_of_its_step(tmp_path, world):
    def work(rank, size):
        parallel, model, optimizer = job(rank)
        step(model, optimizer)
        go = hold_the_writer()
        wanted = model.weight.detach().clone(), optimizer.state[model.weight]["exp_avg"].clone()
        with Saver(parallel, asynchronous=True, keep=2) as saver:
            saver.save(
                store.folder_of(tmp_path, 1), model=model, optimizer=optimizer, extra={"step": 1}
            )
            for _ in range(5):
                step(model, optimizer)
            assert saver.busy and store.latest(tmp_path) is None
            assert not torch.equal(model.weight, wanted[0])
            torch.distributed.barrier()
            go.set()
        assert not saver.busy
        extra = loading.load(
            store.folder_of(tmp_path, 1), model=model, optimizer=optimizer, parallel=parallel
        )
        return (
            extra["step"] == 1
            and torch.equal(model.weight, wanted[0])
            and torch.equal(optimizer.state[model.weight]["exp_avg"], wanted[1])
        )

    assert all(run_ranks(work, world, timeout=40))


def test_the_next_save_waits_and_old_checkpoints_go_after_the_new_one_is_complete(tmp_path):
    def work(rank, size):
        parallel, model, optimizer = job(rank)
        go = hold_the_writer()
        saver = Saver(parallel, asynchronous=True, keep=1)
        seen = []
        saver.save(store.folder_of(tmp_path, 1), model=model, optimizer=optimizer, extra={})
        threading.Timer(0.3, go.set).start()
        for number in (2, 3):
            step(model, optimizer)
            saver.save(
                store.folder_of(tmp_path, number), model=model, optimizer=optimizer, extra={}
            )
            seen.append(
                seal.is_complete(store.folder_of(tmp_path, number - 1))
                or seal.is_complete(store.folder_of(tmp_path, number))
            )
        saver.wait()
        return seen

    assert all(all(seen) for seen in run_ranks(work, 2, timeout=40))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"] and store.latest(
        tmp_path
    ) is not None


def test_an_error_in_the_background_reaches_all_ranks_at_the_next_save_and_at_the_end(tmp_path):
    def work(rank, size):
        import torch.distributed.checkpoint.filesystem as filesystem

        parallel, model, optimizer = job(rank)
        if rank == 1:

            def full(*arguments, **options):
                raise OSError(28, "No space left on device")

            filesystem._write_item = full
        told = []
        saver = Saver(parallel, asynchronous=True, keep=2)
        for number in (1, 2):
            try:
                saver.save(
                    store.folder_of(tmp_path, number), model=model, optimizer=optimizer, extra={}
                )
                step(model, optimizer)
            except SailplanError as error:
                told.append(str(error))
        try:
            with saver:
                saver.save(store.folder_of(tmp_path, 3), model=model, optimizer=optimizer, extra={})
        except SailplanError as error:
            told.append(str(error))
        return told

    for told in run_ranks(work, 2, timeout=40):
        assert len(told) == 2 and all(
            "No space left" in text and "rank 1" in text and "\n" not in text for text in told
        )
    assert not list(tmp_path.iterdir())


def test_killed_in_the_middle_of_a_save_the_checkpoint_before_is_the_newest(tmp_path):
    def work(rank, size):
        parallel, model, optimizer = job(rank)
        saver = Saver(parallel, asynchronous=True, keep=1)
        saver.save(
            store.folder_of(tmp_path, 1), model=model, optimizer=optimizer, extra={"step": 1}
        )
        saver.wait()
        hold_the_writer()
        saver.save(
            store.folder_of(tmp_path, 2), model=model, optimizer=optimizer, extra={"step": 2}
        )
        while not (tmp_path / "step-00000002.tmp").is_dir():
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RankFailure, match="died without a word"):
        run_ranks(work, 2, timeout=40)
    assert store.latest(tmp_path) == store.folder_of(Path(tmp_path), 1)
