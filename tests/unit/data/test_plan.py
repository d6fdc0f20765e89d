"""The plan: pure, the same for any number of ranks, continuing each data set where its last step
stopped.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sailplan.config.schema import Config, StageConfig
from sailplan.data import plan as plan_module
from sailplan.data.datasets import open_datasets
from sailplan.data.plan import Plan
from sailplan.data.reader import RecordReader
from sailplan.data.testing import item_body, json_member, write_set
from sailplan.errors import ConfigurationError

Make = Callable[..., Config]


@pytest.fixture
def readers(make_config: Make) -> dict[str, RecordReader]:
    return open_datasets(make_config())


def make_plan(
    config: Config,
    readers: dict[str, RecordReader],
    steps: int = 100,
    mixed: float = 0.0,
    **options: object,
) -> Plan:
    weights = {"things": 2.0, "choices": 1.0, "histories": 1.0}
    return Plan(
        config, "first", StageConfig(steps=steps, mixed_fraction=mixed), weights, readers, **options
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("mixed", [0.0, 0.5])
def test_any_starting_point_reads_the_same_records(
    make_config: Make, readers: dict[str, RecordReader], mixed: float
) -> None:
    config = make_config(global_batch=24)
    plan = make_plan(config, readers, mixed=mixed)
    wanted = {
        step: (plan.digest(step), [part.positions.tolist() for part in plan.step(step).parts])
        for step in range(30)
    }
    for _ in range(2):
        other = make_plan(config, readers, mixed=mixed)
        for step in (29, 3, 17, 0):  # in any order: nothing is remembered
            assert other.digest(step) == wanted[step][0]
            for part, positions in zip(other.step(step).parts, wanted[step][1], strict=True):
                assert part.positions.tolist() == positions


@pytest.mark.parametrize("mixed", [0.0, 0.3])
def test_every_epoch_of_every_set_is_complete_across_steps(
    make_config: Make, readers: dict[str, RecordReader], mixed: float
) -> None:
    plan = make_plan(make_config(), readers, mixed=mixed)
    seen: dict[str, list[int]] = {name: [] for name in plan.names}
    for step in range(60):
        assert plan.rows_seen(step) == {name: len(rows) for name, rows in seen.items()}
        for part in plan.step(step).parts:
            seen[part.dataset] += part.positions.tolist()
    train = readers["things"].positions("train").tolist()
    for epoch in range(len(seen["things"]) // len(train)):
        assert sorted(seen["things"][epoch * len(train) : (epoch + 1) * len(train)]) == train, (
            "each once, held-out never"
        )


def test_rows_seen_is_the_plain_sum_far_into_a_stage(
    make_config: Make, readers: dict[str, RecordReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(make_config(), readers, mixed=0.3, steps=10**6)
    near, far = plan.rows_seen(1000), plan.rows_seen(200_000)
    assert sum(far.values()) == 16 * 200_000
    monkeypatch.setattr(plan_module, "BLOCK_STEPS", 64)
    assert make_plan(make_config(), readers, mixed=0.3, steps=10**6).rows_seen(1000) == near


def test_data_sets_are_drawn_by_weight_and_steps_are_pure_or_mixed(
    make_config: Make, readers: dict[str, RecordReader]
) -> None:
    plan = make_plan(make_config(global_batch=32), readers, mixed=0.25)
    drawn = plan.draws(0, 4000)
    assert abs((drawn == plan.names.index("things")).mean() - 0.5) < 0.03
    several = (drawn != drawn[:, :1]).any(axis=1).mean()
    assert 0.18 < several < 0.27, "a mixed step may draw one set four times by chance"
    assert make_plan(make_config(), readers).draws(0, 500).std(axis=1).max() == 0
    for step in range(20):
        assert sum(len(part.positions) for part in plan.step(step).parts) == 32


@pytest.mark.parametrize(("batch", "rows"), [(64, 16), (64, 4), (30, 10), (64, 100)])
def test_a_mixed_step_has_sub_batches_of_the_rows_that_are_asked_for(
    make_config: Make, readers: dict[str, RecordReader], batch: int, rows: int
) -> None:
    weights = {"things": 2.0, "choices": 1.0, "histories": 1.0}
    stage = StageConfig(steps=100, mixed_fraction=1.0, mixed_rows=rows)
    plan = Plan(make_config(global_batch=batch), "first", stage, weights, readers)
    unit = 8 if batch % 8 == 0 else 1
    size = min(max(rows, unit), batch)
    found = {len(part) for step in range(40) for part in plan.step(step).parts}
    assert all(count % size == 0 for count in found)
    assert size in found
    assert all(sum(map(len, plan.step(step).parts)) == batch for step in range(40))
    mixtures = [len(plan.step(step).parts) for step in range(40)]
    assert max(mixtures) == (1 if size == batch else 3)


def test_stage_seed_and_step_change_the_draw(
    make_config: Make, readers: dict[str, RecordReader]
) -> None:
    config = make_config()
    weights = {"things": 1.0}
    digests = {
        Plan(make_config(seed=seed), stage, StageConfig(steps=3), weights, readers).digest(step)
        for seed in (1, 2)
        for stage in ("first", "second")
        for step in (0, 1)
    }
    assert len(digests) == 8
    assert Plan(config, "first", StageConfig(steps=3), weights, readers).digest(1) == Plan(
        config, "first", StageConfig(steps=9), weights, readers
    ).digest(1)


def test_a_subset_is_all_that_is_read(make_config: Make, readers: dict[str, RecordReader]) -> None:
    subset = np.array([0, 3, 4, 11, 30, 31])
    plan = Plan(
        make_config(),
        "clean",
        StageConfig(steps=5),
        {"things": 1.0},
        readers,
        subsets={"things": subset},
    )
    rows = np.concatenate([plan.step(step).parts[0].positions for step in range(3)])
    assert sorted(rows.tolist()) == sorted(subset.tolist() * 8)
    spares = {
        plan.spare("things", step, row, attempt)
        for step in range(3)
        for row in range(5)
        for attempt in range(3)
    }
    assert spares <= set(subset.tolist()) and len(spares) > 3


def test_a_pickled_plan_goes_on_equally(
    make_config: Make, readers: dict[str, RecordReader]
) -> None:
    plan = make_plan(make_config(), readers)
    assert pickle.loads(pickle.dumps(plan)).digest(7) == plan.digest(7)


def test_impossible_plans_are_refused_in_one_line(
    make_config: Make, readers: dict[str, RecordReader]
) -> None:
    stage = StageConfig(steps=2)
    with pytest.raises(ConfigurationError, match="weights"):
        Plan(make_config(), "s", stage, {"things": -1.0}, readers)
    with pytest.raises(ConfigurationError, match="no record"):
        Plan(
            make_config(),
            "s",
            stage,
            {"things": 1.0},
            readers,
            subsets={"things": np.empty(0, dtype=np.int64)},
        )
    with pytest.raises(ConfigurationError, match="not open"):
        Plan(make_config(), "s", stage, {"absent": 1.0}, readers)


def test_other_records_or_splits_are_another_digest(make_config: Make, tmp_path: Path) -> None:
    """A node that sees other shards of the same sizes would train on another order: the step's
    digest says so.
    """
    config = make_config()
    found = []
    for name, changed in (
        ("same", {}),
        ("copy", {}),
        ("id", {"id": "x"}),
        ("split", {"split": "held_out"}),
    ):
        bodies = [
            item_body(number) | (changed if number in (3, 9) else {}) for number in range(8)
        ] + [item_body(9) | {"split": "train"}] * (name != "split")
        folder = write_set(
            tmp_path / name,
            [[json_member(f"{number}", body)] for number, body in enumerate(bodies)],
        )
        config.data.sets = {"things": replace(config.data.sets["things"], shards=str(folder))}
        found.append(
            Plan(
                config, "first", StageConfig(steps=3), {"things": 1.0}, open_datasets(config)
            ).digest(0)
        )
    assert found[0] == found[1] and len(set(found)) == 3


def test_the_order_of_known_data_stays_what_it_was(
    make_config: Make, readers: dict[str, RecordReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests of version 0.1.0, whose lanes were a setting: a reader that reads more must not
    give other ids, splits or places to what was read before.
    """
    monkeypatch.setattr("sailplan.data.plan.STREAMS", 4)
    stage = StageConfig(data={"things": 1.0, "choices": 1.0, "histories": 1.0}, steps=8)
    plan = Plan(make_config(), "one", stage, stage.data, readers)
    assert [plan.digest(step) for step in range(4)] == [
        "17b631a6ded52bf4",
        "fbc6da961161ea9e",
        "f0ad97b394795f81",
        "18a82b0ee14ecbb1",
    ]
    assert {name: reader.identity for name, reader in readers.items()} == {
        "things": "6efc6fddaf022ea8",
        "choices": "1b71cf93e75b818d",
        "graded": "80c1a6d41e2e2607",
        "histories": "b7d10786eb5f7b6e",
    }
