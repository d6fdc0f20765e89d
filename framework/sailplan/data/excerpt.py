"""How the report shows a record: its words and its picture, small enough to lie inside a JSON
file.
"""

from __future__ import annotations

import base64

from sailplan.config.fields import JsonObject
from sailplan.config.schema import ViewConfig
from sailplan.data.reader import RecordReader
from sailplan.data.record import Item
from sailplan.data.text import compose

LARGEST = 64_000  # bytes of an image that is shown
KINDS = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


def show(
    reader: RecordReader, position: int, view: ViewConfig, text: str | None = None
) -> JsonObject:
    """{"text": ..., "image": data URI (if the view shows pictures)} of one record's item in a
    view. text: what to show
    instead of the item's own words."""
    of = view.of if reader.config.kind != "items" else "item"
    record = reader.read(int(position), needs=(of,))
    item = getattr(record, of)
    assert isinstance(item, Item), f"a view of {of} has no single item"
    words = (
        text
        or (compose(item.fields, view, reader.config, None) if len(view.fields) == 1 else "")
        or _name(item)
    )
    shown: JsonObject = {"text": words[:160]}
    if "vision" in view.modalities and item.images and len(item.images[0]) <= LARGEST:
        kind = next(
            (kind for start, kind in KINDS.items() if item.images[0].startswith(start)), None
        )
        if kind is not None:
            shown["image"] = f"data:{kind};base64,{base64.b64encode(item.images[0]).decode()}"
    return shown


def _name(item: Item) -> str:
    """Some words for an item whose view has none: its title, what is said in it, else its id."""
    for field in ("title", "asr"):
        languages = item.fields.get(field, {})
        name = languages.get("en") or next(iter(languages.values()), None)
        if isinstance(name, str):
            return name
    return item.id
