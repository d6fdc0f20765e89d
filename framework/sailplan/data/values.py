"""Values of a record's JSON, checked where they are read: a value that cannot be used is one bad
sample, with its reason.

Null, "" and a table's NaN count as not given, 0 does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from sailplan.config.fields import JsonObject, JsonValue
from sailplan.data.names import given, is_given


class BadSample(Exception):
    """A record that cannot be used: its id and why, in one line."""

    def __init__(self, record_id: str, reason: str) -> None:
        super().__init__(f"{record_id}: {reason}")
        self.record_id, self.reason = record_id, reason

    def __reduce__(self) -> tuple[object, ...]:
        return BadSample, (self.record_id, self.reason)


def number(record_id: str, body: Mapping[str, object], key: str) -> float | None:
    """Return a finite number of the record, None where none is given."""
    value = body.get(key)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadSample(record_id, f"{key} is {value!r:.60}, expected a number")
    return float(value)


def score(record_id: str, body: Mapping[str, object]) -> float | None:
    """Return the score of a graded pair, from 0 to 1."""
    value = number(record_id, body, "score")
    if value is not None and not 0 <= value <= 1:
        raise BadSample(
            record_id,
            f"score is {value!r}, expected a number from 0 to 1: divide all scores by the highest "
            "that there can be",
        )
    return value


def label(record_id: str, value: object, key: str) -> str | None:
    """Return the class of a record; of a text by language the English one, else the first."""
    if isinstance(value, Mapping) and value:
        value = value["en"] if "en" in value else value[min(value)]
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, list | Mapping):
        raise BadSample(
            record_id,
            f"{key} is a {type(value).__name__} of {len(value)}, expected one value: the class",
        )
    return given(value)


def teacher_scores(
    record_id: str, body: Mapping[str, object], key: str, negatives: int, chosen: Iterable[int]
) -> tuple[float, ...]:
    """Return a teacher's score of the target and of the chosen ones of the record's negatives,
    NaN where it gives none.

    negatives: how many the record has.
    """
    values = body.get(key)
    if values is None:
        return ()
    if not isinstance(values, list) or len(values) != 1 + negatives:
        found = f"{len(values)} values" if isinstance(values, list) else repr(values)[:60]
        raise BadSample(
            record_id,
            f"{key}: found {found}, expected a list of {1 + negatives}: the score of the target, "
            "then of each of its negatives, null where there is none",
        )
    scores = [number(record_id, {key: value}, key) for value in values]
    wanted = [scores[place] for place in (0, *(1 + place for place in chosen))]
    return tuple(math.nan if one is None else one for one in wanted)


def probability(record_id: str, body: Mapping[str, object], key: str) -> float | None:
    """Return a probability of the record, above 0 and at most 1."""
    value = number(record_id, body, key)
    if value is not None and not 0 < value <= 1:
        raise BadSample(record_id, f"{key} is {value!r}, expected a number above 0, at most 1")
    return value


def listed(record_id: str, body: Mapping[str, object], key: str) -> list[JsonValue]:
    """Return the entries of a list of the record; [] where none is given."""
    entries = body.get(key)
    if not is_given(entries):
        return []
    if not isinstance(entries, list):
        raise BadSample(
            record_id, f"{key} is a {type(entries).__name__}, expected a list of ids or records"
        )
    if not all(map(is_given, entries)):
        raise BadSample(record_id, f"{key} has an entry that is null or empty")
    return entries


def ids(record_id: str, body: Mapping[str, object], key: str) -> list[str]:
    """Return the item ids under a key of the record; [] where none are given."""
    return [str(given(entry)) for entry in listed(record_id, body, key)]


def fields_of(record_id: str, fields: object) -> dict[str, JsonObject]:
    """Return every field as language -> str | list[str]; a bare value counts as English, one
    that is null as not there.
    """
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise BadSample(
            record_id,
            f"fields is a {type(fields).__name__}, expected {{FIELD: {{LANGUAGE: text}}}}",
        )
    result: dict[str, JsonObject] = {}
    for name, value in fields.items():
        languages = value if isinstance(value, dict) else {"en": value}
        kept: JsonObject = {}
        for language, entry in languages.items():
            if isinstance(entry, list):
                entry = [part for part in entry if part is not None]
            if entry is None or (isinstance(entry, float) and math.isnan(entry)):
                continue
            if not isinstance(entry, str) and not (
                isinstance(entry, list) and all(isinstance(part, str) for part in entry)
            ):
                raise BadSample(
                    record_id,
                    f"field {name}.{language} is a {type(entry).__name__}, expected text or a list "
                    "of texts",
                )
            kept[language] = entry
        if kept or not languages:
            result[name] = kept
    return result
