"""The loader: equal batches for any worker count and starting step, records that are left out, no
processes left.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sailplan.config.schema import Config, StageConfig
from sailplan.data.ahead import pack, unpack
from sailplan.data.datasets import open_datasets
from sailplan.data.exclusions import Exclusion, Exclusions
from sailplan.data.loader import StepLoader
from sailplan.data.plan import Plan
from sailplan.data.reader import RecordReader
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
    exclusions: Exclusions | None = None,
) -> StepLoader:
    readers, stage = open_datasets(config), StageConfig(steps=steps, mixed_fraction=mixed)
    return StepLoader(
        Plan(config, "first", stage, weights, readers),
        readers,
        config,
        stage,
        start_step=start_step,
        exclusions=exclusions,
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


AFTER_READING = 12  # more steps than three workers are ahead


def listed(position: int, step: int) -> Exclusions:
    """A list with a record of things that is left out from a step of the stage on."""
    exclusions = Exclusions()
    exclusions.add([Exclusion("things", position, 1 + step)])
    return exclusions


@pytest.fixture
def broken(make_config: Make, tmp_path: Path) -> Config:
    records = [item_record(number) for number in range(40)]
    records[1] = [
        (name, content[:60] if name.endswith("png") else content) for name, content in records[1]
    ]
    config = make_config()
    config.data.sets["things"].shards = str(write_set(tmp_path / "set", records))
    return config


def things(broken: Config, steps: int, **options: Any) -> StepLoader:
    return loader(broken, steps, weights={"things": 1.0}, mixed=0.0, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_broken_record_is_replaced_and_named_with_its_position(
    broken: Config, workers: int
) -> None:
    broken.data.workers = workers
    batches = [batch for step in things(broken, 9) for batch in step]
    named = {one[:] for batch in batches for one in batch.quarantined}
    assert {(name, position) for name, _, position in named} == {("things/1", 1)}
    assert sum(len(batch.quarantined) for batch in batches) in (3, 4, 5), (
        "144 rows are 4 epochs of 36 records, spares included"
    )
    assert all(len(batch.positions) == len(batch.record_ids) == 16 for batch in batches)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_is_added_while_reading_is_left_out_from_its_step_on_by_all_workers(
    broken: Config, workers: int
) -> None:
    """A record that is no broken one, so that only the list can keep it out."""
    broken.data.workers = workers
    steps, found, left_out = 40, 3, 3 + AFTER_READING
    wanted = list(things(broken, steps, exclusions=listed(8, left_out)))
    exclusions, batches = Exclusions(), []
    for step in things(broken, steps, exclusions=exclusions):
        batches.append(step)
        if step[0].step == found:
            exclusions.add([Exclusion("things", 8, 1 + left_out)])
    for left, right in zip(wanted, batches, strict=True):
        assert_equal(left, right)
    seen = [batch[0].step for batch in batches if "things/8" in batch[0].record_ids]
    assert len(seen) > 3 and max(seen) < left_out < steps
    resumed = list(things(broken, steps, start_step=20, exclusions=exclusions))
    for left, right in zip(wanted[20:], resumed, strict=True):
        assert_equal(left, right)


def test_a_broken_record_on_the_list_has_the_same_spare_and_is_not_read(
    broken: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = list(things(broken, 9))
    read, former = list[int](), RecordReader.read

    def counted(self: RecordReader, position: int, **options: Any) -> Any:
        read.append(position)
        return former(self, position, **options)

    monkeypatch.setattr(RecordReader, "read", counted)
    found = list(things(broken, 9, exclusions=listed(1, 0)))
    assert 1 not in read and not any(batch.quarantined for step in found for batch in step)
    for left, right in zip(wanted, found, strict=True):
        assert_equal(left, right)


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
