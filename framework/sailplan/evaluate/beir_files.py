"""A folder in BEIR's form: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv, of which every rank
reads its own part.

A rank's part of a .jsonl file is a range of bytes, so nobody counts lines first and none is read
twice. The byte at which a line starts is its number everywhere else: 8 bytes, in the file's order,
and its id is read again when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from sailplan.config.fields import JsonObject
from sailplan.errors import BadDataError, ConfigurationError

CORPUS, QUERIES, JUDGMENTS = "corpus.jsonl", "queries.jsonl", "qrels"
MEDIA = ("image", "audio")  # beside a text: paths relative to the folder


def check_folder(folder: Path, split: str) -> Path:
    """Return the file of the split's judgments.

    Raises ConfigurationError that names the file which is missing.
    """
    for name in (CORPUS, QUERIES):
        if not (folder / name).is_file():
            raise ConfigurationError(
                f"--data {folder}: has no {name}; expected BEIR's form: {CORPUS}, {QUERIES}, "
                f"{JUDGMENTS}/SPLIT.tsv"
            )
    file = folder / JUDGMENTS / f"{split}.tsv"
    if not file.is_file():
        has = ", ".join(sorted(path.stem for path in (folder / JUDGMENTS).glob("*.tsv"))) or "none"
        raise ConfigurationError(
            f"--split {split}: {folder / JUDGMENTS} has the splits {has}; choose one of them"
        )
    return file


def records(path: Path, part: int, parts: int) -> Iterator[tuple[int, JsonObject]]:
    """Yield (first byte, object) of the lines that start in this part of the file.

    Raises BadDataError for a bad line.
    """
    size = path.stat().st_size
    start, stop = size * part // parts, size * (part + 1) // parts
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the line that began before: another part's
        while (place := file.tell()) < stop:
            record = _record(file, path, place)
            if record is not None:
                yield place, record


def ids_at(path: Path, places: Iterable[int]) -> dict[int, str]:
    """Return the ids of the lines that start at these bytes."""
    found: dict[int, str] = {}
    with open(path, "rb") as file:
        for place in sorted(set(places)):
            file.seek(place)
            record = _record(file, path, place)
            assert record is not None, "places are those of records"
            found[place] = record["_id"]
    return found


def item(record: JsonObject, folder: Path) -> object:
    """Return what is encoded: title and text with a space between, as BEIR joins them; with
    media a dict of both.
    """
    text = f"{record.get('title') or ''} {record.get('text') or ''}".strip()
    media = {key: str(folder / record[key]) for key in MEDIA if record.get(key)}
    return ({"text": text} if text else {}) | media if media else text


def judgments(path: Path, queries: set[str]) -> tuple[dict[str, dict[str, int]], int]:
    """Return query id -> document id -> grade of the wanted queries, and how many lines there
    are in all.

    Lines are query, document, grade (BEIR, with a heading) or query, 0, document, grade
    (trec_eval). Raises BadDataError.
    """
    found: dict[str, dict[str, int]] = {}
    count = 0
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            values = line.split("\t") if "\t" in line else line.split()
            if not line.strip() or (number == 1 and not _is_grade(values[-1])):
                continue
            if len(values) not in (3, 4) or not _is_grade(values[-1]):
                raise BadDataError(
                    f"{path}: line {number} is {line.strip()[:80]!r}; expected query, document and "
                    "a whole number; correct it"
                )
            count += 1
            if values[0] in queries:
                found.setdefault(values[0], {})[values[-2]] = int(values[-1])
    return found, count


def _is_grade(text: str) -> bool:
    return text.strip().lstrip("-").isdecimal()


def _record(file: BinaryIO, path: Path, place: int) -> JsonObject | None:
    """Return the object of the line at `place`, None of a blank line."""
    line = file.readline()
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadDataError(
            f"{path}: the line at byte {place} is not JSON ({error}); correct it"
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("_id"), (str, int)):
        raise BadDataError(
            f"{path}: the line at byte {place} has no _id; expected an object with _id and text; "
            "correct it"
        )
    record["_id"] = str(record["_id"])
    return record
