"""Names and ids as they come from outside: bytes of any encoding, with dots, control characters,
sidecars, frames by number.

A member's name is cut as webdataset does, at the first dot of its last path component: `a/b.0.jpg`
has the key `a/b` and the extension `0.jpg`. What stands between key and ending is a frame's number
(`0`, `frame_0012`), a companion's kind (`mask`), or part of a name that has dots itself (`photo
1.5.jpg`); which of them it is follows from the neighbours, see `samples`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

WORD = re.compile(r"[a-z_][a-z_\-]*", re.IGNORECASE)  # the kind of a companion: mask, depth_map
NUMBERED = re.compile(r"(?:[a-z_\-]*?)(\d+)", re.IGNORECASE)  # a frame: 7, 0007, frame_7
PART = re.compile(
    r"(query|target|negatives?[._-]?(\d+)?)\.(.+)"
)  # an extension in a record that holds a pair itself
FRAME = re.compile(r"\.\d+$")
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f\x85\u2028\u2029]"
)  # what ends a line or a C string


def split_name(name: str) -> tuple[str, str]:
    """Return key and extension: 'a/b.0.JPG' -> ('a/b', '0.jpg'); extension in lower case."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def is_sidecar(name: str) -> bool:
    """Return whether a file system wrote the member for itself: `._NAME`, `.DS_Store`,
    `__MACOSX/`, `Thumbs.db`, `@eaDir/`.
    """
    *folders, base = name.split("/")
    return (
        base.startswith(".")
        or base.lower() in ("thumbs.db", "desktop.ini")
        or not {"__MACOSX", "@eaDir"}.isdisjoint(folders)
    )


def readable(text: str) -> str:
    """Return the text with what no file or line can hold written as an escape: bytes that are no
    UTF-8, control characters.

    `caf\\xe9` stands for the byte 0xE9, `a\\n` for a line's end; half of a surrogate pair becomes
    its escape too.
    """
    if not text.isprintable():
        text = UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
        # Bytes of a file name that are no UTF-8 arrive as surrogates DC80 to DCFF.
        text = re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)
        text = text.encode("utf-8", "backslashreplace").decode()
    return text


def given(value: object) -> str | None:
    """Return an id, a split or another name as text; None where none was given: null, "", or a
    table's NaN. 0 is a name.
    """
    return readable(str(value)) if is_given(value) else None


def is_given(value: object) -> bool:
    """Return whether there is a value: not null, "" or a table's NaN."""
    return not (value is None or value == "" or value != value)


def samples(names: Sequence[str]) -> list[tuple[str, list[tuple[int, str]]]]:
    """Return the samples of a run of neighbouring members that share a key: each one's key, and
    number and extension of its members.

    A sample's own members have a plain ending (`KEY.jpg`, `KEY.json`), beside them frames
    `KEY.7.jpg` and companions `KEY.mask.png`. The run is several samples with dots in their names
    where two texts or two JSONs would be one sample's, where what stands between is neither a
    number nor a word (`IMG_2024.05.01.jpg`), or where a name is there again.
    """
    key = split_name(names[0])[0]
    extensions = [split_name(name)[1] for name in names]
    middles = [extension.rpartition(".")[0] for extension in extensions]
    if not _are_several(extensions, middles):
        return [(key, list(enumerate(extensions)))]
    found: dict[str, list[tuple[str, list[tuple[int, str]]]]] = {}
    order = []
    for number, name in enumerate(names):
        stem, ending = name.rpartition(".")[0], extensions[number].rpartition(".")[2]
        frame = FRAME.search(middles[number])
        if (
            frame is not None and middles[number][: frame.start()] in middles
        ):  # a frame of a name with dots
            stem, ending = stem[: -len(frame[0])], f"{frame[0][1:]}.{ending}"
        of_stem = found.setdefault(stem, [])
        if not of_stem or ending in [extension for _, extension in of_stem[-1][1]]:
            of_stem.append((stem, []))
            order.append(of_stem[-1])
        of_stem[-1][1].append((number, ending))
    return order


@lru_cache(maxsize=4096)
def part_of(extension: str) -> tuple[str, str]:
    """Return which part of a pair a member belongs to, and its extension there: 'query.jpg' ->
    ('query', 'jpg'), 'negative.1.txt' ->
    ('negatives/1', 'txt'); '' for the record's own."""
    found = PART.fullmatch(extension)
    if found is None:
        return "", extension
    return (
        f"negatives/{int(found[2] or 0)}" if found[1].startswith("negative") else found[1]
    ), found[3]


def _are_several(extensions: Sequence[str], middles: Sequence[str]) -> bool:
    if len(set(extensions)) < len(extensions):
        return True
    own = [
        (extension, middle)
        for extension, middle in zip(extensions, middles, strict=True)
        if not PART.fullmatch(extension)
    ]
    extensions, middles = [extension for extension, _ in own], [middle for _, middle in own]
    if any(
        middle and not NUMBERED.fullmatch(middle) and not WORD.fullmatch(middle)
        for middle in middles
    ):
        return True
    texts = [
        middle
        for middle, extension in zip(middles, extensions, strict=True)
        if extension.rpartition(".")[2] in ("json", "txt")
    ]
    if any(NUMBERED.fullmatch(middle) for middle in texts):
        return True
    # All have a word between (`walk.final.jpg`, `walk.final.txt`): names with a dot where one of
    # them has several members.
    return bool(middles) and all(middles) and len(set(texts)) > 1


def frame_order(extension: str) -> tuple[int, str, int]:
    """Return a key that sorts a record's pictures: the plain ones first, then frames by their
    number, not by its digits.
    """
    middle = extension.rpartition(".")[0]
    found = NUMBERED.fullmatch(middle)
    return (
        (0, "", 0)
        if not middle
        else (1, middle[: found.start(1)], int(found[1]))
        if found
        else (2, middle, 0)
    )
