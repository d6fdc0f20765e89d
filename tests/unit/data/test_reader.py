"""Records: each kind's format, plain shards, and what is said about records that cannot be used."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sailplan.config.schema import Config, DatasetConfig
from sailplan.data.datasets import open_datasets
from sailplan.data.index import ShardIndex
from sailplan.data.reader import BadSample, RecordReader
from sailplan.data.testing import Member, json_member, png, wav, write_set
from sailplan.errors import BadDataError

Make = Callable[..., Config]


def open_items(folder: Path, **options: Any) -> RecordReader:
    return RecordReader("mine", DatasetConfig(**options), ShardIndex(sorted(folder.glob("*.tar"))))


def test_items_pairs_and_scores(make_config: Make) -> None:
    readers = open_datasets(make_config())
    record = readers["things"].read(4)
    assert (
        record.item is not None
        and record.item.id == "things/4"
        and len(record.item.images) == 1
        and record.item.audio
    )
    assert record.item.extra["group"] == 1 and readers["things"].read(9).split == "held_out"
    assert readers["things"].read(4, media=frozenset()).item.images == ()  # type: ignore[union-attr]
    pair = readers["choices"].read(7)
    assert (
        pair.query is not None
        and pair.query.fields == {"text": {"en": "choose tree 7"}}
        and not pair.query.images
    )
    assert (
        pair.target is not None
        and pair.target.id == "things/7"
        and pair.extra == {"user": "u2"}
        and pair.score is None
    )
    graded = readers["graded"].read(8)
    assert (graded.query.id, graded.target.id, graded.score) == ("things/8", "things/9", 0.2)  # type: ignore[union-attr]
    assert readers["graded"].scored and not readers["choices"].scored


def test_sequences_hold_out_a_target_that_is_not_in_the_history(make_config: Make) -> None:
    reader = open_datasets(make_config())["histories"]
    for position in range(len(reader)):
        items = reader.body(position)["items"]
        fixed, drawn = (
            reader.read(position),
            [reader.read(position, seed=seed) for seed in range(8)],
        )
        assert fixed == reader.read(position), "evaluation always holds out the same"
        for record in [fixed, *drawn]:
            history = [item.id for item in record.history]
            assert (
                record.target is not None
                and record.target.id in items
                and record.target.id not in history
            )
            assert (
                len(history) == min(4, len(items) - 1)
                and [item for item in items if item in history] == history
            )
        assert reader.sequence_ids(position) == (
            [item.id for item in fixed.history],
            fixed.target.id,
        )  # type: ignore[union-attr]
    assert len({reader.sequence_ids(11, seed)[1] for seed in range(30)}) > 4, (
        "training draws among all"
    )


def test_given_history_and_target_are_kept_with_the_latest_items(
    make_config: Make, tmp_path: Path
) -> None:
    config = make_config()
    body = {"id": "a", "history": [f"things/{n}" for n in range(7)], "target": "things/9"}
    config.data.sets["histories"].shards = str(
        write_set(tmp_path / "set", [[json_member("a", body)]])
    )
    record = open_datasets(config)["histories"].read(0, seed=5)
    assert [item.id for item in record.history] == ["things/3", "things/4", "things/5", "things/6"]
    assert record.target is not None and record.target.id == "things/9"


def test_plain_shards_with_a_picture_and_a_caption_are_items(tmp_path: Path) -> None:
    records: list[list[Member]] = [
        [("000.0.png", png(1)), ("000.1.png", png(2)), ("000.txt", b"two frames")],
        [("001.flac", wav(1)), ("001.TXT", b"a sound")],
    ]
    reader = open_items(write_set(tmp_path / "set", records, per_shard=1))
    first, second = reader.read(0).item, reader.read(1).item
    assert (
        first is not None
        and first.id == "part-000/000"
        and first.fields == {"title": {"en": "two frames"}}
        and first.images == (png(1), png(2))
    )
    assert (
        second is not None
        and second.id == "part-001/001"
        and second.audio == wav(1)
        and second.fields["title"] == {"en": "a sound"}
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"id": "a", ', "broken JSON"),
        (b"[1, 2]", "expected an object"),
        (b'{"id": "a", "fields": {"title": {"en": 7}}}', r"title\.en is a int"),
    ],
)
def test_unusable_json_is_a_bad_sample_and_not_the_end(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    reader = open_items(
        write_set(tmp_path / "set", [[("x.json", content)], [json_member("y", {"id": "fine"})]])
    )
    with pytest.raises(BadSample, match=reason):
        reader.read(0)
    assert reader.read(1).id == "fine"


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        (
            "choices",
            {"id": "a", "text": "b", "item": "things/999"},
            "things/999 is not in the catalogue 'things'",
        ),
        ("choices", {"id": "a", "item": "things/1"}, "needs `text` or `query`"),
        ("histories", {"id": "a", "items": ["things/1", "things/1"]}, "at least 2 different"),
        (
            "histories",
            {"id": "a", "history": ["things/1"], "target": "nothing"},
            "nothing is not in the catalogue",
        ),
        (
            "histories",
            {"id": "a", "history": ["things/1"], "target": "things/2", "target_probability": 2},
            "at most 1",
        ),
    ],
)
def test_unknown_ids_are_named(
    make_config: Make, tmp_path: Path, name: str, body: dict[str, Any], reason: str
) -> None:
    config = make_config()
    config.data.sets[name].shards = str(write_set(tmp_path / "set", [[json_member("a", body)]]))
    with pytest.raises(BadSample, match=reason):
        open_datasets(config)[name].read(0)


def test_a_shard_that_changes_while_in_use_is_noticed(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [[json_member("a", {"id": "one"})]])
    reader = open_items(folder)
    assert reader.read(0).id == "one"
    (shard,) = folder.glob("*.tar")
    known = shard.stat().st_mtime_ns
    write_set(folder, [[json_member("a", {"id": "two"})]])
    os.utime(shard, ns=(known, known + 10**7))  # the clock of a file system is coarse
    with pytest.raises(BadDataError, match=r"part-000\.tar: was written to while in use"):
        reader.sequence_ids(0)  # not kept, as an item is
    os.utime(shard, ns=(known, known))
    with pytest.raises(BadSample, match="changed while in use"):
        reader.sequence_ids(0)


def test_a_disk_that_does_not_give_a_record_makes_one_bad_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [[json_member(name, {"id": name})] for name in ("one", "two")]
    reader = open_items(write_set(tmp_path / "set", records))
    assert reader.read(1).id == "two"

    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("sailplan.data.shard_files.os.pread", broken)
        with pytest.raises(BadSample, match=r"cannot be read \(Input/output error\)"):
            reader.read(0)
    assert reader.read(0).id == "one"


def test_a_shard_that_changed_before_it_is_opened_stops_the_run(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [[json_member("a", {"id": "one"})]])
    reader = open_items(folder)
    write_set(folder, [[json_member("a", {"id": "two"})]])
    with pytest.raises(
        BadDataError,
        match=r"part-000\.tar: changed since it was indexed, .*; run `sailplan data index`",
    ):
        reader.read(0)


def test_a_pickled_reader_reads_on(make_config: Make) -> None:
    reader = open_datasets(make_config())["choices"]
    assert pickle.loads(pickle.dumps(reader)).read(3) == reader.read(3)


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("things", {"fields": "a title"}, "fields is a str"),
        ("graded", {"query": "things/1", "item": "things/2", "score": "high"}, "score is 'high'"),
        (
            "graded",
            {"query": "things/1", "item": "things/2", "score": float("nan")},
            "score is nan",
        ),
        ("histories", {"history": "things/1", "target": "things/2"}, "history is a str"),
        ("histories", {"items": {"things/1": 1}}, "items is a dict"),
    ],
)
def test_values_of_another_type_are_a_bad_sample_wherever_they_are_read(
    make_config: Make, tmp_path: Path, name: str, body: dict[str, Any], reason: str
) -> None:
    config = make_config()
    whole: dict[str, Any] = {
        "graded": {"query": "things/1", "item": "things/2", "score": 1},
        "histories": {"items": ["things/1", "things/2"]},
    }
    config.data.sets[name].shards = str(
        write_set(
            tmp_path,
            [[json_member("0", body)], [json_member("1", whole.get(name, {}))], [("2.json", b"{")]],
        )
    )
    reader = open_datasets(config, names=[name])[name]
    with pytest.raises(BadSample, match=reason):
        reader.read(0)
    if name == "graded":
        assert reader.scored and [reader.score(position) for position in range(3)] == [
            None,
            1.0,
            None,
        ]
    if name == "histories":
        assert [reader.item_ids(position) for position in range(3)] == [
            [],
            ["things/1", "things/2"],
            [],
        ]
    assert reader.body(2) == {}
