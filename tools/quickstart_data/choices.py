"""`icon_choices` and `icon_histories`: which icon the authors of a Home Assistant integration
chose for which text.

Every integration names its entities, states and services (in many languages) and gives each an
icon: a real choice of a picture for a text. The "user" is the authors of an integration, not a
consumer, and nothing says in which order they
chose: the order of a history is the order of the file. Judge it as completing a set, never as the
next item.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Container, Iterator
from typing import Any

from quickstart_data.splits import HELD_OUT, TRAIN, fraction, split_by_name
from sailplan.data.writer import Record

ROOT = "homeassistant/components"
LANGUAGES = [
    "en",
    "de",
    "fr",
    "es",
    "it",
    "nl",
    "pl",
    "ru",
    "ja",
    "zh-Hans",
    "ko",
    "pt-BR",
    "sv",
    "cs",
    "tr",
    "da",
    "el",
    "uk",
    "ro",
    "ca",
    "hu",
    "fi",
    "nb",
    "vi",
]
HISTORY_LENGTH, JUDGED_LENGTH, HELD_OUT_USERS = 3, 5, 0.2
PLACEHOLDER = re.compile(r"\{[^{}]*\}")


def at(tree: Any, *path: str) -> Any:
    """The value at a path of nested dicts, or None."""
    for step in path:
        tree = tree.get(step) if isinstance(tree, dict) else None
    return tree


def clean(text: Any) -> str | None:
    """A text without `{placeholders}`; None where nothing is left."""
    if not isinstance(text, str):
        return None
    return " ".join(PLACEHOLDER.sub(" ", text).split()).strip(" -:,()") or None


def item_of(icon: Any, known: Container[str]) -> str | None:
    """`mdi:lightbulb` -> `icons/lightbulb`, or None for an icon that the `icons` set has not."""
    item = (
        "icons/" + icon.removeprefix("mdi:")
        if isinstance(icon, str) and icon.startswith("mdi:")
        else None
    )
    return item if item in known else None


class Integration:
    """One integration of the wheel: its icons.json and its translations."""

    def __init__(self, wheel: zipfile.ZipFile, names: set[str], domain: str) -> None:
        self.domain = domain
        self.icons = json.loads(wheel.read(f"{ROOT}/{domain}/icons.json"))
        self.translations = {}
        for language in LANGUAGES:
            if (name := f"{ROOT}/{domain}/translations/{language}.json") in names:
                self.translations[language] = json.loads(wheel.read(name))

    def texts(self, *path: str) -> dict[str, str]:
        found = {language: clean(at(tree, *path)) for language, tree in self.translations.items()}
        return {language: text for language, text in found.items() if text}

    def choices(self) -> Iterator[tuple[str, str, Any, dict[str, str]]]:
        """(kind, name, icon, texts) in the order of the file."""
        for platform, entities in (self.icons.get("entity") or {}).items():
            for key, entry in entities.items():
                names = self.texts("entity", platform, key, "name")
                if entry.get("default"):
                    yield "entity", f"{platform}/{key}", entry["default"], names
                for state, icon in (entry.get("state") or {}).items():
                    states = self.texts("entity", platform, key, "state", state)
                    texts = {
                        one: f"{names[one]}: {text}" if one in names else text
                        for one, text in states.items()
                    }
                    yield "state", f"{platform}/{key}/{state}", icon, texts
        for service, entry in (self.icons.get("services") or {}).items():
            icon = entry.get("service") if isinstance(entry, dict) else entry
            if icon:
                yield "service", service, icon, self.texts("services", service, "name")


def icons_in_python(
    wheel: zipfile.ZipFile, names: set[str], known: Container[str]
) -> dict[str, set[str]]:
    """Known icons named anywhere in each integration's Python files."""
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        if name.startswith(f"{ROOT}/") and name.endswith(".py"):
            for icon in set(re.findall(rb"mdi:[a-z0-9-]+", wheel.read(name))):
                if item := item_of(icon.decode(), known):
                    found[name.split("/")[2]].add(item)
    return found


def read_choices(
    wheel: zipfile.ZipFile, known: dict[str, str]
) -> tuple[list[Record], list[Record]]:
    """(icon_choices, icon_histories); `known` maps the ids of the `icons` set to their split,
    other icons are left out.

    A choice is split by its text; `item_split` repeats the split of its icon, because the two are
    independent.
    """
    names = set(wheel.namelist())
    in_python = icons_in_python(wheel, names, known)
    choices, histories = [], []
    for path in sorted(
        name for name in names if name.startswith(f"{ROOT}/") and name.endswith("/icons.json")
    ):
        integration = Integration(wheel, names, path.split("/")[2])
        user, items = integration.domain, []
        for kind, name, icon, texts in integration.choices():
            item = item_of(icon, known)
            if item is None:
                continue
            items.append(item)
            if "en" in texts:
                body = {
                    "id": f"icon_choices/{user}/{kind}/{name}",
                    "text": texts,
                    "item": item,
                    "user": user,
                    "kind": kind,
                }
                choices.append(Record(body | {"item_split": known[item]}))
        distinct = list(dict.fromkeys(items))
        if len(distinct) >= HISTORY_LENGTH:
            judged = len(distinct) >= JUDGED_LENGTH and fraction(user, "user") < HELD_OUT_USERS
            body = {
                "id": f"icon_histories/{user}",
                "split": HELD_OUT if judged else TRAIN,
                "items": distinct,
                "source_items": sorted(set(distinct) | in_python.get(user, set())),
            }
            histories.append(Record(body))
    for record, side in zip(
        choices, split_by_name([r.body["text"]["en"] for r in choices]), strict=True
    ):
        record.body["split"] = side
    return choices, histories
