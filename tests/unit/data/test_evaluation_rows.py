"""Evaluation rows: in order, fixed, counted before decoding, and cut alike for any rank."""

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


def test_rows_come_in_order_and_are_the_same_every_time(make_config: Make) -> None:
    config = make_config()
    reader = open_datasets(config)["things"]
    view = reader.config.views["full"]
    first = list(EvaluationRows(reader, view, reader.positions("held_out"), config.data).batches(4))
    again = list(EvaluationRows(reader, view, reader.positions("held_out"), config.data).batches(4))
    assert [inputs.rows for inputs, _, _ in first] == [4, 2]
    assert np.concatenate([positions for _, positions, _ in first]).tolist() == [9, 19, 29, 39, 49, 59]
    for (left, _, left_ids), (right, _, right_ids) in zip(first, again, strict=True):
        assert torch.equal(left.images, right.images) and torch.equal(left.token_ids, right.token_ids)  # type: ignore[arg-type]
        assert torch.equal(left_ids, right_ids) and (left_ids >= 0).all()


def test_slices_of_ranks_add_up_to_the_whole(make_config: Make) -> None:
    config = make_config()
    reader = open_datasets(config)["histories"]
    rows = EvaluationRows(reader, reader.config.views["history"], reader.positions(), config.data)
    assert len(rows) == 24 * 4 and rows.group == 4
    whole = torch.cat([ids for _, _, ids in rows.batches(8)])
    parts = torch.cat([ids for start in (0, 48) for _, _, ids in rows.batches(12, start, start + 48)])
    assert torch.equal(whole, parts) and len(whole) == 96


def test_held_out_entries_give_one_row_each(make_config: Make) -> None:
    config = make_config()
    reader = open_datasets(config)["things"]
    view = reader.config.views["keyword"]
    rows = EvaluationRows(reader, view, [1, 2, 3, 17], config.data, text_from="held_out_tags")
    assert rows.positions.tolist() == [1, 3, 17] and len(rows) == 3
    inputs, positions, _ = next(rows.batches(8))
    expected = rows.decoder.tokenizer.texts([reader.body(int(position))["held_out_tags"]["en"][0] for position in positions])
    assert [row[mask].tolist() for row, mask in zip(inputs.token_ids, inputs.token_mask, strict=True)] == expected
    histories = open_datasets(config)["histories"]
    with pytest.raises(ConfigurationError, match="query_text"):
        EvaluationRows(histories, histories.config.views["history"], [0], config.data, text_from="held_out_tags")


def test_a_broken_record_is_left_out_with_a_warning(make_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [item_record(number) for number in range(6)]
    records[2] = [(name, content[:50] if name.endswith("png") else content) for name, content in records[2]]
    config = make_config()
    config.data.sets["things"].shards = str(write_set(tmp_path / "set", records))
    reader = open_datasets(config, names=["things"])["things"]
    with caplog.at_level(logging.WARNING, "sailplan.data"):
        _, _, ids = next(EvaluationRows(reader, reader.config.views["image"], reader.positions(), config.data).batches(8))
    assert (ids >= 0).tolist() == [True, True, False, True, True, True] and "things/2" in caplog.text
