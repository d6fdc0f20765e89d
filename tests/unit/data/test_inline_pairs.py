"""Risks: pairs and triplets that hold their items themselves are read with another's media, or
foreseen at another length; a held-out
record that comes into training when shards are cut anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sailplan.config.schema import Config, DatasetConfig, PatternConfig, StageConfig, ViewConfig
from sailplan.data.collate import Collator
from sailplan.data.costs import RowCosts
from sailplan.data.datasets import open_datasets
from sailplan.data.first_records import check_views
from sailplan.data.index import ShardIndex
from sailplan.data.names import samples
from sailplan.data.plan import Plan
from sailplan.data.processor import processor_of
from sailplan.data.reader import BadSample, RecordReader
from sailplan.data.record import HardNegatives
from sailplan.data.tar import HeldOut
from sailplan.data.testing import WORDS, Member, json_member, png, wav, write_set
from sailplan.data.validation import validations
from sailplan.errors import BadDataError

Make = Callable[..., Config]


def triplet(number: int) -> list[Member]:
    """Texts in the JSON, pictures beside it: one as a member of its part, one given an id."""
    key, words = f"{number:03d}", [WORDS[number % 16], WORDS[(number + 5) % 16]]
    body: dict[str, Any] = {
        "id": f"t/{number}",
        "query": f"a {words[0]} thing",
        "target": {
            "id": f"item/{number % 5}",
            "fields": {"title": {"en": f"{words[0]} {number}", "de": "ding"}},
        },
        "negatives": [
            f"{words[1]} one",
            {"fields": {"title": f"{words[1]} two"}},
            {"text": "three"},
        ],
    }
    members = [
        json_member(key, body),
        (f"{key}.query.png", png(number)),
        (f"{key}.target.png", png(100 + number)),
        (f"{key}.target.wav", wav(number)),
    ]
    return [*members, (f"{key}.negative.1.png", png(200 + number))]


def inline(config: Config, folder: Path) -> Config:
    target = ViewConfig(
        of="target", modalities=["vision", "audio", "text"], fields=["title", "text"]
    )
    config.data.sets["triplets"] = DatasetConfig(
        shards=str(folder),
        kind="pairs",
        negatives=3,
        views={
            "query": ViewConfig(
                of="query", modalities=["text", "vision"], fields=["text"], prompt="Find the:"
            ),
            "target": target,
        },
        patterns={"q2i": PatternConfig("query", "target")},
    )
    config.order, config.stages = ["one"], {"one": StageConfig(data={"triplets": 1.0}, steps=3)}
    return config


def test_a_triplet_is_read_from_one_record(make_config: Make, tmp_path: Path) -> None:
    config = inline(make_config(), write_set(tmp_path / "set", [triplet(n) for n in range(24)]))
    reader = open_datasets(config, names=["triplets"])["triplets"]
    record = reader.read(7)
    assert (
        record.query is not None
        and record.target is not None
        and (record.id, record.query.id, record.target.id) == ("t/7", "t/7#query", "item/2")
    )
    assert (
        record.query.fields == {"text": {"en": f"a {WORDS[7]} thing"}}
        and record.query.images == (png(7),)
        and record.query.audio is None
    )
    assert (
        record.target.fields["title"]["de"] == "ding"
        and record.target.images == (png(107),)
        and record.target.audio == wav(7)
    )
    texts = [next(iter(item.fields.values()))["en"] for item in record.negatives]
    assert texts == [f"{WORDS[12]} one", f"{WORDS[12]} two", "three"] and [
        item.images for item in record.negatives
    ] == [(), (png(207),), ()]
    assert reader.read(7, media=frozenset(), needs=["query"]).target is None
    (found,) = validations(config, names=["triplets"], processes=1)
    assert (
        found.problems == []
        and found.notes == []
        and found.findings.endings == {"picture": {"png": 72}, "sound": {"wav": 24}}
    )


def test_what_such_rows_cost_is_foreseen_as_it_then_is(make_config: Make, tmp_path: Path) -> None:
    config = inline(make_config(), write_set(tmp_path / "set", [triplet(n) for n in range(24)]))
    config.data.sets["triplets"].field_drop = 0.0
    readers = open_datasets(config, names=["triplets"])
    check_views(config, readers)
    reader, processor, positions = (
        readers["triplets"],
        processor_of(config),
        np.arange(24, dtype=np.int64),
    )
    costs = RowCosts(config, processor)
    for name, view in reader.config.views.items():
        rows = [
            processor.row(getattr(reader.read(int(position)), view.of), view, reader.config)
            for position in positions
        ]
        counted = [
            processor.cost(row, len(tokens), view)
            for row, tokens in zip(rows, processor.tokens(rows, view), strict=True)
        ]
        assert costs.foreseen(reader, view, positions, None).costs[:, 0].tolist() == counted, name
    view = reader.config.views["target"]
    foreseen = costs.foreseen_own(reader, view, positions, 3, lambda held, _: held).costs
    for position in positions.tolist():
        rows = [
            processor.row(item, view, reader.config) for item in reader.read(position).negatives
        ]
        counted = [
            processor.cost(row, len(tokens), view)
            for row, tokens in zip(rows, processor.tokens(rows, view), strict=True)
        ]
        assert foreseen[position].tolist() == counted


def test_a_step_of_triplets_has_their_negatives(make_config: Make, tmp_path: Path) -> None:
    config = inline(
        make_config(global_batch=8), write_set(tmp_path / "set", [triplet(n) for n in range(24)])
    )
    readers = open_datasets(config, names=["triplets"])
    stage = config.stages["one"]
    collator = Collator(
        config, stage, Plan(config, "one", stage, stage.data, readers), readers, 0, 1
    )
    (batch,) = collator.batches(0)
    assert (
        batch.quarantined == []
        and batch.views[HardNegatives("q2i")].valid.all()
        and len(batch.views[HardNegatives("q2i")].ids) == 24
    )
    targets = {int(one) for one in batch.views["target"].ids}
    assert len(targets) <= 5, "a target with an id is the same document in every record"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"query": "a"}, "needs item or target, or members KEY.target"),
        ({"target": "a"}, "needs query or text, or members KEY.query"),
        ({"query": 0, "target": "a"}, "field text.en is a int"),
        ({"query": "a", "target": {"fields": "title"}}, "fields is a str"),
        ({"query": "a", "target": "b", "negatives": "c"}, "negatives is a str"),
    ],
)
def test_pairs_that_lack_a_side_are_bad_samples(
    make_config: Make, tmp_path: Path, body: dict[str, Any], reason: str
) -> None:
    config = inline(make_config(), write_set(tmp_path / "set", [[json_member("0", body)]]))
    readers = open_datasets(config, names=["triplets"])
    with pytest.raises(BadSample, match=reason):
        readers["triplets"].read(0)
    with pytest.raises(
        BadDataError, match=r"data\.sets\.triplets: none of the first records can be used"
    ):
        check_views(config, readers)


def test_texts_and_pictures_without_json_are_pairs_too(tmp_path: Path) -> None:
    members = [
        ("0.query.txt", b"red"),
        ("0.query.0.png", png(0)),
        ("0.query.1.png", png(1)),
        ("0.target.txt", b"a red boot"),
        ("0.negative_1.txt", b"blue"),
    ]
    assert [key for key, _ in samples([name for name, _ in members])] == ["0"]
    reader = RecordReader(
        "mine",
        DatasetConfig(kind="pairs", negatives=2),
        ShardIndex(sorted(write_set(tmp_path, [members]).glob("*.tar"))),
    )
    record = reader.read(0)
    assert (
        record.query is not None
        and record.query.images == (png(0), png(1))
        and record.query.fields == {"text": {"en": "red"}}
    )
    assert record.target is not None and record.target.fields == {"text": {"en": "a red boot"}}
    assert [item.fields["text"]["en"] for item in record.negatives] == ["blue"]


def test_an_object_and_a_text_in_languages_are_told_apart(tmp_path: Path) -> None:
    body = {
        "query": {"en": "shoe", "id": "sepatu"},
        "target": {"id": "x", "text": ["a", "b"], "brand": 7},
    }
    reader = RecordReader(
        "mine",
        DatasetConfig(kind="pairs"),
        ShardIndex(sorted(write_set(tmp_path, [[json_member("0", body)]]).glob("*.tar"))),
    )
    record = reader.read(0)
    assert record.query is not None and record.query.fields == {
        "text": {"en": "shoe", "id": "sepatu"}
    }
    assert record.target is not None and (
        record.target.id,
        record.target.fields,
        record.target.extra,
    ) == ("x", {"text": {"en": ["a", "b"]}}, {"brand": 7})


def held(folder: Path, rule: HeldOut | None) -> set[str]:
    index = ShardIndex(sorted(folder.glob("*.tar")), held_out=rule)
    return set(index.ids(index.positions("held_out")))


def test_what_is_held_out_depends_on_the_value_alone(tmp_path: Path) -> None:
    records = [
        [
            json_member(
                f"{n}",
                {"id": f"r{n}", "user": f"u{n % 40}"} | ({"split": "train"} if n == 5 else {}),
            )
        ]
        for n in range(400)
    ]
    one, other = (
        write_set(tmp_path / "one", records, per_shard=50),
        write_set(tmp_path / "other", records[::-1], per_shard=400),
    )
    assert held(one, None) == set()
    tenth, third = held(one, HeldOut(0.1)), held(one, HeldOut(0.3))
    assert (
        tenth == held(other, HeldOut(0.1))
        and tenth < third
        and 20 <= len(tenth) <= 60
        and 90 <= len(third) <= 150
    )
    assert (
        held(one, HeldOut(1.0)) == {f"r{n}" for n in range(400)} - {"r5"}
        and held(one, HeldOut(0.0)) == set()
    )
    out = held(one, HeldOut(0.2, "user"))
    users = [
        {int(name[1:]) % 40 for name in names}
        for names in (out, {f"r{n}" for n in range(400)} - out)
    ]
    assert not (users[0] & users[1]) - {5} and users[0], "all records of a user lie on one side"
    assert held(one, HeldOut(0.1, "absent")) == tenth


def test_a_held_out_split_is_declared_in_the_configuration(
    make_config: Make, tmp_path: Path
) -> None:
    from sailplan.data.config import HeldOutConfig

    config = inline(make_config(), write_set(tmp_path / "set", [triplet(n) for n in range(48)]))
    plain = open_datasets(config, names=["triplets"])["triplets"]
    config.data.sets["triplets"].held_out = HeldOutConfig(0.25)
    reader = open_datasets(config, names=["triplets"])["triplets"]
    assert (
        plain.count("train") == 48
        and 4 <= reader.count("held_out") <= 20
        and reader.count("held_out") + reader.count("train") == 48
    )
    assert reader.identity != plain.identity and all(
        reader.read(int(position)).split == "held_out" for position in reader.positions("held_out")
    )
