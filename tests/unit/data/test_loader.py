"""The loader: equal batches for any worker count and starting step, a limit on bad samples, no
processes left.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sailplan.config.schema import Config, StageConfig
from sailplan.data.ahead import pack, unpack
from sailplan.data.datasets import open_datasets
from sailplan.data.loader import StepLoader
from sailplan.data.plan import Plan
from sailplan.data.record import StepBatch
from sailplan.data.testing import item_record, write_set
from sailplan.errors import BadDataError

Make = Callable[..., Config]
WEIGHTS = {"things": 1.0, "histories": 1.0}


def loader(
    config: Config,
    steps: int = 6,
    start_step: int = 0,
    weights: dict[str, float] = WEIGHTS,
    mixed: float = 0.5,
) -> StepLoader:
    readers, stage = open_datasets(config), StageConfig(steps=steps, mixed_fraction=mixed)
    return StepLoader(
        Plan(config, "first", stage, weights, readers),
        readers,
        config,
        stage,
        start_step=start_step,
    )


def flat(batches: list[StepBatch]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for batch in batches:
        for view in batch.views.values():
            found += [view.order, view.valid, view.ids]
            for inputs in view.micro_batches:
                found += [
                    value for value in vars(inputs).values() if isinstance(value, torch.Tensor)
                ]
    return found


def assert_equal(left: list[StepBatch], right: list[StepBatch]) -> None:
    assert [(batch.step, batch.dataset, batch.record_ids, batch.digest) for batch in left] == [
        (batch.step, batch.dataset, batch.record_ids, batch.digest) for batch in right
    ]
    tensors = list(zip(flat(left), flat(right), strict=True))
    assert tensors and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors)


def test_workers_and_restarts_change_nothing(make_config: Make) -> None:
    wanted = list(loader(make_config()))
    assert [batches[0].step for batches in wanted] == list(range(6)) and {
        len(batches) for batches in wanted
    } == {1, 2}
    for workers, start in ((2, 0), (0, 4), (1, 3), (0, 6)):
        found = list(loader(make_config(workers=workers), start_step=start))
        assert len(found) == 6 - start
        for left, right in zip(wanted[start:], found, strict=True):
            assert_equal(left, right)


def test_a_packed_step_survives_with_one_buffer(make_config: Make) -> None:
    batches = next(iter(loader(make_config())))
    content, buffer = pack(batches)
    assert buffer.dtype == torch.uint8 and len(content) < buffer.nbytes
    assert_equal(batches, unpack((content, buffer)))


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_early_leaves_no_worker_and_no_thread(make_config: Make, workers: int) -> None:
    before = threading.active_count()
    with loader(make_config(workers=workers), steps=50) as running:
        assert next(iter(running))[0].step == 0
        assert len(multiprocessing.active_children()) == workers
    deadline = time.monotonic() + 10  # the queues' feeder threads end a moment after the workers
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not multiprocessing.active_children() and threading.active_count() <= before


@pytest.fixture
def broken(make_config: Make, tmp_path: Path) -> Config:
    records = [item_record(number) for number in range(40)]
    records[1] = [
        (name, content[:60] if name.endswith("png") else content) for name, content in records[1]
    ]
    config = make_config()
    config.data.sets["things"].shards = str(write_set(tmp_path / "set", records))
    return config


@pytest.mark.parametrize("workers", [0, 1])
def test_one_broken_record_is_tolerated_and_a_low_limit_stops_the_run(
    broken: Config, workers: int
) -> None:
    broken.data.workers = workers
    batches = [
        batch for step in loader(broken, 9, weights={"things": 1.0}, mixed=0.0) for batch in step
    ]
    assert sum(len(batch.quarantined) for batch in batches) in (3, 4, 5), (
        "144 rows are 4 epochs of 36 records, spares included"
    )
    broken.data.bad_sample_limit = 0.001
    with pytest.raises(
        BadDataError,
        match=r"2 bad samples in the latest .*data\.bad_sample_limit=0\.001; last: things/1: ",
    ):
        list(loader(broken, 9, weights={"things": 1.0}, mixed=0.0))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_arrives_in_its_one_line_form(
    make_config: Make, tmp_path: Path, workers: int
) -> None:
    config = make_config(workers=workers)
    broken = [
        [(name, b"x" if name.endswith("png") else content) for name, content in item_record(number)]
        for number in range(20)
    ]
    config.data.sets["things"].shards = str(write_set(tmp_path / "set", broken))
    with pytest.raises(BadDataError) as caught:
        list(loader(config, weights={"things": 1.0}))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
