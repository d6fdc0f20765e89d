"""How long the texts of each record are: counted in tokens once, kept beside the shard's index,
read as mapped arrays.

Ranks that agree on the lengths of a step's rows can share them out, and cut them into equally many
micro-batches, without a message. A row's text depends on the view, and in training on a drawn
language and on dropped fields; so what is kept is one entry per field and language, of eight bytes:
`data.costs` turns entries into a row's length. A pair or a sequence also keeps the hashes of the
catalogue items that it names, of which the catalogue has the lengths.

Per tokenizer and kind of data set there is one manifest and one file of tables, as for the index,
bound to the shards' state by the index's own fingerprints. The manifest says which fields and media
the records of each shard have. Only tables of records that are asked for are looked at.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sailplan.config.fields import JsonView
from sailplan.data.columns import Columns, Damaged, pack
from sailplan.data.filling import Progress
from sailplan.data.index import ShardIndex, id_hash
from sailplan.data.manifest import Entry
from sailplan.data.names import given
from sailplan.data.processor import TokenCounts
from sailplan.data.tables import Tables, open_tables
from sailplan.data.text import clean
from sailplan.runtime.arrays import Array

VERSION = 4
TABLES_KEPT = 4096  # mapped, so each costs a few pages of address space, not its size
MOST_REFERENCES = (
    64  # of one kind that a record keeps: of a longer history its latest, else the first
)
MOST = 0xFFFF  # tokens, texts or names that an entry can tell
PICTURES, SOUND = 0, 1  # codes of the entries that count media; fields follow
PICTURES_OF, SOUND_OF = (
    "*pictures",
    "*sound",
)  # entries that count the media of a part that a pair holds itself, as fields `PART:NAME`
ROLES = ("item", "query", "items", "history", "target", "negatives")

Integers = NDArray[np.int64]
Outlines = Callable[[int], Iterable[tuple[JsonView, int, int]]]


@dataclass(frozen=True)
class Lengths:
    """Entries and references of n records, each sorted by its record; k entries, j references,
    all int64 but `hash`.
    """

    record: Integers  # [k] place of the record among those asked for
    field: Integers  # [k] code of the field; PICTURES and SOUND count media in `texts`
    language: Integers  # [k] code of the language
    texts: Integers  # [k] texts of the entry that are left when cleaned
    tokens: Integers  # [k] of them joined, without the field's label
    owner: Integers  # [j] place of the record that names an item
    role: Integers  # [j] index into ROLES
    hash: NDArray[np.uint64]  # [j] `id_hash` of the item


class LengthIndex:
    """Lengths of a data set's records by position; `lengths(positions)` is all that others need
    to know.
    """

    def __init__(
        self,
        index: ShardIndex,
        tokenizer: TokenCounts,
        outlines: Outlines,
        cache: Path | None = None,
        variant: str = "",
    ) -> None:
        """outlines: shard number -> for each of its records the texts `fields` {FIELD:
        {LANGUAGE: text or texts}} with the keys of ROLES, and how many pictures and sounds it has.
        cache: folder for tables whose index cannot be written to.
        variant: tells outlines of the same shards apart that read them in other ways."""
        self.index, self.tokenizer, self._outlines, self._cache = index, tokenizer, outlines, cache
        self._kind = f"lengths-{VERSION}.{tokenizer.digest}" + (f".{variant}" if variant else "")
        self._names = {"fields": _Codes(2), "languages": _Codes(0)}
        self._tables_of: Tables | None = None
        self._tables: OrderedDict[int, _Table] = OrderedDict()
        self._lock = (
            threading.RLock()
        )  # the prefetch thread and an evaluation may ask at the same time
        self.opened = 0  # tables looked at so far, for counting

    def build(
        self,
        progress: Callable[[], None] | Progress = lambda: None,
        *,
        processes: int = 1,
        thorough: bool = False,
    ) -> None:
        """Make the tables that are missing or belong to an older state of their shard
        (`tables.open_tables`).
        """
        told = progress if isinstance(progress, Progress) else Progress(progress)
        self._tables_of = open_tables(
            self.index.shards,
            self._kind,
            self._cache,
            self._entry,
            self._stale,
            told,
            processes=processes,
            thorough=thorough,
        )

    def field(self, name: str) -> int:
        """Return the code of a field."""
        return self._names["fields"].code(name)

    def language(self, name: str) -> int:
        """Return the code of a language."""
        return self._names["languages"].code(name)

    def counts(self) -> dict[str, int]:
        """Return how many entries each text field has in all shards, and under PICTURES_OF and
        SOUND_OF how many records have media of their own (of a pair's parts: under `PART:` and
        these). The manifest tells; no table is
        looked at."""
        tables = self._built()
        return {tag: int(tables.counts(tag).sum()) for tag in tables.tags()}

    def shards_with(self, names: Iterable[str]) -> NDArray[np.int64]:
        """Return the numbers of the shards that have entries of any of these names, rising int64
        [n] (`counts`).
        """
        tables = self._built()
        return np.flatnonzero(
            np.sum(
                [tables.counts(name) for name in names]
                or [np.zeros(len(tables.rows), dtype=np.int64)],
                axis=0,
            )
            > 0
        )

    def lengths(self, positions: Integers) -> Lengths:
        """Return what is known of the records at the positions int64 [n]; opens the tables of
        their shards, no others.
        """
        shards = np.searchsorted(self.index.starts, positions, side="right") - 1
        by_shard = np.argsort(shards, kind="stable")
        edges = np.flatnonzero(np.diff(shards[by_shard])) + 1
        empty = np.empty(0, dtype=np.int64)
        parts = [Lengths(empty, empty, empty, empty, empty, empty, empty, empty.view(np.uint64))]
        for places in np.split(by_shard, edges) if len(positions) else []:
            shard = int(shards[places[0]])
            try:
                parts.append(
                    self._table(shard).gather(positions[places] - self.index.starts[shard], places)
                )
            except Damaged as error:
                raise self._built().damaged(shard, error) from error
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in Lengths.__dataclass_fields__
        }
        entries, references = (
            np.argsort(joined["record"], kind="stable"),
            np.argsort(joined["owner"], kind="stable"),
        )
        return Lengths(
            **{
                name: values[references if name in ("owner", "role", "hash") else entries]
                for name, values in joined.items()
            }
        )

    # ---------------------------------------------------------------- parts
    def _built(self) -> Tables:
        if self._tables_of is None:
            self.build()
        assert self._tables_of is not None
        return self._tables_of

    def _table(self, shard: int) -> _Table:
        with self._lock:
            if shard not in self._tables:
                tables = self._built()
                try:
                    self._tables[shard] = _Table(
                        tables.table(shard), self._names["fields"], self._names["languages"]
                    )
                except (
                    KeyError,
                    TypeError,
                    Damaged,
                    # Ranks deal rows by it, so it must be there, and the same, on all of them
                ) as error:
                    raise tables.damaged(shard, error) from error
                self.opened += 1
                if len(self._tables) > TABLES_KEPT:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(shard)
            return self._tables[shard]

    def _stale(self, tables: Tables, numbers: Integers) -> NDArray[np.bool_]:
        known, own = self.index.tables.rows[numbers], tables.rows[numbers]
        differs: NDArray[np.bool_] = (known["size"] != own["size"]) | (
            known["fingerprint"] != own["fingerprint"]
        )
        return differs | (known["scanned"] != own["scanned"])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tables": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def _entry(self, shard: int) -> Entry:
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
                for name, count in (
                    (f"{part}:{PICTURES_OF}", shown),
                    (f"{part}:{SOUND_OF}", heard),
                ):
                    if count:
                        entries.append((fields.code(name), 0, min(count, MOST), 0))
                        texts.append("")
            for name, language, kept in _texts(body):
                entries.append(
                    (fields.code(name), languages.code(language), min(len(kept), MOST), 0)
                )
                texts.append(", ".join(kept))
            for role, key in enumerate(ROLES):
                named = _named(body.get(key), latest=key == "history")
                references += [id_hash(name) for name in named]
                roles += [role] * len(named)
            starts.append(len(entries))
            reference_starts.append(len(references))
        table = np.array(entries, dtype=np.uint16).reshape(-1, 4)
        table[:, 3] = np.minimum(self.tokenizer.counts(texts), MOST)
        arrays: dict[str, Array] = {
            "starts": np.array(starts, dtype=np.int64),
            "entries": table,
            "reference_starts": np.array(reference_starts, dtype=np.int64),
            "references": np.array(references, dtype=np.uint64),
            "roles": np.array(roles, dtype=np.uint8),
        }
        named_codes = {PICTURES: PICTURES_OF, SOUND: SOUND_OF} | {
            fields.code(name): name for name in list(fields)
        }
        tags = Counter(named_codes[code] for code, *_ in entries)
        row, note = (
            self.index.tables.rows[shard],
            {"fields": list(fields), "languages": list(languages)},
        )
        return Entry(
            int(row["size"]),
            0,
            int(row["scanned"]),
            int(row["fingerprint"]),
            len(starts) - 1,
            0,
            tags,
            pack(arrays, note),
        )


class _Codes:
    """Names and their codes, in the order in which they were first seen."""

    def __init__(self, first: int) -> None:
        self._first, self._codes = first, dict[str, int]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._codes)

    def code(self, name: str) -> int:
        return self._codes.setdefault(name, self._first + len(self._codes))


class _Table:
    """One shard's table, mapped."""

    def __init__(self, columns: Columns, fields: _Codes, languages: _Codes) -> None:
        self.columns = columns
        self.fields = np.array(
            [PICTURES, SOUND, *map(fields.code, columns.note["fields"])], dtype=np.int64
        )
        self.languages = np.array(
            [*map(languages.code, columns.note["languages"]), -1], dtype=np.int64
        )

    def gather(self, rows: Integers, places: Integers) -> Lengths:
        """Return the lengths of records by their rows in the shard int64 [n]; `places` [n] stand
        for them in the result.
        """
        chosen, owners = self._runs("starts", rows)
        entries = self.columns.take("entries", chosen).astype(np.int64)
        named, namers = self._runs("reference_starts", rows)
        languages = self.languages[np.minimum(entries[:, 1], len(self.languages) - 1)]
        return Lengths(
            places[owners],
            self.fields[entries[:, 0]],
            languages,
            entries[:, 2],
            entries[:, 3],
            places[namers],
            self.columns.take("roles", named).astype(np.int64),
            self.columns.take("references", named),
        )

    def _runs(self, name: str, rows: Integers) -> tuple[Integers, Integers]:
        """Return the elements of the rows' runs, and to which of the rows each belongs."""
        first, after = self.columns.take(name, rows), self.columns.take(name, rows + 1)
        counts = after - first
        owners = np.repeat(np.arange(len(rows), dtype=np.int64), counts)
        return np.arange(counts.sum(), dtype=np.int64) - np.repeat(
            np.cumsum(counts) - counts, counts
        ) + first[owners], owners


def _texts(body: JsonView) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (field, language, cleaned texts) in the record's order, languages without a value
    left out.
    """
    for name, languages in (body.get("fields") or {}).items():
        for language, value in languages.items():
            if value:
                found = dict.fromkeys(
                    filter(None, map(clean, [value] if isinstance(value, str) else value))
                )
                yield name, language, list(found)


def _named(value: object, *, latest: bool) -> list[str]:
    entries = value if isinstance(value, list) else [value]
    names = [
        name for one in entries if not isinstance(one, dict) and (name := given(one)) is not None
    ]
    return names[-MOST_REFERENCES:] if latest else names[:MOST_REFERENCES]
