"""The `icons` set: Material Design Icons with their names, aliases and category tags; deprecated
icons are left out.

The deprecated ones are the brand logos (242) and 17 others.
"""

from __future__ import annotations

import json

from quickstart_data.images import IconPainter, webp
from quickstart_data.sources import Unpacked
from quickstart_data.splits import split_by_name
from sailplan.data.writer import Record


def read_icons(unpacked: Unpacked) -> list[Record]:
    meta = json.loads(unpacked.file("@mdi/svg", "package/meta.json").read_text(encoding="utf-8"))
    painter = IconPainter(
        unpacked.file("@mdi/font", "package/fonts/materialdesignicons-webfont.ttf")
    )
    records, pixels = [], []
    for row in meta:
        if row["deprecated"]:
            continue
        image = painter.draw(int(row["codepoint"], 16))
        fields = {"title": {"en": row["name"].replace("-", " ")}, "aliases": {}, "tags": {}}
        if row["aliases"]:
            fields["aliases"] = {"en": [alias.replace("-", " ") for alias in row["aliases"]]}
        if row["tags"]:
            fields["tags"] = {"en": row["tags"]}
        body = {"id": f"icons/{row['name']}", "group": row["name"].split("-")[0], "fields": fields}
        records.append(Record(body, webp=webp(image, lossless=True)))
        pixels.append(image.tobytes())
    sides = split_by_name([record.body["fields"]["title"]["en"] for record in records], pixels)
    for record, side in zip(records, sides, strict=True):
        record.body["split"] = side
    return records
