"""The committed quick-start sets through the real configuration: no held-out record in training,
no bad sample.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sailplan.config.compose import compose
from sailplan.config.schema import Config, StageConfig
from sailplan.data.collate import Collator
from sailplan.data.datasets import open_datasets
from sailplan.data.evaluation import EvaluationRows
from sailplan.data.plan import Plan

ROOT = Path(__file__).resolve().parents[3]

SETS = ["emoji", "icons", "prompts", "icon_choices", "icon_histories", "emoji_pairs"]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(ROOT)
    return compose(["experiment=quickstart", "global_batch=16"])


@pytest.mark.parametrize("name", SETS)
def test_a_step_of_each_set_is_whole_and_trains_on_no_held_out_record(
    config: Config, name: str
) -> None:
    readers = open_datasets(config, names=[name])
    stage = StageConfig(steps=4)
    plan = Plan(config, "check", stage, {name: 1.0}, readers)
    held_out = set(readers[name].ids(readers[name].positions("held_out")))
    halves = [Collator(config, stage, plan, readers, rank, 2) for rank in range(2)]
    for step in (0, 3):
        batches = [half.batches(step)[0] for half in halves]
        assert (
            not any(batch.quarantined for batch in batches)
            and batches[0].digest == batches[1].digest
        )
        assert sum(len(batch.record_ids) for batch in batches) == 16
        assert not held_out & {record for batch in batches for record in batch.record_ids}
        for view in batches[0].views.values():
            assert view.group > 1 or view.valid.float().mean() > 0.9


def test_held_out_keywords_are_queries_that_training_text_does_not_hold(config: Config) -> None:
    reader = open_datasets(config, names=["emoji"])["emoji"]
    view = reader.config.views["keyword"]
    positions = reader.positions("train")[:40]
    rows = EvaluationRows(reader, view, positions, config, "held_out_tags").positions.tolist()
    assert rows == sorted(rows) and len(rows) > 20
    for position in rows[:10]:
        body = reader.body(position)
        assert not set(body["held_out_tags"]["en"]) & set(body["fields"]["tags"].get("en", []))
