"""How long the texts of each record are: counted in tokens once, kept beside the shard's index, read as mapped arrays.

Ranks that agree on the lengths of a step's rows can share them out, and cut them into equally many micro-batches,
without a message. A row's text depends on the view, and in training on a drawn language and on dropped fields; so what
is kept is one entry per field and language, of eight bytes: `data.costs` turns entries into a row's length. A pair or
a sequence also keeps the hashes of the catalogue items that it names, of which the catalogue has the lengths.

Per shard and tokenizer there is one file `.index/NAME.TOKENIZER.lengths`, bound to the shard's state by the index's
own fingerprint and built where it is missing or old. Only tables of records that are asked for are opened.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sailplan.data.index import ShardIndex, id_hash
from sailplan.data.names import given
from sailplan.data.places import explained, kept_places, place_to_write
from sailplan.data.processor import TokenCounts
from sailplan.data.text import clean
from sailplan.errors import BadDataError

VERSION = 2
TABLES_KEPT = 512  # mapped, so each costs a few pages of address space, not its size
MOST_REFERENCES = 64  # of one kind that a record keeps: of a longer history its latest, else the first
MOST = 0xFFFF  # tokens, texts or names that an entry can tell
PICTURES, SOUND = 0, 1  # codes of the entries that count media; fields follow
PICTURES_OF, SOUND_OF = "*pictures", "*sound"  # entries that count the media of a part that a pair holds itself, as fields `PART:NAME`
ROLES = ("item", "query", "items", "history", "target", "negatives")
ALIGNMENT = 8

Integers = NDArray[np.int64]
Outlines = Callable[[int], Iterable[tuple[Mapping[str, Any], int, int]]]
Extent = tuple[str, tuple[int, ...], int]  # dtype, shape, offset in bytes


@dataclass(frozen=True)
class Lengths:
    """Entries and references of n records, each sorted by its record; k entries, j references, all int64 but `hash`."""

    record: Integers  # [k] place of the record among those asked for
    field: Integers  # [k] code of the field; PICTURES and SOUND count media in `texts`
    language: Integers  # [k] code of the language
    texts: Integers  # [k] texts of the entry that are left when cleaned
    tokens: Integers  # [k] of them joined, without the field's label
    owner: Integers  # [j] place of the record that names an item
    role: Integers  # [j] index into ROLES
    hash: NDArray[np.uint64]  # [j] `id_hash` of the item


class LengthIndex:
    """Lengths of a data set's records by position; `lengths(positions)` is all that others need to know."""

    def __init__(self, index: ShardIndex, tokenizer: TokenCounts, outlines: Outlines, cache: Path | None = None) -> None:
        """outlines: shard number -> for each of its records the texts `fields` {FIELD: {LANGUAGE: text or texts}} with the
        keys of ROLES, and how many pictures and sounds it has. cache: folder for tables whose index cannot be written to."""
        self.index, self.tokenizer, self._outlines, self._cache = index, tokenizer, outlines, cache
        self._names = {"fields": _Codes(2), "languages": _Codes(0)}
        self._tables: OrderedDict[int, _Table] = OrderedDict()
        self._lock = threading.RLock()  # the prefetch thread and an evaluation may ask at the same time
        self.opened = 0  # tables mapped so far, for counting

    def build(self, progress: Callable[[], None] = lambda: None) -> None:
        """Write the tables that are missing or belong to an older state of their shard."""
        for shard in range(len(self.index.shards)):
            if self._found(shard) is None:
                self._write(shard)
            progress()

    def field(self, name: str) -> int:
        """Return the code of a field."""
        return self._names["fields"].code(name)

    def language(self, name: str) -> int:
        """Return the code of a language."""
        return self._names["languages"].code(name)

    def fields_of(self, shard: int) -> list[str]:
        """Return the names of the text fields that a shard's records have."""
        found = self._found(shard)
        return [] if found is None else list(found[1]["fields"])

    def lengths(self, positions: Integers) -> Lengths:
        """Return what is known of the records at the positions int64 [n]; opens the tables of their shards, no others."""
        shards = np.searchsorted(self.index.starts, positions, side="right") - 1
        by_shard = np.argsort(shards, kind="stable")
        edges = np.flatnonzero(np.diff(shards[by_shard])) + 1
        empty = np.empty(0, dtype=np.int64)
        parts = [Lengths(empty, empty, empty, empty, empty, empty, empty, empty.view(np.uint64))]
        for places in np.split(by_shard, edges) if len(positions) else []:
            shard = int(shards[places[0]])
            parts.append(self._table(shard).gather(positions[places] - self.index.starts[shard], places))
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in Lengths.__dataclass_fields__}
        entries, references = np.argsort(joined["record"], kind="stable"), np.argsort(joined["owner"], kind="stable")
        return Lengths(**{name: values[references if name in ("owner", "role", "hash") else entries] for name, values in joined.items()})

    # ---------------------------------------------------------------- parts
    def _table(self, shard: int) -> _Table:
        with self._lock:
            if shard not in self._tables:
                found = self._found(shard)
                if found is None:  # ranks deal rows by it, so it must be there, and the same, on all of them
                    raise BadDataError(f"{self._name(shard)}: the lengths vanished or were damaged while the run used them: start again")
                self._tables[shard] = _Table(*found, self._names["fields"], self._names["languages"])
                self.opened += 1
                if len(self._tables) > TABLES_KEPT:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(shard)
            return self._tables[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def _found(self, shard: int) -> tuple[Path, dict[str, Any]] | None:
        """The shard's whole file of its present state and its header, None where there is none."""
        for place in kept_places(self.index.shards[shard], self._name(shard), self._cache):
            header = _header(place, self.index.state(shard))
            if header is not None:
                return place, header
        return None

    def _name(self, shard: int) -> str:
        return f"{self.index.shards[shard].stem}.{self.tokenizer.digest}.lengths"

    def _write(self, shard: int) -> None:
        fields, languages = _Codes(2), _Codes(0)
        entries: list[tuple[int, int, int, int]] = []
        texts: list[str] = []
        starts, reference_starts, references, roles = [0], [0], [], []
        for body, pictures, sounds in self._outlines(shard):
            for code, count in ((PICTURES, pictures), (SOUND, sounds)):
                if count:
                    entries.append((code, 0, min(count, MOST), 0))
                    texts.append("")
            for part, (shown, heard) in body.get("media", {}).items():
                for name, count in ((f"{part}:{PICTURES_OF}", shown), (f"{part}:{SOUND_OF}", heard)):
                    if count:
                        entries.append((fields.code(name), 0, min(count, MOST), 0))
                        texts.append("")
            for name, language, kept in _texts(body):
                entries.append((fields.code(name), languages.code(language), min(len(kept), MOST), 0))
                texts.append(", ".join(kept))
            for role, key in enumerate(ROLES):
                named = _named(body.get(key), latest=key == "history")
                references += [id_hash(name) for name in named]
                roles += [role] * len(named)
            starts.append(len(entries))
            reference_starts.append(len(references))
        table = np.array(entries, dtype=np.uint16).reshape(-1, 4)
        table[:, 3] = np.minimum(self.tokenizer.counts(texts), MOST)
        arrays: dict[str, NDArray[Any]] = {
            "starts": np.array(starts, dtype=np.int64),
            "entries": table,
            "reference_starts": np.array(reference_starts, dtype=np.int64),
            "references": np.array(references, dtype=np.uint64),
            "roles": np.array(roles, dtype=np.uint8),
        }
        file = place_to_write(self.index.shards[shard], self._name(shard), self._cache)
        with explained(file, self._cache):
            _store(file, arrays, {"state": self.index.state(shard), "fields": list(fields), "languages": list(languages)})


class _Codes:
    """Names and their codes, in the order in which they were first seen."""

    def __init__(self, first: int) -> None:
        self._first, self._codes = first, dict[str, int]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._codes)

    def code(self, name: str) -> int:
        return self._codes.setdefault(name, self._first + len(self._codes))


