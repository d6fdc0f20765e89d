"""What one shard holds, record by record: problems, what is passed over, and how each view's
rows look.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sailplan.config.fields import JsonObject
from sailplan.config.schema import ViewConfig
from sailplan.data.kinds import Place, choose, ending_of
from sailplan.data.names import part_of
from sailplan.data.parse import REPLACEMENT, decode_text, has_escaped_halves
from sailplan.data.processor import Processor
from sailplan.data.reader import RecordReader
from sailplan.data.values import BadSample

VERSION = 1
Counted = dict[str, tuple[int, str]]  # what -> how often, and the first


@dataclass
class Findings:
    """What was found in some records; JSON values only."""

    records: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)  # (record id, reason)
    passed: Counted = field(
        default_factory=dict
    )  # members and bytes that no record shows, texts that needed repair
    counted: Counted = field(default_factory=dict)  # what may be as it is
    splits: dict[str, int] = field(default_factory=dict)
    endings: dict[str, dict[str, int]] = field(
        default_factory=dict
    )  # picture, sound, video -> ending -> members read
    views: dict[str, JsonObject] = field(
        default_factory=dict
    )  # view -> numbers of its rows, see `_show`
    patterns: dict[str, int] = field(default_factory=dict)  # pattern -> records with both sides

    def add(self, other: Findings) -> None:
        """Add what was found in other records."""
        for name in ("passed", "counted"):
            mine = getattr(self, name)
            for what, (count, first) in getattr(other, name).items():
                known, earlier = mine.get(what, (0, first))
                mine[what] = known + count, earlier
        self.records += other.records
        self.problems += [(record, reason) for record, reason in other.problems]
        _add(self.splits, other.splits)
        _add(self.patterns, other.patterns)
        for kind, endings in other.endings.items():
            _add(self.endings.setdefault(kind, {}), endings)
        for view, numbers in other.views.items():
            mine = self.views.setdefault(view, {})
            longest = max(mine.get("longest", 0), numbers.get("longest", 0))
            _add(mine, {key: value for key, value in numbers.items() if isinstance(value, int)})
            mine["longest"], mine["sample"] = (
                longest,
                mine.get("sample") or numbers.get("sample", ""),
            )

    def count(self, what: str, first: str, *, where: str = "passed", times: int = 1) -> None:
        """Count something, and keep where it was met first."""
        of = getattr(self, where)
        known, earlier = of.get(what, (0, first))
        of[what] = known + times, earlier


def _add(to: JsonObject, values: dict[str, int]) -> None:
    for key, value in values.items():
        to[key] = to.get(key, 0) + value


def inspect(reader: RecordReader, shard: int, processor: Processor) -> Findings:
    """Read every record of a shard and decode it in every view of its data set."""
    found = Findings()
    for what, (count, first) in reader.index.passed_over(shard).items():
        where = "counted" if what.startswith("sidecars") else "passed"
        found.count(what, f"{reader.index.shards[shard].name}: {first}", where=where, times=count)
    texts: dict[str, list[str]] = {name: [] for name in reader.config.views}
    for position in range(int(reader.index.starts[shard]), int(reader.index.starts[shard + 1])):
        found.records += 1
        _members(reader, position, found)
        record_id = reader.ids([position])[0]
        try:
            _record(reader, position, processor, found, texts)
        except BadSample as problem:
            found.problems.append(
                (record_id, problem.reason if problem.record_id == record_id else str(problem))
            )
    for name, view in reader.config.views.items():
        lengths = (
            [count + processor.overhead(view) for count in processor.tokenizer.counts(texts[name])]
            if texts[name]
            else []
        )
        numbers = found.views.setdefault(name, _empty(view))
        numbers["tokens"], numbers["longest"] = sum(lengths), max(lengths, default=0)
        numbers["cut"] = sum(length > processor.max_tokens for length in lengths)
    return found


def _empty(view: ViewConfig) -> JsonObject:
    return {
        "rows": 0,
        "valid": 0,
        **dict.fromkeys(view.modalities, 0),
        "tokens": 0,
        "longest": 0,
        "cut": 0,
        "sample": "",
    }


def _record(
    reader: RecordReader,
    position: int,
    processor: Processor,
    found: Findings,
    texts: dict[str, list[str]],
) -> None:
    record = reader.read(position)
    _add(found.splits, {record.split: 1})
    if reader.scored and record.score is None:
        raise BadSample(record.id, "has no `score`, but the data set's first pair has one")
    for key, lacks in (
        (reader.config.label, record.label is None),
        (reader.config.teacher_scores, not record.teacher_scores),
    ):
        if key is not None and lacks:
            found.count(f"records without `{key}`", record.id, where="counted")
    shown: dict[str, bool] = {}
    for name, view in reader.config.views.items():
        numbers, items = (
            found.views.setdefault(name, _empty(view)),
            record.history if view.of == "history" else [getattr(record, view.of)],
        )
        rows = [processor.row(item, view, reader.config) for item in items]
        shown[name] = any([row.valid for row in rows])
        has = {"rows": len(rows), "valid": sum(row.valid for row in rows)}
        present = {
            "text": [bool(row.text) for row in rows],
            "vision": [bool(row.images) for row in rows],
            "audio": [row.audio is not None for row in rows],
        }
        _add(numbers, has | {modality: sum(present[modality]) for modality in view.modalities})
        texts[name] += [row.text for row in rows if row.text]
        numbers["sample"] = numbers["sample"] or next(
            (row.text[:60] for row in rows if row.text), ""
        )
    for item in record.negatives:  # their media, too, are shown in training
        for view in (view for view in reader.config.views.values() if view.of == "target"):
            processor.row(item, view, reader.config)
    for name, pattern in reader.config.patterns.items():
        _add(found.patterns, {name: int(shown[pattern.query] and shown[pattern.target])})


def _members(reader: RecordReader, position: int, found: Findings) -> None:
    """Count the members that nobody reads, the endings of those that are, and texts that needed
    repair.
    """
    shard, table, row = reader.index.locate(position)
    name, parts = table.ids[row], dict[str, list[Place]]()
    for extension, offset, size in table.record(row)[2]:
        part, own = part_of(extension) if reader.config.kind == "pairs" else ("", extension)
        parts.setdefault(part, []).append((own, offset, size))
    chosen = [choose(places) for places in parts.values()]
    for extension in sorted({extension for one in chosen for extension, *_ in one.unread}):
        found.count(f"records with a member .{extension} that nobody reads", name)
    for one in chosen:
        media: dict[str, list[Place | None]] = {
            "picture": [*one.pictures],
            "sound": [one.sound],
            "video": [one.video],
        }
        for kind, places in media.items():
            for read in places:
                if read is not None:
                    _add(found.endings.setdefault(kind, {}), {ending_of(read[0]): 1})
    for place in [place for one in chosen for place in (one.text, one.json) if place is not None]:
        content = reader.member(shard, place)
        text = decode_text(content)
        is_json = place[0] == "json"
        halves = (
            is_json and has_escaped_halves(content) and REPLACEMENT in str(reader.body(position))
        )
        if text.repaired or halves:
            found.count(
                "records with a text that needed repair (bytes of no encoding, half characters)",
                name,
            )
        if is_json and (b"NaN" in content or b"Infinity" in content):
            found.count("records with a JSON value that is not finite", name, where="counted")
