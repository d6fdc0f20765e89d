"""Risks: a record lost, doubled or paired with another's caption because of what its members or
its id are called.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sailplan.config.schema import DatasetConfig
from sailplan.data.index import ShardIndex
from sailplan.data.kinds import choose
from sailplan.data.names import given, is_sidecar, readable, samples
from sailplan.data.reader import BadSample, RecordReader
from sailplan.data.testing import Member, json_member, png, tar_bytes, write_set


def reader_of(folder: Path, members: Sequence[Member], **options: Any) -> RecordReader:
    folder.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    with tarfile.open(
        fileobj=file,
        mode="w",
        format=tarfile.GNU_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    ) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (folder / "s.tar").write_bytes(file.getvalue())
    return RecordReader("mine", DatasetConfig(**options), ShardIndex([folder / "s.tar"]))


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["a.jpg", "a.txt"], ["a"]),
        (["a.0.jpg", "a.1.jpg", "a.txt"], ["a"]),
        (["a.jpg", "a.mask.png", "a.json"], ["a"]),
        (["a.left.jpg", "a.right.jpg", "a.label.txt"], ["a"]),
        (
            ["photo 1.5.jpg", "photo 1.5.txt", "photo 1.7.jpg", "photo 1.7.txt"],
            ["photo 1.5", "photo 1.7"],
        ),
        (
            ["photo 1.5.jpg", "photo 1.7.jpg", "photo 1.5.txt", "photo 1.7.txt"],
            ["photo 1.5", "photo 1.7"],
        ),
        (
            ["IMG_2024.05.01.png", "IMG_2024.05.01.json", "IMG_2024.05.02.png"],
            ["IMG_2024.05.01", "IMG_2024.05.02"],
        ),
        (["Track 1.0 (mix).jpg", "Track 1.0 (mix).txt"], ["Track 1.0 (mix)"]),
        (["Mr. Smith.jpg", "Mr. Jones.jpg"], ["Mr. Smith", "Mr. Jones"]),
        (
            ["walk.draft.jpg", "walk.draft.txt", "walk.final.jpg", "walk.final.txt"],
            ["walk.draft", "walk.final"],
        ),
        (["v1.2.txt", "v1.2.0.jpg", "v1.2.1.jpg"], ["v1.2"]),
        (["a.jpg", "a.txt", "a.jpg", "a.txt"], ["a", "a"]),
        (["d/x.1.5.JPG", "d/x.1.5.TXT"], ["d/x.1.5"]),
    ],
)
def test_members_of_one_key_become_the_samples_that_they_are(
    names: list[str], keys: list[str]
) -> None:
    found = samples(names)
    assert [key for key, _ in found] == keys
    assert sorted(number for _, members in found for number, _ in members) == list(
        range(len(names))
    )


def test_the_picture_of_a_name_with_dots_keeps_its_caption(tmp_path: Path) -> None:
    members = [
        member
        for n in range(4)
        for member in ((f"photo 1.{n}.png", png(n)), (f"photo 1.{n}.txt", f"caption {n}".encode()))
    ]
    reader = reader_of(tmp_path, members)
    assert reader.ids(range(4)) == [f"s/photo 1.{n}" for n in range(4)]
    for n in range(4):
        item = reader.read(n).item
        assert (
            item is not None
            and item.images == (png(n),)
            and item.fields["title"] == {"en": f"caption {n}"}
        )


def test_frames_lie_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name, form in (
        ("plain", "k.{}.png"),
        ("filled", "k.{:04d}.png"),
        ("named", "k.frame_{}.png"),
    ):
        reader = reader_of(
            tmp_path / name,
            [(form.format(n), png(n)) for n in sorted(range(12), key=str)] + [("k.txt", b"film")],
        )
        item = reader.read(0).item
        assert (
            len(reader) == 1
            and item is not None
            and item.images == tuple(png(n) for n in range(12))
        ), name


def test_companions_of_another_kind_are_not_the_picture(tmp_path: Path) -> None:
    members = [
        ("k.depth.png", png(8)),
        ("k.png", png(1)),
        ("k.mask.png", png(9)),
        ("k.cls", b"3"),
        ("k.npy", b"x"),
        ("k.txt", b"a boot"),
    ]
    item = reader_of(tmp_path, members).read(0).item
    assert item is not None and item.images == (png(1),)
    chosen = choose([(name.partition(".")[2], 0, 0) for name, _ in members])
    assert sorted(extension for extension, _, _ in chosen.unread) == [
        "cls",
        "depth.png",
        "mask.png",
        "npy",
    ]
    film = choose([("jpg", 0, 0), ("mp4", 0, 0), ("wav", 0, 0)])
    assert (
        film.video is None
        and [place[0] for place in film.unread] == ["mp4"]
        and choose([("mp4", 0, 0)]).video is not None
    )


@pytest.mark.parametrize(
    "name",
    [
        "._000.jpg",
        "./._000.jpg",
        ".DS_Store",
        "__MACOSX/000.jpg",
        "a/__MACOSX/b/000.txt",
        "Thumbs.db",
        "@eaDir/000.jpg",
    ],
)
def test_what_a_file_system_wrote_for_itself_is_no_record(tmp_path: Path, name: str) -> None:
    assert is_sidecar(name) and not is_sidecar("a._b/x.y.jpg")
    reader = reader_of(
        tmp_path, [(name, b"x"), ("000.png", png(1)), (name, b"y"), ("000.txt", b"red")]
    )
    item = reader.read(0).item
    assert len(reader) == 1 and item is not None and item.images and item.fields
    assert reader.index.passed_over(0) == {"sidecars and hidden files": (2, name)}


def test_names_of_another_encoding_are_written_with_escapes(tmp_path: Path) -> None:
    names = ["caf\udce9", "\udcc4\udce3\udcba\udcc3", "写真-é", "a\nb", "tab\there"]
    reader = reader_of(tmp_path, [(f"{name}.txt", b"red") for name in names])
    shown = [r"s/caf\xe9", r"s/\xc4\xe3\xba\xc3", "s/写真-é", r"s/a\nb", "s/tab\there"]
    assert reader.ids(range(5)) == shown == [reader.read(n).id for n in range(5)]
    assert [reader.find(name) for name in shown] == list(range(5))


def test_ids_are_text_of_one_line_and_zero_is_one(tmp_path: Path) -> None:
    ids: list[Any] = [
        0,
        None,
        "",
        float("nan"),
        "a\u0000b",
        "a\r\nb\u2028",
        "\ud83d",
        False,
        7.5,
        "last",
    ]
    records = [
        [(f"{n}.json", json.dumps({"id": value, "fields": {"title": "x"}}).encode())]
        for n, value in enumerate(ids)
    ]
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "s.tar").write_bytes(
        tar_bytes([member for record in records for member in record])
    )
    reader = RecordReader("mine", DatasetConfig(), ShardIndex([tmp_path / "s" / "s.tar"]))
    expected = [
        "0",
        "s/1",
        "s/2",
        "s/3",
        r"a\x00b",
        r"a\r\nb\u2028",
        "\ufffd",
        "False",
        "7.5",
        "last",
    ]
    assert reader.ids(range(10)) == expected == [reader.read(n).id for n in range(10)]
    assert all(len(name.splitlines()) == 1 for name in expected) and [
        reader.find(name) for name in expected
    ] == list(range(10))


def test_item_zero_is_an_item_and_null_is_none(tmp_path: Path) -> None:
    items = write_set(
        tmp_path / "items",
        [[json_member(f"{n}", {"id": n, "fields": {"title": f"boot {n}"}})] for n in range(4)],
    )
    catalogue = RecordReader("items", DatasetConfig(), ShardIndex(sorted(items.glob("*.tar"))))
    bodies: list[dict[str, Any]] = [
        {"text": "0", "item": 0},
        {"query": 0, "item": 1.0},
        {"text": "x", "item": None},
        {"text": "x", "item": float("nan")},
    ]
    pairs = write_set(
        tmp_path / "pairs",
        [[json_member(f"{n}", body | {"negatives": [0, 3]})] for n, body in enumerate(bodies)],
    )
    reader = RecordReader(
        "pairs",
        DatasetConfig(kind="pairs", negatives=2),
        ShardIndex(sorted(pairs.glob("*.tar"))),
        catalogue,
    )
    first, second = reader.read(0), reader.read(1)
    assert (
        first.target is not None
        and first.target.id == "0"
        and first.query is not None
        and first.query.fields["text"] == {"en": "0"}
    )
    assert (
        second.query is not None
        and second.query.id == "0"
        and second.target is not None
        and second.target.id == "1"
    )
    assert [item.id for item in first.negatives] == ["0", "3"]
    for position in (2, 3):
        with pytest.raises(BadSample, match="names no item of the catalogue 'items'"):
            reader.read(position)
    histories: list[dict[str, Any]] = [
        {"history": [0, 1], "target": 0},
        {"items": [0, 1, 2], "target": None},
        {"history": [0, None], "target": 1},
    ]
    shards = write_set(
        tmp_path / "sequences", [[json_member(f"{n}", body)] for n, body in enumerate(histories)]
    )
    sequences = RecordReader(
        "sequences",
        DatasetConfig(kind="sequences"),
        ShardIndex(sorted(shards.glob("*.tar"))),
        catalogue,
    )
    assert [item.id for item in sequences.read(0).history] == ["0", "1"] and sequences.item_ids(
        1
    ) == ["0", "1", "2"]
    with pytest.raises(BadSample, match="history has an entry that is null"):
        sequences.read(2)


def test_a_split_is_a_name_and_may_be_any(tmp_path: Path) -> None:
    splits: list[Any] = ["train", None, "", 0, *[f"fold-{n}" for n in range(300)]]
    folder = write_set(
        tmp_path / "set",
        [[json_member(f"{n}", {"id": f"r{n}", "split": split})] for n, split in enumerate(splits)],
        per_shard=400,
    )
    index = ShardIndex(sorted(folder.glob("*.tar")))
    assert (
        index.positions("train").tolist() == [0, 1, 2]
        and index.positions("0").tolist() == [3]
        and index.positions("fold-299").tolist() == [303]
    )
    assert index.count("absent") == 0 and len(index.split_names) == 302


def test_given_and_readable_leave_plain_names_alone() -> None:
    for name in ("things/1", "写真 é", "a b\tc", "emoji 👟", "back\\slash"):
        assert readable(name) == name and given(name) == name
    assert given([]) == "[]" and given(0.0) == "0.0" and given(-0) == "0"