class _Table:
    """One shard's file, mapped."""

    def __init__(self, file: Path, header: dict[str, Any], fields: _Codes, languages: _Codes) -> None:
        arrays = {name: _mapped(file, extent) for name, extent in header["arrays"].items()}
        self.starts, self.entries, self.reference_starts = arrays["starts"], arrays["entries"], arrays["reference_starts"]
        self.references, self.roles = arrays["references"], arrays["roles"]
        self.fields = np.array([PICTURES, SOUND, *map(fields.code, header["fields"])], dtype=np.int64)
        self.languages = np.array([*map(languages.code, header["languages"]), -1], dtype=np.int64)

    def gather(self, rows: Integers, places: Integers) -> Lengths:
        """Return the lengths of records by their rows in the shard int64 [n]; `places` [n] stand for them in the result."""
        chosen, owners = _runs(self.starts, rows)
        entries = self.entries[chosen].astype(np.int64)
        named, namers = _runs(self.reference_starts, rows)
        languages = self.languages[np.minimum(entries[:, 1], len(self.languages) - 1)]
        return Lengths(
            places[owners], self.fields[entries[:, 0]], languages, entries[:, 2], entries[:, 3],
            places[namers], self.roles[named].astype(np.int64), np.asarray(self.references[named]),
        )  # fmt: skip


