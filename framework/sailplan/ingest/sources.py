"""What lies at a path: one table, several, a folder of pictures with captions, a Hugging Face
folder, tars, or a retrieval set.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sailplan.data.kinds import kind_of
from sailplan.data.names import is_sidecar, readable
from sailplan.data.parse import decode_text
from sailplan.errors import ConfigurationError
from sailplan.ingest import columnar, lines
from sailplan.ingest.rows import Part, Row, Source, split_of_file

Form = Literal["tars", "retrieval", "table", "captioned files"]
JUDGEMENTS = ("qrels", "default", "data")


@dataclass(frozen=True)
class Found:
    """A source and its form. media: the folder that names of files are relative to.

    retrieval: corpus, queries, judgements.
    """

    form: Form
    path: Path
    source: Source | None = None
    media: Path = Path()
    retrieval: dict[str, Source] = field(default_factory=dict)


@dataclass(frozen=True)
class Several:
    """Sources one after the other."""

    sources: Sequence[Source]

    def files(self) -> list[str]:
        return [name for source in self.sources for name in source.files()]

    def parts(self, size: int) -> Iterator[Part]:
        return itertools.chain.from_iterable(source.parts(size) for source in self.sources)


@dataclass(frozen=True)
class CaptionedPart:
    """Media files with a text file of the same name beside each."""

    folder: Path
    names: list[str] = field(repr=False)
    first: int
    split: str | None = None

    def rows(self) -> Iterator[Row]:
        for number, name in enumerate(self.names, self.first):
            path = self.folder / name
            role = {"picture": "image", "sound": "audio", "video": "video"}[
                str(kind_of(_ending(path.name)))
            ]
            stem = os.path.splitext(name)[0]
            problem, values, repaired = None, {role: name, "id": readable(stem)}, False
            try:
                text = decode_text((self.folder / f"{stem}.txt").read_bytes())
                values["caption"], repaired = text.text.strip(), text.repaired
            except OSError:
                problem = f"no {readable(stem)}.txt beside it"
            yield Row(readable(name), 1, number, values, problem, repaired)


@dataclass(frozen=True)
class CaptionedFiles:
    """A folder, and those below it, of media with captions beside them."""

    folder: Path

    def files(self) -> list[str]:
        return [str(self.folder)]

    def parts(self, size: int) -> Iterator[Part]:
        names = self._names(self.folder)
        for first in itertools.count(0, size):
            taken = list(itertools.islice(names, size))
            if not taken:
                return
            yield CaptionedPart(self.folder, taken, first)

    def _names(self, folder: Path) -> Iterator[str]:
        """Media below a folder, sorted within each folder; one folder's names are in memory at a
        time.
        """
        entries = sorted(
            (entry.name, entry.is_dir())
            for entry in os.scandir(folder)
            if not is_sidecar(f"{entry.name}/x")
        )
        for name, is_folder in entries:
            if is_folder:
                yield from self._names(folder / name)
            elif not is_sidecar(name) and kind_of(_ending(name)) in ("picture", "sound", "video"):
                yield str((folder / name).relative_to(self.folder))


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def find_source(given: str, media: Path | None) -> Found:
    """Return what lies at a path.

    Raises ConfigurationError, naming what was found, where it is nothing that can be imported.
    """
    path = Path(given)
    if "{" in given or given.endswith(".tar") or "://" in given or given.startswith("pipe:"):
        return Found("tars", path)
    if path.is_file():
        return Found("table", path, table(path), media or path.parent)
    if not path.is_dir():
        raise ConfigurationError(
            f"data import {given}: no such file or folder; expected a table, a folder or tars"
        )
    try:
        return _folder(path, media)
    except OSError as error:
        raise ConfigurationError(
            f"data import {given}: cannot be read ({error.strerror or error}); check its "
            "permissions"
        ) from error


def table(path: Path, name: str | None = None, split: str | None = None) -> Source:
    """Return a table's rows. name: in messages and ids.

    Raises ConfigurationError for other files.
    """
    if path.suffix in columnar.ENDINGS:
        return columnar.ColumnarSource(path, name or readable(path.name), split)
    if lines.ending(path) in lines.ENDINGS:
        return lines.LinesSource(path, name or readable(path.name), split=split)
    raise ConfigurationError(
        f"{path}: found no table; expected a name that ends in "
        f"{', '.join((*lines.ENDINGS, *columnar.ENDINGS))}, lines also in .gz"
    )


def is_table(path: Path) -> bool:
    """Return whether a file is a table by its name."""
    return (
        path.is_file()
        and not is_sidecar(path.name)
        and (path.suffix in columnar.ENDINGS or lines.ending(path) in lines.ENDINGS)
    )


def _folder(path: Path, media: Path | None) -> Found:
    names = sorted(entry for entry in os.listdir(path) if not is_sidecar(f"{entry}/x"))
    if any(name.endswith(".tar") for name in names):
        return Found("tars", path)
    retrieval = _retrieval(path, names)
    if retrieval:
        return Found("retrieval", path, retrieval=retrieval)
    saved = _saved(path)
    if saved:
        return Found("table", path, Several(saved), media or path)
    tables = [path / name for name in names if is_table(path / name)]
    files = [name for name in names if kind_of(_ending(name)) == "picture"]
    stems = {os.path.splitext(name)[0] for name in files}
    tables = [one for one in tables if not (one.suffix == ".txt" and one.stem in stems)]
    if not tables:
        tables = sorted(
            one for one in path.rglob("*.parquet") if not is_sidecar(str(one.relative_to(path)))
        )
    if len(tables) > 1 and not (len({one.suffix for one in tables}) == 1 and _belong(tables)):
        listed = ", ".join(str(one.relative_to(path)) for one in tables[:10])
        raise ConfigurationError(
            f"data import {path}: found {len(tables)} tables: {listed}; give one of them, and "
            f"--media {path} where it names files"
        )
    if tables:
        sources = [
            table(one, readable(str(one.relative_to(path))), _split_of(one, path)) for one in tables
        ]
        return Found(
            "table", path, sources[0] if len(sources) == 1 else Several(sources), media or path
        )
    if next(CaptionedFiles(path).parts(1), None) is None:
        raise ConfigurationError(
            f"data import {path}: no table, no picture, no sound and no .tar in it; it has: "
            f"{', '.join(names[:10]) or 'nothing'}"
        )
    return Found("captioned files", path, CaptionedFiles(path), path)


def _belong(tables: Sequence[Path]) -> bool:
    """Whether tables are parts of one: splits, numbered parts, or Parquet, which people cut."""
    numbered = all(any(character.isdigit() for character in one.stem) for one in tables)
    return (
        tables[0].suffix == ".parquet" or numbered or all(split_of_file(one.stem) for one in tables)
    )


def _split_of(path: Path, root: Path) -> str | None:
    """The split that a file's name, or a folder's on the way to it, begins with."""
    return next(
        (
            found
            for part in reversed(path.relative_to(root).parts)
            if (found := split_of_file(part.split(".")[0]))
        ),
        None,
    )


def _saved(path: Path) -> list[Source]:
    """Arrow files of Hugging Face's `save_to_disk`: of a Dataset, or of the splits of a
    DatasetDict.
    """
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return [source for split in splits for source in _saved_split(path / split, split, split)]
    return _saved_split(path, "", None) if (path / "state.json").is_file() else []


def _saved_split(path: Path, name: str, split: str | None) -> list[Source]:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    found: list[Source] = []
    for entry in state["_data_files"]:
        label = "/".join(part for part in (name, entry["filename"]) if part)
        found.append(
            columnar.ColumnarSource(
                path / entry["filename"], label, split_of_file(split) if split else None
            )
        )
    return found


def _retrieval(path: Path, names: Sequence[str]) -> dict[str, Source]:
    """Corpus, queries and judgements of a folder in BEIR's or MTEB's form; {} for other folders."""
    found: dict[str, Source] = {}
    for what in ("corpus", "queries"):
        name = next((name for name in names if name == what or name.split(".")[0] == what), None)
        if name is None:
            return {}
        found[what] = _tables_at(path / name)
    name = next(
        (
            name
            for wanted in JUDGEMENTS
            for name in names
            if name == wanted or name.split(".")[0] == wanted
        ),
        None,
    )
    if name is None:
        raise ConfigurationError(
            f"data import {path}: found corpus and queries without judgements; expected a folder "
            "qrels/ with train.tsv or test.tsv"
        )
    return found | {"qrels": _tables_at(path / name)}


def _tables_at(path: Path) -> Source:
    if path.is_file():
        return table(path)
    tables = sorted(one for one in path.rglob("*") if is_table(one))
    if not tables:
        raise ConfigurationError(
            f"data import {path}: no table in it; expected .tsv, .jsonl or .parquet"
        )
    return Several(
        [
            table(one, f"{path.name}/{readable(str(one.relative_to(path)))}", _split_of(one, path))
            for one in tables
        ]
    )
