"""Risks: a text saved in another way read as noise, and JSON of odd kinds that ends a run
instead of being one bad sample.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sailplan.config.schema import DatasetConfig
from sailplan.data.index import ShardIndex
from sailplan.data.parse import Text, decode_text, parse_json
from sailplan.data.reader import BadSample, RecordReader
from sailplan.data.testing import json_member, write_set
from sailplan.data.values import fields_of, score


@pytest.mark.parametrize("text", ["rød støvel", "a", "red boot\r\n", "写真", "👟"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_are_read_in_the_encodings_that_say_what_they_are(text: str, encoding: str) -> None:
    assert decode_text(text.encode(encoding)) == Text(text)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_texts_without_a_mark_are_seen_by_their_zeros(encoding: str) -> None:
    assert decode_text("a red støvel".encode(encoding)) == Text("a red støvel")
    assert decode_text("ab".encode(encoding)) == Text("ab")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("café “boots”".encode("cp1252"), "café “boots”"),
        ("støvel".encode("latin-1"), "støvel"),
        (b"a\x81b", "a\x81b"),
        ("støvel på tur".encode() + b"\xe2\x82", "støvel på tur\ufffd"),  # cut within a character
        (b"red\0boot, which is long enough", "red boot, which is long enough"),
    ],
)
def test_other_bytes_are_repaired_and_said_to_be(content: bytes, text: str) -> None:
    assert decode_text(content) == Text(text, repaired=True)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"]
)
def test_json_is_read_in_any_of_them(encoding: str) -> None:
    assert parse_json(json.dumps({"a": "støvel"}, ensure_ascii=False).encode(encoding)) == {
        "a": "støvel"
    }


def test_halves_of_surrogate_pairs_are_replaced_and_whole_pairs_joined() -> None:
    assert parse_json(rb'{"a\ud83d": ["x\uDC5f", {"b": "\ud83d\udc5f"}]}') == {
        "a\ufffd": ["x\ufffd", {"b": "\U0001f45f"}]
    }
    assert parse_json(b'{"a": "\xed\xa0\xbd\xed\xb1\x9f \xed\xa0\xbd"}') == {
        "a": "\U0001f45f \ufffd"
    }, "as Java and MySQL write them"
    assert parse_json('{"a": "\\ud55c 한"}'.encode()) == {"a": "한 한"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a": ' * 5000 + b"1" + b"}" * 5000, "nested too deeply"),
        (b'{"a": 1' + b"0" * 6000 + b"}", "digits"),
        (b"[1]", "found a list, expected an object"),
        (b"", "Expecting value"),
        (b'{"a": 1} {"b": 2}', "Extra data"),
        (b"\xff\xfe\x00\xd8\x00", ""),
    ],
)
def test_json_that_cannot_be_used_is_a_value_error(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(content)


def test_a_record_of_such_json_is_one_bad_sample_of_one_line(tmp_path: Path) -> None:
    deep = (
        json.dumps({"id": "x"}).encode()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    )
    folder = write_set(
        tmp_path,
        [
            [("0.json", deep)],
            [("1.json", b'{"id": "x", "id": "last"}')],
            [json_member("2", {"id": "fine", "fields": None})],
        ],
    )
    reader = RecordReader("mine", DatasetConfig(), ShardIndex(sorted(folder.glob("*.tar"))))
    assert (
        reader.ids([0, 1, 2]) == ["part-000/0", "last", "fine"]
        and reader.read(1).id == "last"
        and reader.read(2).id == "fine"
    )
    with pytest.raises(BadSample, match=r"broken JSON .* nested too deeply") as caught:
        reader.read(0)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("value", "found"), [(0.5, 0.5), (0, 0.0), (1, 1.0), (None, None), ("", None)]
)
def test_scores_that_are_numbers_from_0_to_1_are_taken(value: Any, found: float | None) -> None:
    assert score("r", {"score": value}) == found


@pytest.mark.parametrize(
    "value", ["0.8", True, False, float("nan"), float("inf"), -0.2, 4.7, "high", [1], {}]
)
def test_other_scores_are_bad_samples(value: Any) -> None:
    with pytest.raises(BadSample, match="score is "):
        score("r", {"score": value})


def test_an_empty_cell_is_a_field_that_is_not_there_and_a_number_is_a_mistake() -> None:
    fields = {
        "title": None,
        "tags": ["a", None],
        "note": {"en": None, "de": "b"},
        "price": float("nan"),
        "empty": "",
    }
    assert fields_of("r", fields) == {
        "tags": {"en": ["a"]},
        "note": {"de": "b"},
        "empty": {"en": ""},
    }
    for wrong in ({"title": 0}, {"title": False}, {"title": {"en": 7}}, {"title": [0]}):
        with pytest.raises(BadSample, match=r"field title\.en is a"):
            fields_of("r", wrong)
    for wrong in (0, "", [], "title"):
        with pytest.raises(BadSample, match="fields is a"):
            fields_of("r", wrong)
