"""Risks: a column taken for another, a zero taken for nothing, a role that does not exist
accepted in silence.
"""

from __future__ import annotations

import pytest

from sailplan.errors import ConfigurationError
from sailplan.ingest.columns import Columns, find_columns, seconds
from sailplan.ingest.rows import Row


def found(*values: dict, told: dict[str, str] | None = None, kind=None) -> Columns:
    return find_columns(
        [Row("t.csv", n, n, value) for n, value in enumerate(values)], told or {}, kind, "t.csv"
    )


def test_kinds_follow_from_names() -> None:
    pictures = found(
        {
            "file_name": "a.jpg",
            "price": "0",
            "Description": "long",
            "caption": "short",
            "day": "2024-05-01",
        }
    )
    assert (pictures.kind, dict(pictures.roles), pictures.fields) == (
        "items",
        {"image": "file_name"},
        ("caption", "Description"),
    )
    pairs = found({"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": "d"})
    assert (pairs.kind, pairs.negatives, pairs.most_negatives) == (
        "pairs",
        ("negative_1", "negative_2"),
        2,
    )
    assert (
        found({"query": "a", "document": "b", "hard_negatives": ["c", "d", "e"]}).most_negatives
        == 3
    )
    used = found({"userId": 0, "movieId": 0, "rating": 0.5, "timestamp": 0})
    assert used.kind == "interactions" and dict(used.roles) == {
        "user": "userId",
        "item": "movieId",
        "time": "timestamp",
    }


def test_words_that_say_nothing_are_no_texts_and_endings_say_what_files_are() -> None:
    row = {
        "path": "clips/a.mp3",
        "sentence": "good day",
        "client_id": "9f" * 20,
        "link": "far away",
        "page": "https://a/b",
        "sum": "0f" * 16,
    }
    columns = found(row)
    assert dict(columns.roles) == {"audio": "path"} and columns.fields == ("sentence",)
    assert found({"image": "a.jpg", "label": "boot"}).fields == ("label",)
    assert found({"image": "a.jpg", "label": "boot", "title": "a boot"}).fields == ("title",)


def test_what_is_told_wins_over_names() -> None:
    columns = found(
        {"image": "x", "scan": "a.jpg", "b": "words", "c": "more words"},
        told={"image": "scan", "text": "c+b"},
    )
    assert columns.roles["image"] == "scan" and columns.fields == ("c", "b")


@pytest.mark.parametrize(("told", "words"), [
    ({"imge": "a"}, ["imge", "image"]),
    ({"image": "b"}, ["'b'", "a"]),
])  # fmt: skip
def test_roles_and_columns_that_do_not_exist(told: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        found({"a": "words"}, told=told)
    assert all(word in str(error.value) for word in words)


def test_a_kind_without_its_columns_names_what_there_is() -> None:
    with pytest.raises(ConfigurationError, match=r"no column for 'user'.*a, b"):
        found({"a": "words", "b": "1"}, kind="interactions")
    with pytest.raises(ConfigurationError, match="no column of texts"):
        found({"a": "1", "b": "2024-01-01"})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0.0),
        ("0", 0.0),
        ("1970-01-02", 86400.0),
        ("1970-01-01T01:00:00+01:00", 0.0),
        ("", None),
        (None, None),
    ],
)
def test_times(value: object, expected: float | None) -> None:
    assert seconds(value) == expected


@pytest.mark.parametrize("value", ["yesterday", float("inf"), True, "nan"])
def test_times_that_are_none(value: object) -> None:
    with pytest.raises(ValueError):
        seconds(value)
