"""Texts and JSON as people save them: byte order marks, UTF-16, Latin-1, halves of surrogate
pairs, brackets without end.

A text that is no UTF-8 is read as what it most likely is, and said to be repaired, so that
`sailplan data validate` can count it. JSON that cannot be used raises ValueError with a reason that
fits into a line.
"""

from __future__ import annotations

import codecs
import json
import re
from contextlib import suppress
from dataclasses import dataclass

from sailplan.config.fields import JsonObject

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SURROGATE = re.compile("[\ud800-\udfff]")
ESCAPED = (b"\\ud", b"\\uD")  # how JSON writes halves of surrogate pairs
DECODER = json.JSONDecoder()
NO_TEXT = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # a text file has none of these


@dataclass(frozen=True)
class Text:
    """A decoded text; `repaired`: its bytes were no text of the encoding that they seem to be
    in.
    """

    text: str
    repaired: bool = False


def decode_text(content: bytes) -> Text:
    """Return the text of bytes in UTF-8, or in UTF-16 and UTF-32 with or without a mark; of
    other bytes what can be had.

    Bytes that hold characters of UTF-8 beside broken ones keep those (the others become U+FFFD);
    else they are read as Windows' Latin-1, which maps every byte.
    """
    for mark, encoding in MARKS:
        if content.startswith(mark):
            text = content.decode(encoding, "replace")
            return Text(text, REPLACEMENT in text)
    wide = _without_mark(content)
    if wide is not None:
        text = content.decode(wide, "replace")
        return Text(text, REPLACEMENT in text)
    try:
        text = content.decode()
        return Text(NO_TEXT.sub(" ", text), NO_TEXT.search(text) is not None)
    except UnicodeDecodeError:
        kept = content.decode("utf-8", "replace")
        if any(ord(character) > 127 and character != REPLACEMENT for character in kept):
            return Text(kept, True)
        try:
            return Text(content.decode("cp1252"), True)
        except UnicodeDecodeError:
            return Text(content.decode("latin-1"), True)


def wide_encoding(content: bytes) -> str | None:
    """Return the encoding of two or four bytes a character that a file's first bytes show, by
    its mark or its zeros; None for others.
    """
    for mark, encoding in MARKS[1:]:
        if content.startswith(mark):
            return encoding
    return _without_mark(content)


def _without_mark(content: bytes) -> str | None:
    """The wide encoding of bytes without a mark, by where their zeros lie: most texts have a
    character below 256 in each half.
    """
    if len(content) < 4 or b"\0" not in content[:64]:
        return None
    parts = [content[start:256:4] for start in range(4)]
    mostly_zero = tuple(2 * part.count(0) > len(part) for part in parts)
    wide: dict[tuple[bool, ...], str] = {
        (False, True, True, True): "utf-32-le",
        (True, True, True, False): "utf-32-be",
        (False, True, False, True): "utf-16-le",
        (True, False, True, False): "utf-16-be",
    }
    return wide.get(mostly_zero)


def parse_json(content: bytes) -> JsonObject:
    """Return the JSON object of a record.

    In any encoding that `decode_text` reads; a key that is there twice has its last value; half of
    a surrogate pair becomes U+FFFD. Raises ValueError for anything else: not JSON, not an object,
    nested too deeply, numbers of thousands of digits.
    """
    try:
        body = _body_of(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(body, dict):
        raise ValueError(f"found a {type(body).__name__}, expected an object")
    return body


def _body_of(content: bytes) -> object:
    if b"\0" not in content and not content.startswith(codecs.BOM_UTF8):
        with suppress(UnicodeDecodeError):
            text = content.decode()
            body = DECODER.decode(text)  # as json.loads, which looks for an encoding first
            return whole(body) if has_escaped_halves(content) else body
    try:
        return whole(json.loads(content))
    except UnicodeDecodeError:
        return whole(json.loads(decode_text(content).text))


def has_escaped_halves(content: bytes) -> bool:
    """Return whether JSON may hold halves of surrogate pairs as escapes."""
    return b"\\u" in content and any(sign in content for sign in ESCAPED)


def whole(value: object) -> object:
    """Return a JSON value with halves of surrogate pairs, which are no text, replaced by U+FFFD."""
    if isinstance(value, str):
        return (
            value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            if SURROGATE.search(value)
            else value
        )
    if isinstance(value, list):
        return [whole(entry) for entry in value]
    return (
        {whole(key): whole(entry) for key, entry in value.items()}
        if isinstance(value, dict)
        else value
    )
