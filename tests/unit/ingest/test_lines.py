"""Risks: rows cut at the wrong place, text of another encoding, and a line number that does not
lead to the row.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from sailplan.errors import BadDataError
from sailplan.ingest.lines import LinesSource
from sailplan.ingest.rows import Row


def rows(path: Path, size: int = 2) -> list[Row]:
    return [row for part in LinesSource(path, path.name).parts(size) for row in part.rows()]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b'id,text\n1,"two\nlines"\n0,"a ""quote"""\n'),
        ("a.csv", 'id;text\r\n1;"two\nlines"\r\n0;"a ""quote"""\r\n'.encode("utf-8-sig")),
        ("a.csv", 'id,text\n1,"two\nlines"\n0,"a ""quote"""\n'.encode("utf-16")),
        ("a.csv.gz", gzip.compress(b'id,text\n1,"two\nlines"\n0,"a ""quote"""\n', mtime=0)),
        (
            "a.jsonl",
            b'{"id": "1", "text": "two\\nlines"}\n\n\n{"id": "0", "text": "a \\"quote\\""}\n',
        ),
        (
            "a.jsonl",
            '\ufeff{"id": "1", "text": "two\\nlines"}\n\n\n{"id": "0", "text": "a \\"quote\\""}'.encode(
                "utf-16-le"
            ),
        ),
    ],
)
def test_rows_and_the_lines_where_they_begin(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    first, second = rows(tmp_path / name)
    assert (first.values["id"], first.values["text"].replace("\r", "")) == ("1", "two\nlines")
    assert dict(second.values) == {"id": "0", "text": 'a "quote"'}
    assert (first.line, second.line) == ((1, 4) if "json" in name else (2, 4)) and (
        first.problem,
        second.problem,
    ) == (None, None)
    assert [row.id for row in rows(tmp_path / name, 1)] == [
        first.id,
        second.id,
    ]  # however the parts are cut


def test_tabs_leave_quotes_alone_and_latin_1_is_repaired(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(
        'query\tpositive\n5" screen\ta "caf\xe9\n"x"\ty\n'.encode("latin-1")
    )
    first, second = rows(tmp_path / "a.tsv")
    assert dict(first.values) == {"query": '5" screen', "positive": 'a "café'} and first.repaired
    assert dict(second.values) == {"query": "x", "positive": "y"} and not second.repaired


def test_a_list_of_captions_needs_no_header(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("1.jpg\ta red shoe, new\n2.jpg\ta blue one\n")
    assert [dict(row.values) for row in rows(tmp_path / "captions.txt")] == [
        {"image": "1.jpg", "title": "a red shoe, new"},
        {"image": "2.jpg", "title": "a blue one"},
    ]


def test_rows_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1\n2,b,c\n3,d\n")
    assert [row.problem for row in rows(tmp_path / "a.csv")] == [
        "found 1 cells, expected 2",
        "found 3 cells, expected 2",
        None,
    ]
    (tmp_path / "a.jsonl").write_text('{"id": 1\n[1]\n{"id": 2}\n')
    broken, no_object, fine = rows(tmp_path / "a.jsonl")
    assert (
        "broken JSON" in str(broken.problem)
        and "expected an object" in str(no_object.problem)
        and fine.problem is None
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", ["empty"]),
        ("a.csv", b"id,id\n1,2\n", ["'id'", "twice"]),
        ("a.jsonl.gz", gzip.compress(b'{"id": 1}\n' * 10_000, mtime=0)[:40], ["cut off"]),
    ],
)
def test_a_table_that_is_none_is_one_line(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadDataError) as error:
        rows(tmp_path / name)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
