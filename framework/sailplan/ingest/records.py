"""From a row to a record: KEY.json and its media, in the forms that docs/data.md lists for items
and for pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from sailplan.config.fields import JsonObject
from sailplan.data.names import given, readable
from sailplan.data.parse import whole
from sailplan.ingest.columns import Columns, is_text, number
from sailplan.ingest.media import Media
from sailplan.ingest.rows import Dropped, Row, split_name

MEDIA_ROLES = ("image", "audio", "video")
TAKEN = ("id", "split", "fields", "held_out_tags")  # keys of a record's JSON that are ours


@dataclass(frozen=True)
class Record:
    """A record: its JSON, and its media by extension."""

    body: JsonObject
    media: dict[str, bytes]

    def members(self) -> dict[str, bytes]:
        """Return extension -> bytes of all members; the same bytes for the same record."""
        return {
            "json": json.dumps(
                whole(self.body),
                ensure_ascii=False,
                sort_keys=True,
                separators=(",", ":"),
                default=str,
            ).encode(),
            **self.media,
        }


@dataclass(frozen=True)
class RecordMaker:
    """Make records of rows.

    complete: of items, whether a row without a text, or without a medium, is dropped: it could
    teach nothing. language: of bare texts. score_maximum: what graded pairs' scores are divided by.
    """

    columns: Columns
    media: Media
    language: str = "en"
    complete: bool = True
    score_maximum: float = 1.0

    def make(self, row: Row, split: str | None) -> Record:
        """Return the record of a row. split: that of the row's file.

        Raises Dropped with the reason.
        """
        if row.problem is not None:
            raise Dropped(row.problem)
        body: JsonObject = {"id": given(self.columns.of("id", row)) or readable(row.id)}
        own = given(self.columns.of("split", row))
        if own is not None or split is not None:
            body["split"] = split_name(own) if own is not None else split
        return self._pair(row, body) if self.columns.kind == "pairs" else self._item(row, body)

    def _item(self, row: Row, body: dict[str, object]) -> Record:
        media: dict[str, bytes] = {}
        for role in MEDIA_ROLES:
            found = self.media.read(role, self.columns.of(role, row))
            if found is not None:
                media[found[0]] = found[1]
                body.setdefault("source", self._name(role, row))
        if not body.get("source"):
            body.pop("source", None)
        fields = {name: self.text(row.values.get(name)) for name in self.columns.fields}
        body["fields"] = {
            readable(name): languages for name, languages in fields.items() if languages
        }
        wants_media = any(role in self.columns.roles for role in MEDIA_ROLES)
        if self.complete and wants_media and not media:
            raise Dropped(
                f"no {' or '.join(role for role in MEDIA_ROLES if role in self.columns.roles)}"
            )
        if self.complete and self.columns.fields and not body["fields"]:
            raise Dropped(f"no text in {', '.join(self.columns.fields)}")
        if not media and not body["fields"]:
            raise Dropped("no text and no media")
        used = {*self.columns.roles.values(), *self.columns.fields}
        for name, value in row.values.items():
            if name not in used and name not in TAKEN and name != "source" and given_any(value):
                body[readable(name)] = number(value)
        return Record(body, media)

    def _name(self, role: str, row: Row) -> str | None:
        value = self.columns.of(role, row)
        value = value.get("path") if isinstance(value, Mapping) else value
        return given(value) if isinstance(value, str) else None

    def _pair(self, row: Row, body: dict[str, object]) -> Record:
        media: dict[str, bytes] = {}
        for part in ("query", "target"):
            text = self._part(self.columns.of(part, row), part, media)
            picture = self.media.read("image", self.columns.of(f"{part}_image", row))
            if picture is not None:
                media[f"{part}.{picture[0]}"] = picture[1]
            if text is None and not any(name.startswith(f"{part}.") for name in media):
                raise Dropped(f"no {part}: the cell is empty")
            if text is not None:
                body[part] = text
        negatives: list[object] = []
        for name in self.columns.negatives:
            value = row.values.get(name)
            for entry in value if isinstance(value, list) else [value]:
                text = self._part(entry, f"negative.{len(negatives)}", media)
                if text is not None:
                    negatives.append(text)
        if negatives:
            body["negatives"] = negatives
        score = self._score(row)
        if score is not None:
            body["score"] = score
        return Record(body, media)

    def _part(self, value: object, name: str, media: dict[str, bytes]) -> object:
        """What the JSON holds of a part of a pair; its media are put into `media`.

        None for an empty cell.
        """
        if isinstance(value, Mapping) and ({*MEDIA_ROLES, "fields", "text"} & value.keys()):
            for role in MEDIA_ROLES:
                found = self.media.read(role, value.get(role))
                if found is not None:
                    media[f"{name}.{found[0]}"] = found[1]
            kept = {
                key: entry
                for key, entry in value.items()
                if key not in MEDIA_ROLES and given_any(entry)
            }
            if isinstance(kept.get("text"), str) and self.language != "en":
                kept["text"] = {self.language: kept["text"]}
            return kept or ({} if any(key.startswith(f"{name}.") for key in media) else None)
        if isinstance(value, list):
            value = next(
                (entry for entry in value if given_any(entry)), None
            )  # retrievers write positives as lists
        if not given_any(value):
            return None
        if isinstance(value, Mapping):
            return value
        text = given(value) if not isinstance(value, str) else value
        return text if self.language == "en" else {self.language: text}

    def _score(self, row: Row) -> float | None:
        value = self.columns.of("score", row)
        if given(value) is None:
            return None
        found = number(value)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise Dropped(f"score is {value!r:.60}, expected a number")
        if not 0 <= found / self.score_maximum <= 1:
            raise Dropped(
                f"score is {found}, expected 0 to {self.score_maximum:g}; give the highest with "
                "--score-maximum"
            )
        return found / self.score_maximum

    def text(self, value: object) -> JsonObject | None:
        """Return {LANGUAGE: text or texts} of a cell; None for an empty one."""
        if not given_any(value):
            return None
        if isinstance(value, Mapping):
            return (
                {str(language): entry for language, entry in value.items() if given_any(entry)}
                or None
                if is_text(value)
                else {self.language: str(value)}
            )
        if isinstance(value, list):
            return {self.language: [str(entry) for entry in value if given_any(entry)]}
        return {self.language: value if isinstance(value, str) else str(number(value))}


def given_any(value: object) -> bool:
    """Return whether a cell holds anything: not null, NaN, blank text, nor an empty list.

    0 is something.
    """
    if isinstance(value, list | tuple | Mapping):
        return any(
            given_any(entry) for entry in (value.values() if isinstance(value, Mapping) else value)
        )
    return given(value.strip() if isinstance(value, str) else value) is not None
