"""Records that cannot be used are named once, and left out from the same step on, at any number
of ranks and across resumes; what a step trains on stays a function of the step and of that list.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from sailplan.cli.launched import Ended, launch
from sailplan.config.schema import Config
from sailplan.curriculum.testing import write_pack
from sailplan.data import exclusions
from sailplan.data.datasets import open_datasets
from sailplan.data.record import StepBatch
from sailplan.step.training_step import TrainingStep
from sailplan.train.run import train
from sailplan.train.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from jobs import job

STEPS, AFTER = 24, 4  # a record of 38 comes every 5 steps of 8 rows
POISONED = "things/007"
BROKEN = (3, 16, 41)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole pack, and one with pictures of zeros."""
    roots = {name: tmp_path_factory.mktemp(name) for name in ("whole", "broken")}
    for name, root in roots.items():
        write_pack(root)
        if name == "broken":
            for number in BROKEN:
                _zero_picture(root / "things", number)
        open_datasets(job(root, root / "runs"), names=["things", "choices"])
    return roots


def _zero_picture(folder: Path, number: int) -> None:
    place = 0
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            pictures = [one for one in archive if one.name.endswith(".webp")]
        if place <= number < place + len(pictures):
            one = pictures[number - place]
            with shard.open("r+b") as file:
                file.seek(one.offset_data)
                file.write(b"\0" * one.size)
        place += len(pictures)


def settings(pack: Path, runs: Path, **changes: Any) -> Config:
    usual = {
        "parallel__timeout_seconds": 60.0,
        "data__bad_sample_limit": 0.5,
        "checkpoint__every_steps": 0,  # a stop is saved in any case
    }
    config = job(pack, runs, **(usual | changes))
    config.order = ["first"]
    config.stages["first"].steps, config.evaluation.tasks = STEPS, {}
    config.data.workers, config.data.prefetch = 1, 2
    return config


def run(
    pack: Path, runs: Path, ranks: int, prepare: Callable[[], None] = lambda: None, **changes: Any
) -> Ended:
    """Train, and write which records each step trained on, by rank and start."""
    runs.mkdir(exist_ok=True)
    start = len(list(runs.glob("seen-*"))) // 8

    def work(rank: int) -> None:
        exclusions.AFTER = AFTER
        prepare()
        former = TrainingStep.run

        def noted(self: TrainingStep, batches: list[StepBatch], *rest: Any, **options: Any) -> Any:
            with (runs / f"seen-{start}-{rank}").open("a") as file:
                names = [name for batch in batches for name in batch.record_ids]
                file.write(json.dumps([options["step"], names]) + "\n")
            return former(self, batches, *rest, **options)

        TrainingStep.run = noted  # type: ignore[method-assign]
        train(settings(pack, runs, **changes))

    ended = launch(work, ranks, timeout=90)
    for rank in range(8):
        (runs / f"seen-{start}-{rank}").touch()
    return ended


def seen(runs: Path, start: int = 0) -> dict[int, list[str]]:
    """Step -> its records of all ranks."""
    found: dict[int, list[str]] = {}
    for file in runs.glob(f"seen-{start}-*"):
        for line in map(json.loads, file.read_text().splitlines()):
            found.setdefault(line[0], []).extend(line[1])
    return {step: sorted(names) for step, names in sorted(found.items())}


def lines(runs: Path, name: str = "quarantine.jsonl") -> list[dict[str, Any]]:
    path = runs / "job" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def stop_after(step: int) -> Callable[[], None]:
    def prepare() -> None:
        former = Trainer._after_step

        def stopping(self: Trainer, done: Any) -> None:
            if self.state.step == step:
                self.state.request_stop()
            former(self, done)

        Trainer._after_step = stopping  # type: ignore[method-assign]

    return prepare


def no_objects_in_a_step() -> None:
    """Make every object collective between a step's beginning and its end an error."""
    inside = [False]
    step, after = TrainingStep.run, Trainer._after_step

    def begun(self: TrainingStep, *rest: Any, **options: Any) -> Any:
        inside[0] = True
        return step(self, *rest, **options)

    def ended(self: Trainer, done: Any) -> None:
        after(self, done)
        inside[0] = False

    TrainingStep.run, Trainer._after_step = begun, ended  # type: ignore[method-assign]
    for name in ("all_gather_object", "broadcast_object_list", "gather_object"):
        former = getattr(dist, name)

        def watched(*rest: Any, former: Any = former, name: str = name, **options: Any) -> Any:
            assert not inside[0], f"{name} in a step"
            return former(*rest, **options)

        setattr(dist, name, watched)


