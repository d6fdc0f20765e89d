"""What a table's columns mean: found by their names and a first look at their values, or told by
the user.

A role is one of ROLES; every other column is a text field, where any of its first values is text,
or else a value that records carry along.
"""

from __future__ import annotations

import datetime
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sailplan.config.overrides import nearest
from sailplan.data.kinds import kind_of
from sailplan.data.names import given
from sailplan.errors import ConfigurationError
from sailplan.ingest.rows import Part, Row

Kind = Literal["items", "pairs", "interactions"]
LOOKED_AT = 1000  # rows
ROLES: dict[str, str] = {  # role -> names of columns that have it, as people write them
    "id": "id _id",
    "split": "split partition",
    "image": "image image_path image_file image_name images img img_path picture photo file_name filename file filepath path image_bytes jpg",
    "audio": "audio audio_path audio_file sound speech recording wav",
    "video": "video video_path video_file film",
    "query": "query anchor question sentence1 text1 q query_text",
    "target": "target positive pos answer document passage sentence2 text2 response doc",
    "score": "score similarity similarity_score",
    "query_image": "query_image anchor_image",
    "target_image": "target_image positive_image",
    "user": "user user_id userid customer_id visitorid visitor_id reviewerid reviewer_id session session_id",
    "item": "item item_id itemid product_id productid article_id asin movie_id movieid news_id iid sku",
    "time": "time timestamp ts date datetime t_dat unixreviewtime created_at",
    "label": "label labels clicked click",
}
NEGATIVE = re.compile(r"(?:hard_)?neg(?:ative)?s?(?:_?\d+)?(?:_text)?", re.IGNORECASE)
CAPTIONS = (
    "caption",
    "title",
    "name",
    "text",
    "description",
    "txt",
)  # the first text field of a view, in this order
CLASSES = {
    "label",
    "labels",
}  # of items: for tasks of kind clustering; words to learn from where there are no others
# Words that say nothing about what a record shows, by their column or by themselves: URLs, hashes.
BOOKKEEPING = re.compile(
    r"(.*_)?(id|ids|url|uri|link|hash|sha256|md5|key|status|license|mime|exif|width|height|split)",
    re.IGNORECASE,
)
NO_WORDS = re.compile(
    r"[a-z][a-z0-9+.-]*://\S+|[0-9a-f]{16,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    re.IGNORECASE,
)
PER_KIND: dict[Kind, frozenset[str]] = {
    "items": frozenset({"id", "split", "image", "audio", "video"}),
    "pairs": frozenset({"id", "split", "query", "target", "score", "query_image", "target_image"}),
    "interactions": frozenset({"user", "item", "time", "label"}),
}


@dataclass(frozen=True)
class Columns:
    """Role -> column; negatives: columns, in order; fields: text columns, a caption first; the
    others are carried along.
    """

    kind: Kind
    roles: Mapping[str, str]
    fields: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    most_negatives: int = 0  # of the first rows

    def of(self, role: str, row: Row) -> object:
        """Return a row's value of a role; None where it has none."""
        return row.values.get(self.roles[role]) if role in self.roles else None


@dataclass
class _Look:
    """What the first rows show."""

    names: dict[str, None] = field(default_factory=dict)
    texts: set[str] = field(default_factory=set)
    longest: dict[str, int] = field(default_factory=dict)  # lists: most entries
    kinds: dict[str, Counter[str]] = field(default_factory=dict)  # of files, by their endings


def find_columns(
    rows: Iterable[Row], told: Mapping[str, str], kind: Kind | None, where: str
) -> Columns:
    """Return the meaning of a table's columns by its first rows.

    told: role -> column, from the command line. kind: None to find it. where: the table, for
    messages. Raises ConfigurationError for roles or columns that do not exist, and for a table that
    fits no kind.
    """
    look = _look(rows)
    if not look.names:
        raise ConfigurationError(f"{where}: no row can be read; expected a table with column names")
    for role, column in told.items():
        if role not in ROLES and role != "text":
            raise ConfigurationError(
                f"--column {role}={column}: no such role{nearest(role, [*ROLES, 'text'])}"
            )
        missing = [name for name in column.split("+") if name not in look.names]
        if missing:
            raise ConfigurationError(
                f"--column {role}={column}: no column {missing[0]!r}; {where} has: "
                f"{', '.join(look.names)}"
            )
    roles = {role: column for role, column in told.items() if role != "text"}
    lower = {
        name.lower().replace("-", "_").replace(" ", "_"): name for name in reversed(look.names)
    }
    for role, names in ROLES.items():
        taken = set(roles.values())
        found = next(
            (lower[name] for name in names.split() if lower.get(name, "") not in ("", *taken)), None
        )
        if role not in roles and found is not None:
            roles[role] = found
    if "image" in roles and "image" not in told:
        _by_ending(roles, look)
    chosen = kind or _kind(roles)
    roles = {role: column for role, column in roles.items() if role in PER_KIND[chosen]}
    _check(chosen, roles, where, look)
    negatives = (
        [name for name in look.names if NEGATIVE.fullmatch(name)] if chosen == "pairs" else []
    )
    if told.get("text"):
        fields = told["text"].split("+")
    else:
        words = [
            name
            for name in look.names
            if name in look.texts and name not in (*roles.values(), *negatives)
        ]
        fields = [
            name
            for name in words
            if name.lower() not in CLASSES and not BOOKKEEPING.fullmatch(name)
        ]
        fields = fields or [name for name in words if name.lower() in CLASSES]
        fields.sort(
            key=lambda name: (
                CAPTIONS.index(name.lower()) if name.lower() in CAPTIONS else len(CAPTIONS)
            )
        )
    if chosen == "items" and not fields and not {"image", "audio", "video"} & roles.keys():
        raise ConfigurationError(
            f"{where}: no column of texts, pictures or sound; it has: {', '.join(look.names)}; "
            "name one: --column image=NAME"
        )
    most = sum(look.longest.get(name, 1) for name in negatives)
    return Columns(
        chosen, roles, tuple(fields) if chosen == "items" else (), tuple(negatives), most
    )


