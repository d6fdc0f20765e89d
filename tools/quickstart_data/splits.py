"""What is held out, decided by hashes of strings, so that it never depends on order, versions or
luck.

* Items: 10 % by name. Items that share a name, or whose pictures are equal to the pixel (the flags
  of Norway and of Svalbard), are joined first and go to one side together.
* Keywords: one string in six, in any language, unless some training text equals it.
* A title, alias or choice text that occurs on both sides is removed from one of them (`separate`).
All comparisons are on `normal` strings: NFKC, lower case, single spaces.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

from sailplan.data.writer import Record

TRAIN, HELD_OUT = "train", "held_out"


def normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def fraction(text: str, salt: str) -> float:
    """A stable number in [0, 1) for a string; `salt` makes the decisions of different splits
    independent.
    """
    digest = hashlib.sha256(f"{salt}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def base_name(name: str) -> str:
    """The name without a skin tone: "waving hand: dark skin tone" is on the side of "waving
    hand".
    """
    head, _, tail = normal(name).partition(":")
    return head if "skin tone" in tail else normal(name)


def split_by_name(
    names: Sequence[str], contents: Sequence[object] | None = None, share: float = 0.1
) -> list[str]:
    """One side for each name; equal names and equal contents share a side.

    A joined group takes the side of its alphabetically first name.
    """
    parent: dict[object, object] = {}

    def find(node: object) -> object:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for index, name in enumerate(names):
        mine = ("name", base_name(name))
        find(mine)
        if contents is not None:
            parent[find(("content", contents[index]))] = find(mine)
    first: dict[object, str] = {}
    for name in sorted(map(base_name, names)):
        first.setdefault(find(("name", name)), name)
    return [
        HELD_OUT if fraction(first[find(("name", base_name(name)))], "name") < share else TRAIN
        for name in names
    ]


def names(record: Record) -> dict[str, str]:
    """Language -> the text by which a record is found: the title of an item, the text of a
    choice.
    """
    return record.body["text"] if "text" in record.body else record.body["fields"]["title"]


def separate(records: Iterable[Record]) -> int:
    """Remove translations that are a name on both sides; returns how many were removed.

    A held-out translation that equals a training name goes, then a training translation that equals
    a held-out name.
    English names stay: the split was decided by them.
    """
    records = list(records)
    removed = 0
    for side, other in ((HELD_OUT, TRAIN), (TRAIN, HELD_OUT)):
        taken = {
            normal(text)
            for one in records
            if one.body["split"] == other
            for text in names(one).values()
        }
        for record in records:
            if record.body["split"] == side:
                mine = names(record)
                for language in [one for one in mine if one != "en" and normal(mine[one]) in taken]:
                    del mine[language]
                    removed += 1
    return removed


def drop_aliases_of_the_other_side(records: Sequence[Record]) -> int:
    """Remove training aliases that are held-out names, then held-out aliases that training has;
    returns how many.
    """

    def strings(side: str, field: str) -> set[str]:
        found: set[str] = set()
        for record in records:
            if record.body["split"] == side:
                for value in record.body["fields"].get(field, {}).values():
                    found.update(map(normal, [value] if isinstance(value, str) else value))
        return found

    removed = 0
    for side, other, fields in (
        (TRAIN, HELD_OUT, ["title"]),
        (HELD_OUT, TRAIN, ["title", "aliases"]),
    ):
        taken = set().union(*(strings(other, field) for field in fields))
        for record in records:
            aliases = record.body["fields"].get("aliases", {})
            if record.body["split"] == side and aliases:
                kept = [alias for alias in aliases["en"] if normal(alias) not in taken]
                removed += len(aliases["en"]) - len(kept)
                record.body["fields"]["aliases"] = {"en": kept} if kept else {}
    return removed


def hold_out_keywords(
    records: Iterable[Record], training_texts: set[str], share: float = 1 / 6
) -> int:
    """Move held-out keywords from `fields.tags` to `held_out_tags`; returns the number of
    distinct ones.

    `training_texts` are normal strings of every other training text: a keyword that equals one is
    not unseen.
    """
    held: set[str] = set()
    for record in records:
        tags = record.body["fields"].pop("tags", {})
        sides: dict[bool, dict[str, list[str]]] = {False: {}, True: {}}
        for language, words in tags.items():
            for word in words:
                form = normal(word)
                out = fraction(form, "keyword") < share and form not in training_texts
                sides[out].setdefault(language, []).append(word)
                if out:
                    held.add(form)
        record.body["fields"]["tags"], record.body["held_out_tags"] = sides[False], sides[True]
    return len(held)


def training_texts(records: Iterable[Record]) -> set[str]:
    """Normal forms of all training titles, aliases, transcripts and choice texts (not keywords)."""
    found: set[str] = set()
    for record in records:
        if record.body["split"] != TRAIN:
            continue
        fields = [record.body["text"]] if "text" in record.body else []
        fields += [value for name, value in record.body.get("fields", {}).items() if name != "tags"]
        for field in fields:
            for value in field.values():
                found.update(map(normal, [value] if isinstance(value, str) else value))
    return found
