"""Items from a record's JSON and members: of a record of items, or of a pair or triplet that
holds its items itself.

A part of a pair is a text, {LANGUAGE: text}, or an object with `fields` (or `text`) and an `id`;
its members have its name: `KEY.query.jpg`, `KEY.target.txt`, `KEY.negative.0.jpg`. All of a record
lies side by side: one sequential read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from sailplan.config.fields import JsonValue
from sailplan.data.kinds import MANY, Chosen, Place
from sailplan.data.names import given
from sailplan.data.parse import decode_text
from sailplan.data.record import Item
from sailplan.data.values import fields_of


class Content(NamedTuple):
    """How the members of a record are read, and which media are asked for."""

    read: Callable[[Place], bytes]
    media: frozenset[str]
    position: int  # of the record

    def item(
        self,
        item_id: str,
        fields: dict[str, dict[str, object]],
        caption: str,
        chosen: Chosen,
        body: Mapping[str, object],
        part: int = 0,
    ) -> Item:
        """Return an item.

        caption: the field that a text member becomes, where the fields lack it. part: which of the
        record's, see `Item.source`.
        """
        if chosen.text is not None and caption not in fields:
            fields[caption] = {"en": decode_text(self.read(chosen.text)).text}
        return Item(
            item_id,
            fields,
            tuple(self.read(place) for place in chosen.pictures) if "vision" in self.media else (),
            self.read(chosen.sound) if chosen.sound is not None and "audio" in self.media else None,
            self.read(chosen.video)
            if chosen.video is not None and "vision" in self.media
            else None,
            {key: value for key, value in body.items() if key not in ("id", "fields")},
            (self.position, part),
        )


def inline_item(
    name: str, value: JsonValue, chosen: Chosen, content: Content, part: int = 0
) -> Item:
    """Return a part of a pair. name: its id where its object gives none.

    Raises BadSample for values that are no texts.
    """
    if isinstance(value, str) and not chosen.read:  # what most records hold: a text, nothing else
        return Item(name, {"text": {"en": value}}, source=(content.position, part))
    # {"id": ...} alone is a text in Indonesian, unless there are members that the id is of.
    is_object = isinstance(value, dict) and (
        "fields" in value or "text" in value or chosen.read or not value
    )
    body = value if is_object else {} if value is None else {"text": value}
    fields = fields_of(name, body.get("fields"))
    if "text" not in fields and body.get("text") is not None:
        fields |= fields_of(name, {"text": body["text"]})
    return content.item(
        given(body.get("id")) or name,
        fields,
        "text",
        chosen,
        {key: entry for key, entry in body.items() if key != "text"},
        part,
    )


def media_counts(chosen: Chosen) -> tuple[int, int]:
    """Return how many pictures an item has, MANY for a film, and how many sounds."""
    return len(chosen.pictures) or MANY * (chosen.video is not None), int(chosen.sound is not None)