def _runs(starts: NDArray[np.int64], rows: Integers) -> tuple[Integers, Integers]:
    """Return the elements of the rows' runs, and to which of the rows each belongs."""
    first, counts = np.asarray(starts[rows]), np.asarray(starts[rows + 1] - starts[rows])
    owners = np.repeat(np.arange(len(rows), dtype=np.int64), counts)
    return np.arange(counts.sum(), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts) + first[owners], owners


def _texts(body: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (field, language, cleaned texts) in the record's order, languages without a value left out."""
    for name, languages in (body.get("fields") or {}).items():
        for language, value in languages.items():
            if value:
                found = dict.fromkeys(filter(None, map(clean, [value] if isinstance(value, str) else value)))
                yield name, language, list(found)


def _named(value: Any, *, latest: bool) -> list[str]:
    entries = value if isinstance(value, list) else [value]
    names = [name for one in entries if not isinstance(one, dict) and (name := given(one)) is not None]
    return names[-MOST_REFERENCES:] if latest else names[:MOST_REFERENCES]


# ---------------------------------------------------------------- the file: a line of JSON, then aligned arrays
def _store(file: Path, arrays: Mapping[str, NDArray[Any]], header: dict[str, Any]) -> None:
    offset, extents = 0, {}
    for name, array in arrays.items():
        extents[name] = (array.dtype.str, array.shape, offset)
        offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    line = json.dumps({"version": VERSION, **header, "arrays": extents, "bytes": offset}).encode()
    line += b" " * (-(len(line) + 1) % ALIGNMENT) + b"\n"
    temporary = file.with_name(f".{file.name}-{os.getpid()}-{secrets.token_hex(4)}")
    with open(temporary, "wb") as target:
        target.write(line)
        for array in arrays.values():
            target.write(array.tobytes().ljust(-(-array.nbytes // ALIGNMENT) * ALIGNMENT, b"\0"))
    os.replace(temporary, file)


def _header(file: Path, state: Sequence[Any]) -> dict[str, Any] | None:
    """Return the file's header with absolute offsets, or None where there is no whole file of this state of the shard."""
    try:
        with open(file, "rb") as source:
            line = source.readline()
            header: dict[str, Any] = json.loads(line)
            whole = os.fstat(source.fileno()).st_size == len(line) + header["bytes"]
        if header["version"] != VERSION or header["state"] != list(state) or not whole:
            return None
        header["arrays"] = {name: (kind, tuple(shape), offset + len(line)) for name, (kind, shape, offset) in header["arrays"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return header


def _mapped(file: Path, extent: Extent) -> NDArray[Any]:
    kind, shape, offset = extent
    return np.memmap(file, dtype=np.dtype(kind), mode="r", offset=offset, shape=shape) if all(shape) else np.empty(shape, dtype=np.dtype(kind))

