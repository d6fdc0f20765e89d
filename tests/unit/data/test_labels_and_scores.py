"""Risks: a class that is another one on another rank, a teacher's scores that belong to other
negatives than those that were drawn, a key that no record has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sailplan.config.schema import Config, DatasetConfig, PatternConfig, StageConfig, ViewConfig
from sailplan.data.collate import Collator
from sailplan.data.datasets import open_datasets
from sailplan.data.first_records import check_views
from sailplan.data.plan import Plan
from sailplan.data.reader import BadSample, RecordReader
from sailplan.data.record import StepBatch
from sailplan.data.testing import json_member, write_set
from sailplan.data.validation import validations
from sailplan.errors import ConfigurationError

Make = Callable[..., Config]
NEGATIVES = 3


def body(number: int) -> dict[str, Any]:
    """A pair whose k-th negative is called and scored by k; with 0 to 6 of them."""
    count = number % 7
    found: dict[str, Any] = {
        "id": f"p/{number}",
        "query": f"query {number}",
        "target": f"target {number}",
        "negatives": [f"negative {place}" for place in range(count)],
        "scores": [10.0 + number, *(float(place) for place in range(count))],
        "class": ["a", "b", 3, {"en": "c"}][number % 4],
    }
    if number % 7 == 3:
        found["scores"][2] = None
    if number % 8 == 7:
        del found["scores"], found["class"]
    return found


def scored(
    config: Config, folder: Path, bodies: list[dict[str, Any]], **changes: Any
) -> dict[str, RecordReader]:
    texts = {"modalities": ["text"], "fields": ["text"]}
    settings = {"negatives": NEGATIVES, "teacher_scores": "scores", "label": "class"} | changes
    config.data.sets["scored"] = DatasetConfig(
        shards=str(write_set(folder, [[json_member(str(n), one)] for n, one in enumerate(bodies)])),
        kind="pairs",
        views={"query": ViewConfig("query", **texts), "target": ViewConfig("target", **texts)},
        patterns={"q2t": PatternConfig("query", "target")},
        **settings,
    )
    config.order, config.stages = ["one"], {"one": StageConfig(data={"scored": 1.0}, steps=3)}
    return open_datasets(config, names=["scored"])


def step_batches(config: Config, readers: dict[str, RecordReader], ranks: int) -> list[StepBatch]:
    stage = config.stages["one"]
    plan = Plan(config, "one", stage, stage.data, readers)
    return [
        Collator(config, stage, plan, readers, rank, ranks).batches(0)[0] for rank in range(ranks)
    ]


def test_scores_are_those_of_the_negatives_that_were_drawn(
    make_config: Make, tmp_path: Path
) -> None:
    config = make_config(global_batch=16)
    readers = scored(config, tmp_path / "set", [body(n) for n in range(56)])
    check_views(config, readers)
    reader, drawn = readers["scored"], set()
    for position in range(56):
        record = reader.read(position, seed=position)
        assert len(record.negatives) == min(position % 7, NEGATIVES)
        if position % 8 == 7:
            assert record.teacher_scores == () and record.label is None
            continue
        first, *others = record.teacher_scores
        assert first == 10.0 + position
        for item, score in zip(record.negatives, others, strict=True):
            place = int(item.fields["text"]["en"].split()[1])
            drawn.add(place)
            assert score == place or (np.isnan(score) and position % 7 == 3 and place == 1)
    assert drawn == set(range(6))  # of long lists other ones than the first, too
    (found,) = validations(config, names=["scored"], processes=1)
    counted = {what: count for what, (count, _) in found.findings.counted.items()}
    assert counted == {"records without `scores`": 7, "records without `class`": 7}


def test_a_steps_scores_and_classes_are_the_same_on_any_number_of_ranks(
    make_config: Make, tmp_path: Path
) -> None:
    config = make_config(global_batch=16)
    readers = scored(config, tmp_path / "set", [body(n) for n in range(56)])
    (alone,), parts = step_batches(config, readers, 1), step_batches(config, readers, 3)
    assert alone.teacher_scores is not None and alone.labels is not None
    assert alone.teacher_scores.shape == (16, 1 + NEGATIVES)
    assert (alone.labels.dtype, alone.teacher_scores.dtype) == (torch.int64, torch.float32)
    whole = {
        name: (label, scores)
        for name, label, scores in zip(
            alone.record_ids,
            alone.labels.tolist(),
            alone.teacher_scores.nan_to_num(-1).tolist(),
            strict=True,
        )
    }
    for part in parts:
        for row, name in enumerate(part.record_ids):
            assert part.labels is not None and part.teacher_scores is not None
            mine = part.teacher_scores.nan_to_num(-1)[row].tolist()
            assert whole[name] == (int(part.labels[row]), mine)
    numbers = {name: int(name.partition("/")[2]) for name in whole}
    assert all((whole[name][0] == -1) == (n % 8 == 7) for name, n in numbers.items())
    known = {n % 4: whole[name][0] for name, n in numbers.items() if n % 8 != 7}
    assert len(set(known.values())) == len(known)  # one number a class, another one for another
    for name, n in numbers.items():
        if n % 8 != 7:
            assert whole[name][0] == known[n % 4] >= 0


def test_items_have_their_class_in_a_key_or_in_a_text_field(
    make_config: Make, tmp_path: Path
) -> None:
    config = make_config()
    bodies = [
        {"id": "0", "fields": {"label": {"en": "cat", "de": "Katze"}}},
        {"id": "1", "fields": {"label": "cat"}},
        {"id": "2", "label": "cat", "fields": {"title": "a"}},
        {"id": "3", "label": ["cat"], "fields": {"title": "a"}},
        {"id": "4", "label": 0, "fields": {"title": "a"}},
        {"id": "5", "label": "", "fields": {"title": "a"}},
        {"id": "6", "label": ["cat", "dog"], "fields": {"title": "a"}},
    ]
    folder = write_set(tmp_path / "set", [[json_member(one["id"], one)] for one in bodies])
    view = ViewConfig(modalities=["text"], fields=["label"])
    config.data.sets["animals"] = DatasetConfig(
        shards=str(folder), label="label", views={"text": view}
    )
    reader = open_datasets(config, names=["animals"])["animals"]
    assert [reader.read(n).label for n in range(6)] == ["cat", "cat", "cat", "cat", "0", None]
    with pytest.raises(BadSample, match="label is a list of 2, expected one value"):
        reader.read(6)


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([1.0, 2.0], "found 2 values, expected a list of 3"),
        (0.5, "found 0.5, expected a list of 3"),
        ([1.0, "high", 2.0], "scores is 'high', expected a number"),
        ([1.0, 2.0, float("nan")], "scores is nan, expected a number"),
    ],
)
def test_scores_that_fit_to_no_negatives_are_a_bad_sample(
    make_config: Make, tmp_path: Path, scores: Any, reason: str
) -> None:
    one = {"id": "a", "query": "q", "target": "t", "negatives": ["x", "y"], "scores": scores}
    reader = scored(make_config(), tmp_path / "set", [one])["scored"]
    with pytest.raises(BadSample, match=reason):
        reader.read(0)


@pytest.mark.parametrize("setting", ["label", "teacher_scores"])
def test_a_key_that_no_record_has_is_named_before_the_first_step(
    make_config: Make, tmp_path: Path, setting: str
) -> None:
    config = make_config()
    readers = scored(config, tmp_path / "set", [body(n) for n in range(56)], **{setting: "klass"})
    message = rf"data\.sets\.scored\.{setting}=klass: none of 56 records"
    with pytest.raises(ConfigurationError, match=message):
        check_views(config, readers)
