"""Plans of saves are made once, and made anew when the blocks change; an index is read once."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from sailplan.checkpoint import index, loading, store
from sailplan.checkpoint.layout import Block, Layout, WholeTensorView
from sailplan.checkpoint.plans import SavePlans, signature
from sailplan.model.testing import join_layout
from sailplan_kernels.testing import run_ranks


def job():
    parallel = join_layout(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))
    return parallel, model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()


def counted(sent):
    """Count the bytes of objects that this rank sends to rank 0."""
    former = dist.gather_object

    def gather(*rest, **options):
        sent[-1] += len(pickle.dumps([*rest, *options.values()][0]))
        return former(*rest, **options)

    dist.gather_object = gather


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_second_save_sends_less_than_a_kilobyte_and_loads_alike(tmp_path, ranks):
    def work(rank, size):
        parallel, model, optimizer = job()
        sent, plans, planned = [0], SavePlans(), []
        counted(sent)
        former = DefaultSavePlanner.create_global_plan
        DefaultSavePlanner.create_global_plan = lambda *rest: planned.append(1) or former(*rest)
        wanted = {}
        for number in range(1, 5):
            if number > 1:  # the first has no moments yet
                step(model, optimizer)
            snapshot = store.state_of(model, optimizer, {"step": number}, parallel)
            store.write(store.folder_of(tmp_path, number), snapshot, parallel, None, plans)
            wanted[number] = [value.clone() for value in model.parameters()]
            sent.append(0)
        for number, values in wanted.items():
            read = job()[1:]
            loading.load(
                store.folder_of(tmp_path, number),
                model=read[0],
                optimizer=read[1],
                parallel=parallel,
            )
            assert all(map(torch.equal, read[0].parameters(), values)), number
        return sent, len(planned), plans.made

    for rank, (sent, planned, made) in enumerate(run_ranks(work, ranks, timeout=60)):
        assert made == 2 and planned == (2 if rank == 0 else 0), "moments came with the second"
        assert (sent[0] > 5000 and sent[1] > 10000) or rank > 0, sent
        assert max(sent[2:4]) < 1000, sent


def test_a_save_that_failed_is_planned_anew(tmp_path):
    def work(rank, size):
        import torch.distributed.checkpoint.filesystem as filesystem

        parallel, model, _ = job()
        plans, former = SavePlans(), filesystem._write_item

        def full(*arguments, **options):
            raise OSError(28, "No space left on device")

        for number, broken in ((1, rank == 1), (2, False), (3, rank == 1), (4, False)):
            filesystem._write_item = full if broken else former
            snapshot = store.state_of(model, None, {}, parallel)
            try:
                store.write(store.folder_of(tmp_path, number), snapshot, parallel, None, plans)
            except store.SailplanError as error:
                assert number in (1, 3) and "No space left" in str(error)
        for number in (2, 4):
            loading.load(
                store.folder_of(tmp_path, number), model=model, optimizer=None, parallel=parallel
            )
        return sorted(path.name for path in tmp_path.iterdir())

    for names in run_ranks(work, 2, timeout=60):
        assert names == ["step-00000002", "step-00000004"]


def test_rank_0s_part_of_a_second_save_among_512_ranks_is_short(tmp_path):
    """2,388 tensors with two moments each, an index of 48 MB: all that rank 0 does beyond its
    own blocks is to compare its own plan and to write the index again.
    """
    held = torch.zeros(4, 4)
    state = {
        f"{kind}.layer.{number}": WholeTensorView(
            held, Layout((2048, 4), (Block(0, 4, (4 * number % 2048, 0)),))
        )
        for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
        for number in range(2388)
    }
    plans = SavePlans()
    plans._signature, plans._index = signature(state), os.urandom(48_000_000)
    began = time.process_time()
    assert signature(state) == plans._signature
    plans._write_index(tmp_path)
    assert time.process_time() - began < 0.5
    assert (Path(tmp_path) / ".metadata").stat().st_size == 48_000_000


def test_one_rank_reads_the_index_and_each_unpickles_it_once(tmp_path):
    def work(rank, size):
        parallel, model, optimizer = job()
        step(model, optimizer)
        folder = store.folder_of(tmp_path, 1)
        store.save(folder, model=model, optimizer=optimizer, extra={}, parallel=parallel)
        unpickled, read = [], []
        former, bytes_of = index._Unpickler.load, Path.read_bytes
        index._Unpickler.load = lambda self: unpickled.append(1) or former(self)
        Path.read_bytes = lambda self: read.append(self.name) or bytes_of(self)
        loading.load(folder, model=model, optimizer=optimizer, parallel=parallel)
        return len(unpickled), read.count(".metadata")

    assert run_ranks(work, 3, timeout=60) == [(1, 1), (1, 0), (1, 0)]


def test_milestones_stay(tmp_path):
    def work(rank, size):
        parallel, model, _ = job()
        for number in range(1, 8):
            store.save(
                store.folder_of(tmp_path, number),
                model=model,
                optimizer=None,
                extra={},
                parallel=parallel,
            )
            store.prune(tmp_path, 1, 3)
        return [int(path.name[5:]) for path in sorted(tmp_path.iterdir())]

    assert run_ranks(work, 1, timeout=60) == [[3, 6, 7]]
