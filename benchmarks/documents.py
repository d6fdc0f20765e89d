"""A table in a document, made from a results file: what lies between two marks is written anew."""

from __future__ import annotations

from pathlib import Path


def fill(document: Path, name: str, text: str) -> None:
    """Put text between `<!-- NAME:begin -->` and `<!-- NAME:end -->` of a document.

    Raises ValueError where it does not have each mark once.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = document.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
