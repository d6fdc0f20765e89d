"""The `emoji` set: Noto Color Emoji pictures with CLDR names and keywords in 25 languages
(through emojibase).
"""

from __future__ import annotations

import json

from quickstart_data.images import EmojiPainter, webp
from quickstart_data.sources import Unpacked
from quickstart_data.splits import split_by_name
from sailplan.data.writer import Record

LANGUAGES = "en da de es et fi fr hu it ja ko lt nb nl pl pt ru sv uk zh bn hi ms th vi".split()  # noqa: SIM905
COMPONENTS = 2  # emojibase's group of skin tones and hair: parts, not pictures


def read_emoji(unpacked: Unpacked) -> list[Record]:
    def load(part: str):
        return json.loads(
            unpacked.file("emojibase-data", f"package/{part}.json").read_text(encoding="utf-8")
        )

    tables = {
        language: {row["hexcode"]: row for row in load(f"{language}/data")}
        for language in LANGUAGES
    }
    groups = load("meta/groups")
    painter = EmojiPainter(
        unpacked.file("fonts-noto-color-emoji", "usr/share/fonts/truetype/noto/*.ttf")
    )
    records, pixels = [], []
    for code, row in tables["en"].items():
        if row.get("group") in (None, COMPONENTS):
            continue
        image = painter.draw(row["emoji"])
        if image is None:  # newer than the font
            continue
        rows = {language: table[code] for language, table in tables.items() if code in table}
        body = {
            "id": f"emoji/{code}",
            "char": row["emoji"],
            "group": groups["groups"][str(row["group"])],
            "subgroup": groups["subgroups"][str(row["subgroup"])],
            "fields": {
                "title": {
                    language: one["label"] for language, one in rows.items() if one.get("label")
                },
                "tags": {
                    language: one["tags"] for language, one in rows.items() if one.get("tags")
                },
            },
        }
        records.append(Record(body, webp=webp(image, lossless=False)))
        pixels.append(image.tobytes())
    sides = split_by_name([record.body["fields"]["title"]["en"] for record in records], pixels)
    for record, side in zip(records, sides, strict=True):
        record.body["split"] = side
    return records
