"""What an item shows: a text, a picture, sound, or a dict with some of text, image and audio."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

BITS = {"text": 1, "vision": 2, "audio": 4}
KEYS = {"text": "text", "image": "vision", "audio": "audio"}  # of a dict -> modality
SUFFIXES = {
    "vision": (".jpg", ".jpeg", ".png", ".webp"),
    "audio": (".ogg", ".opus", ".flac", ".wav"),
}


def by_modality(item: object) -> dict[str, Any]:
    """Return modality -> text, picture or sound of one item, in the order text, vision, audio.

    A string is a text unless it is the path of an existing file that ends like a picture or sound.
    Raises ValueError for what is no item.
    """
    if isinstance(item, Mapping) and not {"array", "sampling_rate"} <= item.keys():
        unknown = sorted(set(item) - set(KEYS))
        if unknown or not item:
            raise ValueError(
                f"an item has the keys {', '.join(map(str, item)) or 'of nothing'}: expected some "
                f"of {', '.join(KEYS)}"
            )
        return {modality: item[key] for key, modality in KEYS.items() if key in item}
    if isinstance(item, (str, Path)):
        ending = Path(item).suffix.lower() if len(str(item)) < 4096 else ""
        found = next(
            (modality for modality, endings in SUFFIXES.items() if ending in endings), None
        )
        if found and (isinstance(item, Path) or Path(item).is_file()):
            return {found: item}
        if isinstance(item, Path):
            raise ValueError(
                f"{item}: expected a file that ends in "
                f"{', '.join(end for ends in SUFFIXES.values() for end in ends)}"
            )
        return {"text": item}
    if isinstance(item, Mapping) or (isinstance(item, np.ndarray) and item.ndim == 1):
        return {"audio": item}
    if hasattr(item, "convert") or (hasattr(item, "ndim") and item.ndim == 3):
        return {"vision": item}
    raise ValueError(
        f"an item is a {type(item).__name__}: expected a text, a picture, sound, or a dict of them"
    )
