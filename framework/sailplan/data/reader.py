"""Read record number i of a data set: one positioned read per member, no scan, nothing decoded.

Turns the JSON formats of docs/data.md into Record and Item per kind (items, pairs, sequences),
looks up catalogue items by id, and draws history and target of a sequence that lists only `items`.
A record that cannot be used raises BadSample; what happens then (a spare, a report, a stop) is the
caller's decision.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sailplan.config.fields import JsonObject, JsonView
from sailplan.config.schema import DatasetConfig
from sailplan.data.cache import ByteCache
from sailplan.data.index import ShardIndex
from sailplan.data.inline import Content, inline_item, media_counts
from sailplan.data.kinds import Chosen, Place, choose
from sailplan.data.lengths import ROLES, LengthIndex
from sailplan.data.names import given, is_given, part_of
from sailplan.data.parse import parse_json
from sailplan.data.record import Item, Record
from sailplan.data.shard_files import ShardFile
from sailplan.data.stream.shard import RemoteShard
from sailplan.data.values import BadSample as BadSample
from sailplan.data.values import (
    fields_of,
    ids,
    label,
    listed,
    probability,
    score,
    teacher_scores,
)
from sailplan.data.windows import events, window
from sailplan.errors import BadDataError
from sailplan.runtime.seeds import derive

logger = logging.getLogger("sailplan.data")
SIDES = {"query": ("query", "text"), "target": ("item", "target")}  # keys of a pair's JSON
ALL_PARTS = frozenset({"item", "query", "target", "history", "negatives"})
USED_OF_PAIRS = frozenset({"id", "split", "negatives", "text", "query", "item", "score"})
USED_OF_SEQUENCES = frozenset(
    {"id", "split", "negatives", "target_probability", "negative_probability"}
)
ALL_MEDIA = frozenset({"vision", "audio"})
CACHE_BYTES = 64 << 20
FILES_OPEN = 128
READ_TOGETHER = 64  # records of a pass over a shard that lies elsewhere


class _Opened(NamedTuple):
    """A record whose JSON is read; `parts` are the members of those that it holds itself."""

    id: str
    body: JsonView
    parts: Mapping[str, list[Place]]
    content: Content


class RecordReader:
    """Random access to a data set's records by position (0 .. len - 1, the order of the shards).

    `name`: key in data.sets; `config`: its DatasetConfig; `catalogue`: reader of the items that ids
    refer to, or None.
    """

    def __init__(
        self,
        name: str,
        config: DatasetConfig,
        index: ShardIndex,
        catalogue: RecordReader | None = None,
    ) -> None:
        self.name, self.config, self.index, self.catalogue = name, config, index, catalogue
        self._files: OrderedDict[int, ShardFile] = OrderedDict()
        self._items: ByteCache[Item] = ByteCache(CACHE_BYTES)
        self._scored: bool | None = None
        self.lengths: LengthIndex | None = None  # None: rows count as equally long
        # Whether shards lie elsewhere: one shard tells, as a set is one pattern of one place
        self.streamed = any(isinstance(shard, RemoteShard) for shard in index.shards[:1])
        self._lock = (
            threading.RLock()
        )  # the prefetch thread and an evaluation may read at the same time

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @property
    def identity(self) -> str:
        """Hash of the ids and splits of all records in their order."""
        return self.index.identity

    def ids(self, positions: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Record ids at the positions."""
        return self.index.ids(positions)

    def positions(self, split: str | None = None) -> NDArray[np.int64]:
        """Sorted int64 positions of a split's records; None: of all."""
        return self.index.positions(split)

    def count(self, split: str) -> int:
        """Number of records of a split."""
        return self.index.count(split)

    def select(self, split: str, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of the split's records number 0 .. count - 1; int64 [n] -> int64 [n]."""
        return self.index.select(split, numbers)

    def split(self, position: int) -> str:
        """Split of the record at a position."""
        return self.index.entry(position).split

    def find(self, record_id: str) -> int | None:
        """Position of the record with this id, or None."""
        return self.index.find(record_id)

    def read(
        self,
        position: int,
        *,
        seed: int | None = None,
        media: frozenset[str] = ALL_MEDIA,
        needs: Collection[str] | None = None,
    ) -> Record:
        """The record at a position.

        seed: draws a sequence's target and history among its `items`; None: a fixed draw that
        depends on the record's id alone (evaluation). media: which of "vision", "audio" to read.
        needs: which of item, query, target, history, negatives to look up (default all). Raises
        BadSample for broken bytes, JSON, unknown ids or a stale index.
        """
        if self.config.kind == "items":
            item = self.item(position, media)
            return Record(item.id, self.split(position), item=item, label=self._label(item))
        body, _ = self._read_body(position)
        wanted = ALL_PARTS if needs is None else needs
        entry = self.index.entry(position)
        record_id, split = entry.id, entry.split
        opened = _Opened(record_id, body, self._parts(position), self._content(position, media))
        negatives, teacher = self._negatives(opened, seed) if "negatives" in wanted else ((), ())
        key = self.config.label
        own_label = None if key is None else label(record_id, body.get(key), key)
        if self.config.kind == "pairs":
            return Record(
                record_id,
                split,
                query=self._side(opened, "query") if "query" in wanted else None,
                target=self._side(opened, "target") if "target" in wanted else None,
                negatives=negatives,
                score=score(record_id, body),
                label=own_label,
                teacher_scores=teacher,
                extra={
                    key: value
                    for key, value in body.items()
                    if key not in USED_OF_PAIRS and (key != "target" or self.catalogue is not None)
                },
            )
        history, target = self.draw(record_id, body, seed)
        return Record(
            record_id,
            split,
            negatives=negatives,
            label=own_label,
            target_probability=probability(record_id, body, "target_probability"),
            negative_probability=probability(record_id, body, "negative_probability"),
            history=tuple(self._catalogue_item(record_id, name, media) for name in history)
            if "history" in wanted
            else (),
            target=self._catalogue_item(record_id, target, media) if "target" in wanted else None,
            extra={
                **{key: value for key, value in body.items() if key not in USED_OF_SEQUENCES},
                "history": history,
                "target": target,
            },
        )

    def draw(
        self, record_id: str, body: Mapping[str, object], seed: int | None
    ) -> tuple[list[str], str]:
        """History ids (at most history_length) and the target id of a sequence.

        `history` + `target` in the JSON are used as they are (a longer history keeps its last, most
        recent, ids). Of `items` one is the target and a random part of the others the history, in
        their listed order; of `items` with `times` the history is what came before the target
        (`data.windows`).
        """
        length = self.config.history_length
        target = given(body.get("target"))
        if target is not None:
            return ids(record_id, body, "history")[-length:], target
        found = events(record_id, body)
        if is_given(body.get("times")):
            return window(record_id, found, length, seed)
        items = list(dict.fromkeys(found))
        if len(items) < 2:
            raise BadSample(
                record_id,
                "a sequence needs `history` and `target`, or at least 2 different `items`; found "
                f"{len(items)}",
            )
        source = random.Random(derive("held out target", record_id) if seed is None else seed)
        target = items.pop(int(source.random() * len(items)))
        if len(items) > length:
            ranks = sorted(range(len(items)), key=[source.random() for _ in items].__getitem__)
            items = [items[place] for place in sorted(ranks[:length])]
        return items, target

    def sequence_ids(self, position: int, seed: int | None = None) -> tuple[list[str], str]:
        """History ids and target id of a sequence without reading the items."""
        record_id = self.index.entry(position).id
        return self.draw(record_id, self._read_body(position)[0], seed)

    def body(self, position: int) -> JsonObject:
        """The record's JSON as it is in the shard; {} for a record without JSON, and for a
        broken one, which a warning names.
        """
        try:
            return self._read_body(position)[0]
        except BadSample as problem:
            logger.warning("%s: left out: %s", self.name, problem)
            return {}

    def item_ids(self, position: int) -> list[str]:
        """All item ids that a sequence names, in its order: its `items`, else its history, then
        its target. [] for a broken record,
        which a warning names."""
        record_id, body = self.index.entry(position).id, self.body(position)
        try:
            target = given(body.get("target"))
            return events(record_id, body) or ids(record_id, body, "history") + (
                [] if target is None else [target]
            )
        except BadSample as problem:
            logger.warning("%s: left out: %s", self.name, problem)
            return []

    def score(self, position: int) -> float | None:
        """The score of a graded pair; None where the record has none that can be used."""
        try:
            return score(self.index.entry(position).id, self.body(position))
        except BadSample as problem:
            logger.warning("%s: left out: %s", self.name, problem)
            return None

    @property
    def scored(self) -> bool:
        """Whether the data set's pairs carry graded scores (decided by its first record with
        JSON, so equal on all ranks).
        """
        if self._scored is None:
            bodies = (
                (self.body(position) for position in range(len(self)))
                if self.config.kind == "pairs"
                else ()
            )
            self._scored = "score" in next((body for body in bodies if body), {})
        return self._scored

    def item(self, position: int, media: frozenset[str] = ALL_MEDIA) -> Item:
        """An item of an items data set, from a cache of at most 64 MB of bytes."""
        known = self._items.get((position, media))
        if known is not None:
            return known
        body, chosen = self._read_body(position)
        item = self._item(self.index.entry(position).id, body, chosen, position, media)
        self._items.put((position, media), item, self.index.size(position) * 2)
        return item

    def prefetch(self, groups: Iterable[NDArray[np.int64]]) -> None:
        """Have records fetched before they are read, where the shards lie elsewhere; returns at
        once.

        groups: int64 [n] positions each; a group's records that lie close together are one request.
        """
        if not self.streamed:
            return
        for positions in groups:
            wanted: dict[int, list[tuple[int, int]]] = {}
            for position in positions.tolist():
                entry = self.index.entry(position)
                wanted.setdefault(entry.shard, []).extend(
                    (offset, offset + size) for _, offset, size in entry.members
                )
            for shard, ranges in wanted.items():
                with self._lock:
                    self._file(shard).prefetch(ranges)

    def outlines(self, shard: int) -> Iterator[tuple[JsonObject, int, int]]:
        """Yield of each record of a shard its texts as `fields`, with the ids under ROLES, and
        how many pictures and sounds it
        has; nothing of a record that cannot be used."""
        first, after = int(self.index.starts[shard]), int(self.index.starts[shard + 1])
        for position in range(first, after):
            if self.streamed and (position - first) % READ_TOGETHER == 0:
                stop = min(position + 2 * READ_TOGETHER, after)
                self.prefetch([np.arange(position, stop, dtype=np.int64)])
            try:
                body, chosen = self._read_body(position)
                yield self._outline(position, body, chosen)
            except BadSample:
                yield {}, 0, 0

    def _outline(
        self, position: int, body: JsonObject, chosen: Chosen
    ) -> tuple[JsonObject, int, int]:
        if self.config.kind == "items":
            item = self._item("", body, chosen, position, frozenset())
            return {"fields": item.fields}, *media_counts(chosen)
        named = (
            {role: body[role] for role in ROLES if role in body}
            if self.catalogue is not None
            else {}
        )
        if self.config.kind == "sequences":
            return named, 0, 0
        parts, fields = self._parts(position), JsonObject()
        sides = {
            part: value if self.catalogue is None or isinstance(value, dict) else None
            for part, value in ((part, _value(body, part)) for part in SIDES)
        }
        for number, value in enumerate(
            body["negatives"] if isinstance(body.get("negatives"), list) else []
        ):
            if self.catalogue is None or isinstance(value, dict):
                sides[f"negatives/{number}"] = value
        for part, value in sides.items():
            own = choose(parts.get(part, []))
            if value is not None or own.read:
                item = inline_item("", value, own, self._content(position, frozenset()))
                prefix = "" if part == "query" else f"{part}:"
                fields |= {f"{prefix}{name}": languages for name, languages in item.fields.items()}
                if prefix:
                    named.setdefault("media", {})[part] = media_counts(own)
        return {"fields": fields, **named}, *media_counts(choose(parts.get("query", [])))

    # ---------------------------------------------------------------- parts
    def _read_body(self, position: int) -> tuple[JsonObject, Chosen]:
        shard, record_id, _, members = self.index.entry(position)
        body = JsonObject()
        if self.streamed:
            with self._lock:
                self._file(shard).want([(at, at + size) for _, at, size in members], wait=True)
        chosen = choose(members)
        if chosen.json is not None:
            try:
                body = parse_json(self.member(shard, chosen.json))
            except ValueError as error:
                reason = (
                    f"broken JSON in {self.index.shards[shard]} at byte {chosen.json[1]}: {error}"
                )
                raise BadSample(record_id, " ".join(reason.split())[:300]) from error
        found = body.get("id")
        if found != record_id and is_given(found) and given(found) != record_id:
            raise BadSample(
                record_id,
                f"{self.index.shards[shard]} changed while in use: found the record {given(found)} in its "
                "place",
            )
        return body, chosen

    def _item(
        self,
        record_id: str,
        body: dict[str, object],
        chosen: Chosen,
        position: int,
        media: frozenset[str],
    ) -> Item:
        """The item of a record; of its media those that are asked for."""
        return self._content(position, media).item(
            record_id, fields_of(record_id, body.get("fields")), "title", chosen, body
        )

    def _side(self, opened: _Opened, part: str) -> Item:
        """Query or target of a pair: an item of the catalogue that the record names, or what the
        record holds itself.
        """
        record_id, body, parts, content = opened
        own, value = parts.get(part, ()), _value(body, part)
        if self.catalogue is not None and not isinstance(value, dict) and not own:
            if part == "query" and value is None:
                raise BadSample(record_id, "a pair needs `text` or `query`; found neither")
            return self._catalogue_item(record_id, value, content.media)
        if value is None and not own:
            raise BadSample(
                record_id,
                f"a pair without a catalogue needs {' or '.join(SIDES[part])}, or members "
                f"KEY.{part}.*; found none",
            )
        return inline_item(f"{record_id}#{part}", value, choose(own), content)

    def _negatives(
        self, opened: _Opened, seed: int | None
    ) -> tuple[tuple[Item, ...], tuple[float, ...]]:
        """As many of the record's own negatives as the data set takes, all of a short list, a
        random part of a long one; and a teacher's scores of the target and of these.
        """
        count, key = self.config.negatives, self.config.teacher_scores
        if not count:
            return (), ()
        record_id, body, members_of, content = opened
        values = dict(enumerate(listed(record_id, body, "negatives")))
        parts = {
            int(part.partition("/")[2]): members
            for part, members in members_of.items()
            if part.startswith("negatives/")
        }
        numbers = sorted(values.keys() | parts.keys())
        total = len(numbers)
        if len(numbers) > count:
            numbers = random.Random(
                derive("negatives", record_id if seed is None else seed)
            ).sample(numbers, count)
        found = []
        for number in numbers:
            value, own = values.get(number), parts.get(number, [])
            if self.catalogue is not None and not isinstance(value, dict) and not own:
                found.append(self._catalogue_item(record_id, value, content.media))
            else:
                name = f"{record_id}#negatives/{number}"
                found.append(inline_item(name, value, choose(own), content, 1 + number))
        teacher = () if key is None else teacher_scores(record_id, body, key, total, numbers)
        return tuple(found), teacher

    def _label(self, item: Item) -> str | None:
        """The class of a record of items."""
        key = self.config.label
        if key is None:
            return None
        return label(item.id, item.extra.get(key, item.fields.get(key)), key)

    def _parts(self, position: int) -> dict[str, list[Place]]:
        """Members of a pair's parts that it holds itself: part -> (extension within the part,
        offset, size).
        """
        parts: dict[str, list[Place]] = {}
        for extension, offset, size in self.index.entry(position).members:
            part, own = part_of(extension)
            if part:
                parts.setdefault(part, []).append((own, offset, size))
        return parts

    def _content(self, position: int, media: frozenset[str]) -> Content:
        shard = self.index.entry(position).shard
        return Content(partial(self.member, shard), media, position)

    def find_item(self, value: object) -> int | None:
        """Position in the catalogue of the item with an id as a record gives it; None where
        there is none, or no catalogue.
        """
        name = given(value)
        if self.catalogue is None or name is None or isinstance(value, dict | list):
            return None
        position = self.catalogue.find(name)
        if (
            position is None and isinstance(value, float) and value.is_integer()
        ):  # a table's whole numbers beside an empty cell
            position = self.catalogue.find(str(int(value)))
        return position

    def _catalogue_item(self, record_id: str, value: object, media: frozenset[str]) -> Item:
        assert self.catalogue is not None, (
            "sequences have a catalogue, and pairs without one hold their items"
        )
        if not is_given(value):
            raise BadSample(
                record_id,
                f"names no item of the catalogue '{self.catalogue.name}': its id is {value!r}",
            )
        position = self.find_item(value)
        if position is None:
            raise BadSample(
                record_id, f"item {given(value)} is not in the catalogue '{self.catalogue.name}'"
            )
        return self.catalogue.item(position, media)

    def member(self, shard: int, place: Place) -> bytes:
        """Return the content of a member (extension, offset, size) of a shard.

        Raises BadSample where the disk does not give it, BadDataError where the shard was written
        to since it was opened.
        """
        _, offset, size = place
        name = self.index.shards[shard].name
        with self._lock:
            file = self._file(shard)
            try:
                content, changed = file.read_at(offset, size), file.changed()
            except OSError as error:
                raise BadSample(
                    name, f"byte {offset} cannot be read ({error.strerror or error})"
                ) from error
        if changed:
            raise BadDataError(
                f"{self.index.shards[shard]}: was written to while in use, expected shards that stay "
                "as they are; run `sailplan data index`, then resume=auto"
            )
        if len(content) != size:
            raise BadSample(name, f"read {len(content)} of {size} bytes at byte {offset}")
        return content

    def _file(self, shard: int) -> ShardFile:
        if shard not in self._files:
            self._files[shard] = self._opened(shard)
            if len(self._files) > FILES_OPEN:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return self._files[shard]

    def _opened(self, shard: int) -> ShardFile:
        try:
            return self.index.open_shard(shard)
        except OSError as error:
            raise BadDataError(
                f"{self.index.shards[shard]}: cannot be read ({error.strerror or error}): the "
                "shard went away while in use"
            ) from error


def _value(body: Mapping[str, object], part: str) -> object:
    """What a pair's JSON has of a part, None where nothing; `text` is never an item's id."""
    first, second = SIDES[part]
    value = body.get(first)
    if is_given(value):
        return value
    value = body.get(second)
    if not is_given(value):
        return None
    return {"text": value} if second == "text" else value
