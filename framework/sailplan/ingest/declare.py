"""The YAML of an imported data set: what `conf/data/NAME.yaml` says, from what its records have."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import yaml

from sailplan.config.compose import choices, own_folder
from sailplan.config.fields import JsonObject, JsonView
from sailplan.errors import ConfigurationError
from sailplan.runtime.files import write_whole

MODALITY = {"image": "vision", "video": "vision", "audio": "audio"}
VIEW = {"image": "photo", "video": "film", "audio": "sound"}
MARK = "Written by `sailplan"  # in the files that may be written anew
MOST_NEGATIVES = 8  # of a record, in a step's denominators


def check_name(name: str) -> None:
    """Raise ConfigurationError for a name that cannot be a data set's."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name == "reading":
        raise ConfigurationError(
            f"--name {name}: expected letters, digits and _, a letter first, and not 'reading'"
        )


def target_file(name: str, group: str = "data") -> Path:
    """Return the YAML that a name stands for in the user's own configuration.

    Raises ConfigurationError where sailplan has one of that name.
    """
    own = own_folder() / group / f"{name}.yaml"
    known = choices(group).get(name)
    if known is not None and MARK not in known.read_text(encoding="utf-8"):
        raise ConfigurationError(
            f"{name}: found {known} that somebody else wrote, expected a name of your own; choose "
            "another"
        )
    return own


def items(media: Collection[str], fields: Sequence[str], *, catalogue: bool = False) -> JsonObject:
    """Return the views and patterns of an items data set.

    media: roles that its records have; fields: of text, a caption first.

    catalogue: items that other data sets refer to: texts alone then make no pattern of their own.
    """
    views: JsonObject = {}
    patterns: JsonObject = {}
    shown = list(
        dict.fromkeys(MODALITY[role] for role in ("image", "video", "audio") if role in media)
    )
    for modality in shown:
        role = next(
            role
            for role in ("image", "video", "audio")
            if role in media and MODALITY[role] == modality
        )
        views[VIEW[role]] = {"modalities": [modality], "prompt": VIEW[role]}
    if fields:
        views["text"] = {"modalities": ["text"], "fields": list(fields), "prompt": "text"}
    for view in list(views):
        if fields and view != "text":
            patterns[f"{view}_to_text"] = {"query": view, "target": "text"}
    if (
        not shown and len(fields) > 1 and not catalogue
    ):  # texts alone: the first says what the others are about
        views["head"] = {"modalities": ["text"], "fields": [fields[0]], "prompt": "text"}
        views["body"] = {"modalities": ["text"], "fields": list(fields[1:]), "prompt": "text"}
        patterns["head_to_body"] = {"query": "head", "target": "body"}
    views["item"] = (
        {"modalities": [*shown, *(["text"] if fields else [])]}
        | ({"fields": list(fields)} if fields else {})
        | {"prompt": "item"}
    )
    return {"kind": "items", "views": views, "patterns": patterns}


def pairs(sides: Mapping[str, Collection[str]], negatives: int) -> JsonObject:
    """Return a data set of pairs that hold their items. sides: query and target -> modalities."""
    views = {}
    for side, modalities in sides.items():
        shown = [one for one in ("vision", "audio", "text") if one in modalities]
        views[side] = (
            {"of": side, "modalities": shown}
            | ({"fields": ["text"]} if "text" in shown else {})
            | {"prompt": side}
        )
    body: JsonObject = {
        "kind": "pairs",
        "views": views,
        "patterns": {"query_to_target": {"query": "query", "target": "target"}},
    }
    return body | ({"negatives": min(negatives, MOST_NEGATIVES)} if negatives else {})


def pairs_by_id(catalogue: str, item_views: JsonView, negatives: int = 0) -> JsonObject:
    """Return a data set of text queries and ids of a catalogue's items."""
    views = {
        "query": {"of": "query", "modalities": ["text"], "fields": ["text"], "prompt": "query"},
        "target": {"of": "target", **item_views["item"]},
    }
    body = {
        "kind": "pairs",
        "catalogue": catalogue,
        "views": views,
        "patterns": {"query_to_target": {"query": "query", "target": "target"}},
    }
    return body | ({"negatives": min(negatives, MOST_NEGATIVES)} if negatives else {})


def sequences(catalogue: str, item_views: JsonView) -> JsonObject:
    """Return a data set of histories over a catalogue."""
    views = {
        "history": {"of": "history", **item_views["item"]},
        "target": {"of": "target", **item_views["item"]},
    }
    return {
        "kind": "sequences", "catalogue": catalogue, "history_length": 10, "views": views,
        "patterns": {"history_to_target": {"query": "history", "target": "target"}},
    }  # fmt: skip


def write(
    path: Path,
    name: str,
    about: str,
    shards: str,
    body: Mapping[str, object],
    *,
    held_out: float,
    by: str,
    language: str,
) -> None:
    """Write a data set's YAML."""
    content: JsonObject = {"shards": shards, "kind": body["kind"]}
    content |= {"held_out": {"fraction": held_out, "by": by}} if held_out else {}
    content |= {"language_weights": {language: 1.0}} | {
        key: value for key, value in body.items() if key != "kind"
    }
    head = f"# @package data.sets.{name}\n# {about}\n# {MARK} data import`; yours to change.\n"
    write_whole(path, head + dump(content))


def dump(content: Mapping[str, object]) -> str:
    """Return YAML; words that YAML takes for something else (`no`) are quoted, short maps are on
    a line.
    """
    return yaml.dump(
        dict(content),
        Dumper=_Plain,
        sort_keys=False,
        allow_unicode=True,
        width=120,
        default_flow_style=None,
    )


class _Plain(yaml.SafeDumper):
    """YAML without anchors, which people read as magic."""

    def ignore_aliases(self, data: object) -> bool:
        return True
