"""Long work: no time-out of a group counts while a rank works, and a stop reaches all ranks."""

from __future__ import annotations

import datetime
import os
import signal
import time
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from sailplan.errors import BadDataError, SailplanError, StopRequested
from sailplan.model.testing import join_layout
from sailplan.runtime.board import Board
from sailplan.runtime.process import Parallel
from sailplan.runtime.signals import stop_flag
from sailplan.runtime.turns import apart, in_turns
from sailplan.runtime.watch import Watch, alone, watching
from sailplan_kernels.testing import run_ranks

SHORT = datetime.timedelta(seconds=2)


class Impatient(Parallel):
    """Ranks whose collectives give up after two seconds."""

    def agree(self, flag: bool) -> bool:
        import torch

        value = torch.tensor([float(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.data_parallel_group)
        return bool(value.item())


def impatient(watch: Watch) -> Parallel:
    parallel = join_layout(1)
    store = dist.distributed_c10d._get_default_store()
    watch.board = Board(dist.PrefixStore("turns", store), parallel.rank, parallel.world_size)
    group = dist.new_group(backend="gloo", timeout=SHORT)
    parallel = replace(parallel, data_parallel_group=group)
    return Impatient(**{name: getattr(parallel, name) for name in parallel.__dataclass_fields__})


@pytest.mark.parametrize("how", [in_turns, apart])
def test_a_rank_that_works_longer_than_the_time_out_is_waited_for(how: Any) -> None:
    def run(rank: int, world: int) -> list[int]:
        done: list[int] = []

        def work(unit: int = rank) -> None:
            for _ in range(40 if unit == 1 else 0):
                time.sleep(0.1)
                alone()
            done.append(unit)

        with stop_flag() as flag, watching(60, flag, rank) as watch:
            parallel = impatient(watch)
            if how is in_turns:
                in_turns(parallel, "working", range(4), work)
            else:
                apart(parallel, "working", work)
            dist.barrier()
        return done

    assert run_ranks(run, 2, timeout=90) == ([[0, 2], [1, 3]] if how is in_turns else [[0], [1]])


def test_a_stop_signal_to_one_rank_ends_the_work_of_all_within_seconds() -> None:
    def run(rank: int, world: int) -> tuple[str, float]:
        def work(unit: int) -> None:
            if unit == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(600):
                time.sleep(0.1)
                alone()

        with stop_flag() as flag, watching(60, flag, rank) as watch:
            parallel, began = impatient(watch), time.monotonic()
            with pytest.raises(StopRequested) as caught:
                in_turns(parallel, "working", range(2), work)
            dist.barrier()  # both come here: what follows a stop, a save, is collective
            return str(caught.value), time.monotonic() - began

    for text, seconds in run_ranks(run, 2, timeout=90):
        assert "stopped by SIGTERM" in text and seconds < 20  # 5 on an idle machine


def test_a_failure_goes_before_a_stop() -> None:
    def run(rank: int, world: int) -> str:
        def work(unit: int) -> None:
            raise BadDataError("broken") if unit else StopRequested("stopped")

        with pytest.raises(SailplanError) as caught:
            in_turns(join_layout(1), "working", range(2), work)
        return f"{type(caught.value).__name__}: {caught.value}"

    assert run_ranks(run, 2) == [
        "BadDataError: working failed on rank 1: BadDataError: broken",
        "BadDataError: broken",
    ]
