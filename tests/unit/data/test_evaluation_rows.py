"""Evaluation rows: fixed, cut by length before anything is decoded, and shared out alike by all
ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sailplan.config.schema import Config
from sailplan.data.datasets import open_datasets
from sailplan.data.evaluation import EvaluationRows
from sailplan.data.testing import item_record, write_set
from sailplan.errors import ConfigurationError

Make = Callable[..., Config]


def test_rows_are_the_same_every_time_and_each_is_in_one_batch(make_config: Make) -> None:
    config = make_config()
    config.evaluation.batch = 4
    reader = open_datasets(config)["things"]
    view = reader.config.views["full"]
    rows, again = (
        EvaluationRows(reader, view, reader.positions("held_out"), config) for _ in range(2)
    )
    ((first, second),) = rows.shares(1)
    assert (
        rows.positions.tolist() == [9, 19, 29, 39, 49, 59]
        and sorted([*first, *second]) == list(range(6))
        and max(len(first), len(second)) <= 4
    )
    for batch in (first, second):
        (left, left_ids), (right, right_ids) = rows.inputs(batch), again.inputs(batch)
        assert torch.equal(left.images, right.images) and torch.equal(
            left.token_ids, right.token_ids
        )  # type: ignore[arg-type]
        assert torch.equal(left_ids, right_ids) and (left_ids >= 0).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 30])
def test_shares_add_up_to_all_histories_uncut(make_config: Make, ranks: int) -> None:
    config = make_config()
    config.evaluation.batch = 8
    reader = open_datasets(config)["histories"]
    rows = EvaluationRows(reader, reader.config.views["history"], reader.positions(), config)
    assert len(rows) == 24 * 4 and rows.group == 4
    shares = rows.shares(ranks)
    assert sorted(row for own in shares for batch in own for row in batch) == list(range(96))
    assert all(
        len(batch) <= 8 and batch[::4].tolist() == (batch[3::4] - 3).tolist()
        for own in shares
        for batch in own
    )
    assert {len(own) for own in shares} == ({-(-12 // ranks)} if ranks <= 24 else {1, 0}), (
        "the same number of forward passes"
    )
    _, whole = rows.inputs(np.arange(96))
    for own in shares:
        for batch in own:
            assert torch.equal(rows.inputs(batch)[1], whole[batch])


def test_held_out_entries_give_one_row_each(make_config: Make) -> None:
    config = make_config()
    reader = open_datasets(config)["things"]
    view = reader.config.views["keyword"]
    rows = EvaluationRows(reader, view, [1, 2, 3, 17], config, text_from="held_out_tags")
    assert rows.positions.tolist() == [1, 3, 17] and len(rows) == 3
    inputs, _ = rows.inputs(np.arange(3))
    expected = rows.processor.tokenizer.texts(
        [reader.body(int(position))["held_out_tags"]["en"][0] for position in rows.positions]
    )
    assert [
        row[mask].tolist() for row, mask in zip(inputs.token_ids, inputs.token_mask, strict=True)
    ] == expected
    histories = open_datasets(config)["histories"]
    with pytest.raises(ConfigurationError, match="query_text"):
        EvaluationRows(
            histories, histories.config.views["history"], [0], config, text_from="held_out_tags"
        )


def test_a_broken_record_is_left_out_with_a_warning(
    make_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [item_record(number) for number in range(6)]
    records[2] = [
        (name, content[:50] if name.endswith("png") else content) for name, content in records[2]
    ]
    config = make_config()
    config.data.sets["things"].shards = str(write_set(tmp_path / "set", records))
    reader = open_datasets(config, names=["things"])["things"]
    with caplog.at_level(logging.WARNING, "sailplan.data"):
        _, ids = EvaluationRows(
            reader, reader.config.views["image"], reader.positions(), config
        ).inputs(np.arange(6))
    assert (ids >= 0).tolist() == [
        True,
        True,
        False,
        True,
        True,
        True,
    ] and "things/2" in caplog.text