def _by_ending(roles: dict[str, str], look: _Look) -> None:
    """Give a column of files, taken for pictures by its name, the role that the files' endings
    say.
    """
    kinds = look.kinds.get(roles["image"], Counter())
    role = {"sound": "audio", "video": "video"}.get(kinds.most_common(1)[0][0] if kinds else "")
    if role is not None:
        column = roles.pop("image")
        roles.setdefault(role, column)


def _kind(roles: Mapping[str, str]) -> Kind:
    if "user" in roles and "item" in roles:
        return "interactions"
    return (
        "pairs"
        if {"query", "query_image"} & roles.keys() and {"target", "target_image"} & roles.keys()
        else "items"
    )


def _check(kind: Kind, roles: Mapping[str, str], where: str, look: _Look) -> None:
    needed = {
        "pairs": (("query", "query_image"), ("target", "target_image")),
        "interactions": (("user",), ("item",)),
        "items": (),
    }[kind]
    for some in needed:
        if not set(some) & roles.keys():
            raise ConfigurationError(
                f"{where}: no column for '{some[0]}' of {kind}; it has: {', '.join(look.names)}; "
                f"name it with --column {some[0]}=NAME"
            )


def _look(rows: Iterable[Row]) -> _Look:
    look = _Look()
    for row in rows:
        if row.problem is not None:
            continue
        look.names |= dict.fromkeys(row.values)
        for name, value in row.values.items():
            if given(value) is None if not isinstance(value, list | dict) else not value:
                continue
            if isinstance(value, list):
                look.longest[name] = max(look.longest.get(name, 0), len(value))
            kind = (
                kind_of(value[-8:].lower())
                if isinstance(value, str) and "." in value[-8:]
                else None
            )
            if kind is not None:
                look.kinds.setdefault(name, Counter())[kind] += 1
            if is_text(value):
                look.texts.add(name)
    return look


def is_text(value: object) -> bool:
    """Return whether a value is words: no number, no date, no bytes, or a list or {LANGUAGE:
    ...} of such.
    """
    if isinstance(value, list):
        return bool(value) and all(isinstance(entry, str) for entry in value)
    if isinstance(value, dict):
        return (
            bool(value)
            and all(
                isinstance(entry, str) or is_text(entry)
                for entry in value.values()
                if entry is not None
            )
            and "bytes" not in value
        )
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return (
            value.lower() not in ("true", "false")
            and not NO_WORDS.fullmatch(value)
            and not re.fullmatch(r"\d{4}-\d\d-\d\d([T ][\d:.+Z-]+)?", value)
        )
    return False


def first_rows(parts: Iterable[Part], limit: int = LOOKED_AT) -> list[Row]:
    """Return the first rows of a source."""
    found: list[Row] = []
    for part in parts:
        for row in part.rows():
            found.append(row)
            if len(found) == limit:
                return found
    return found


def seconds(value: object) -> float | None:
    """Return a time in seconds since 1970: numbers as they are, dates of ISO 8601 (UTC where
    they name no zone).

    None where none is given. Raises ValueError for anything else.
    """
    if given(value) is None:
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = datetime.datetime.fromisoformat(str(value).strip())
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    if isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.60} is no time")
    return float(value)


def number(value: object) -> object:
    """Return a table's value as JSON has it: '3' -> 3, '0.5' -> 0.5, other text, lists and
    objects as they are, the rest as text.
    """
    if isinstance(value, str):
        for kind in (int, float):
            try:
                found = kind(value)
            except ValueError:
                continue
            return found if math.isfinite(found) else value
        return value
    return value if isinstance(value, int | float | bool | list | dict | None) else str(value)


def parse_told(values: Sequence[str]) -> dict[str, str]:
    """Return role -> column of the command line's ROLE=COLUMN.

    Raises ConfigurationError for other forms.
    """
    told: dict[str, str] = {}
    for value in values:
        role, equals, column = value.partition("=")
        if not equals or not role or not column:
            raise ConfigurationError(
                f"--column {value}: expected ROLE=COLUMN, such as image=photo_file"
            )
        told[role] = column
    return told