def test_broken_records_are_named_once_and_steps_are_the_same_at_any_number_of_ranks(
    packs: dict[str, Path], tmp_path: Path
) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    assert run(packs["broken"], one, 1).codes == [0]
    ended = run(packs["broken"], three, 3, no_objects_in_a_step)
    assert ended.codes == [0] * 3, ended.said
    assert [line["id"] for line in sorted(lines(one), key=lambda one: one["id"])] == [
        f"things/{number:03d}" for number in BROKEN
    ]
    assert all("cannot be decoded" in line["reason"] for line in lines(one)), lines(one)
    assert lines(three) == lines(one) and seen(three) == seen(one) and len(seen(one)) == STEPS
    names = [name for step in seen(one).values() for name in step]
    assert not {f"things/{number:03d}" for number in BROKEN} & set(names)

    resumed = tmp_path / "resumed"
    assert run(packs["broken"], resumed, 3, stop_after(9)).codes == [75] * 3
    assert run(packs["broken"], resumed, 2).codes == [0] * 2
    assert lines(resumed) == lines(one)
    assert seen(resumed) | seen(resumed, 1) == seen(one)


def poison() -> None:
    """Make the picture of a record that decodes well infinite."""
    former = TrainingStep.run

    def poisoned(self: TrainingStep, batches: list[StepBatch], *rest: Any, **options: Any) -> Any:
        for batch in batches:
            for row, name in enumerate(batch.record_ids):
                view = batch.views.get("image")
                if name == POISONED and view is not None:
                    place = int(view.order[row])
                    for inputs in view.micro_batches:
                        if 0 <= place < inputs.rows:
                            inputs.images = inputs.images / 127.5 - 1  # type: ignore[attr-defined]
                            inputs.images[place] = math.inf  # type: ignore[attr-defined]
                        place -= inputs.rows
        return former(self, batches, *rest, **options)

    TrainingStep.run = poisoned  # type: ignore[method-assign]


def test_a_record_whose_vectors_are_not_finite_twice_is_left_out_and_a_resume_knows(
    packs: dict[str, Path], tmp_path: Path
) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    ended = run(packs["whole"], one, 1, poison)
    assert ended.codes == [0], ended.said
    ended = run(packs["whole"], three, 3, poison)
    assert ended.codes == [0] * 3, ended.said
    skipped = lines(one, "skipped_steps.jsonl")
    assert len(skipped) >= 2 and all(
        [record["id"] for record in line["records"]] == [POISONED] and line["offence"]
        for line in skipped
    )
    (line,) = lines(one)
    assert line["id"] == POISONED and line["step"] == skipped[1]["step"]
    first = line["excluded_from"] - 1  # steps of the stage count from 0
    with_it = [step for step, names in seen(one).items() if POISONED in names]
    assert len(with_it) >= 2 and max(with_it) < first < STEPS - 6, with_it
    assert lines(three) == [line] and lines(three, "skipped_steps.jsonl") == skipped
    assert seen(three) == seen(one)

    resumed = tmp_path / "resumed"  # after the first offence, and after the second
    both = lambda: (poison(), stop_after(skipped[0]["step"])())  # noqa: E731
    assert run(packs["whole"], resumed, 3, both).codes == [75] * 3
    both = lambda: (poison(), stop_after(skipped[1]["step"] + 1)())  # noqa: E731
    assert run(packs["whole"], resumed, 2, both).codes == [75] * 2
    assert run(packs["whole"], resumed, 1, poison).codes == [0]
    assert lines(resumed) == [line] and lines(resumed, "skipped_steps.jsonl") == skipped
    assert seen(resumed) | seen(resumed, 1) | seen(resumed, 2) == seen(one)


def test_the_limit_stops_any_number_of_ranks_in_the_same_step_with_the_same_words(
    packs: dict[str, Path], tmp_path: Path
) -> None:
    ends = {}
    for ranks in (1, 3):
        runs = tmp_path / str(ranks)
        ended = run(packs["broken"], runs, ranks, data__bad_sample_limit=0.001)
        said = [line.partition("sailplan: ")[2] for line in ended.said]
        said = [line for line in said if not line.startswith("alert: bad_samples")]
        assert ended.codes == [65] * ranks and len(said) == 1, ended.said
        ends[ranks] = said[0], lines(runs)
    assert ends[1] == ends[3] and "2 bad samples in the latest" in ends[1][0]
    assert len(ends[1][1]) == 2 and ends[1][1][-1]["id"] in ends[1][0]


def test_a_full_disk_under_the_quarantine_is_said_and_training_goes_on(
    packs: dict[str, Path], tmp_path: Path
) -> None:
    def full() -> None:
        former = Path.open

        def refused(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if self.name == "quarantine.jsonl" and mode == "a":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return former(self, mode, *rest, **options)

        Path.open = refused  # type: ignore[method-assign,assignment]

    ended = run(packs["broken"], tmp_path, 2, full)
    assert ended.codes == [0, 0], ended.said
    assert any(
        "No space left on device" in line and "training goes on" in line for line in ended.said
    )
