"""What the views of a run find in its data, looked at before the first step: a wrong name must
not train on nothing.

Answers come from the length tables (`data.lengths`): their manifest says which fields and media the
records of each shard have, so that what no record has is known without a look at any table. Whether
one record has both sides of a pattern is looked up in the tables of shards that have both, of at
most SHARDS of them, evenly spread: what is missing there is said with how much was looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from sailplan.config.schema import Config, DatasetConfig, ViewConfig
from sailplan.data.lengths import PICTURES, PICTURES_OF, SOUND, SOUND_OF, LengthIndex, Lengths
from sailplan.data.plan import SPLIT
from sailplan.data.reader import RecordReader
from sailplan.data.shares import stage_patterns
from sailplan.data.text import clean
from sailplan.data.values import BadSample
from sailplan.errors import BadDataError, ConfigurationError

logger = logging.getLogger("sailplan.data")
FIRST = 256  # records whose entries are looked at
SHARDS = 256  # whose entries are looked at, at most
READ = 64  # records that are read, at most
MEDIA = {"vision": ("picture", PICTURES, PICTURES_OF), "audio": ("sound", SOUND, SOUND_OF)}


def check_views(config: Config, readers: Mapping[str, RecordReader]) -> None:
    """Raise for views and patterns of the run's stages that no record fits: training would be at
    loss 0.

    Raises ConfigurationError for a text field or a medium that no record has, naming what there is,
    and for a key of labels or of a teacher's scores that none of READ records has;
    BadDataError for a pattern of which no record has both sides, or nothing to tell its targets
    from.
    """
    used: dict[tuple[str, str], None] = {}
    for stage_name in config.order:
        stage = config.stages[stage_name]
        for name in stage.data:
            if name in readers:
                used |= dict.fromkeys(
                    (name, pattern) for pattern in stage_patterns(stage, name, readers[name].config)
                )
    sides = {
        (name, side): None
        for name, pattern in used
        for side in _sides(readers[name].config, pattern)
    }
    for name in dict.fromkeys(name for name, _ in used):
        _check_readable(readers[name])
        _check_keys(readers[name])
    for name, side in sides:
        if len(readers[name]):
            _check_view(readers[name], side)
    for name, pattern in used:
        if readers[name].config.kind == "items" and readers[name].count(SPLIT):
            _check_pattern(readers[name], pattern)


def _sides(dataset: DatasetConfig, pattern: str) -> tuple[str, str]:
    return dataset.patterns[pattern].query, dataset.patterns[pattern].target


def _check_readable(reader: RecordReader) -> None:
    """Raise BadDataError where none of the first records can be used: what is wrong is the data
    set, not a sample.
    """
    first = ""
    for position in reader.select(
        SPLIT, np.arange(min(READ, reader.count(SPLIT)), dtype=np.int64)
    ).tolist():
        try:
            reader.read(position, media=frozenset())
            return
        except BadSample as problem:
            first = first or str(problem)
    if first:
        hint = (
            f"; set data.sets.{reader.name}.catalogue where records name items by id"
            if reader.config.kind == "pairs" and reader.catalogue is None
            else ""
        )
        raise BadDataError(
            f"data.sets.{reader.name}: none of the first records can be used, {first}{hint}"
        )


def _check_keys(reader: RecordReader) -> None:
    """Raise ConfigurationError for a `label` or `teacher_scores` that none of READ records,
    spread evenly over the data set, has.
    """
    key, settings, count = f"data.sets.{reader.name}", reader.config, reader.count(SPLIT)
    wanted = {"label": settings.label, "teacher_scores": settings.teacher_scores}
    missing = {setting: name for setting, name in wanted.items() if name is not None}
    numbers = np.unique(np.linspace(0, max(count - 1, 0), min(READ, count), dtype=np.int64))
    for position in reader.select(SPLIT, numbers).tolist() if missing else ():
        try:
            record = reader.read(position, media=frozenset())
        except BadSample:  # named where it is drawn
            continue
        missing = {
            setting: name for setting, name in missing.items() if not getattr(record, setting)
        }
        if not missing:
            return
    for setting, name in missing.items():
        if count:
            raise ConfigurationError(
                f"{key}.{setting}={name}: none of {len(numbers)} records, spread over the data "
                "set, has one; expected a key of their JSON; correct the name, or leave it out"
            )


def _tables(reader: RecordReader) -> list[LengthIndex]:
    """The tables of the records that the reader's views show: its own, and its catalogue's."""
    found = [reader.lengths, None if reader.catalogue is None else reader.catalogue.lengths]
    return [table for table in found if table is not None]


def _check_view(reader: RecordReader, name: str) -> None:
    view, tables = reader.config.views[name], _tables(reader)
    key = f"data.sets.{reader.name}.views.{name}"
    if not tables:
        return
    counts = [table.counts() for table in tables]
    for field in view.fields if "text" in view.modalities else ():
        if not any(field in names or f"{view.of}:{field}" in names for names in counts):
            found = dict.fromkeys(
                found.rpartition(":")[2] for names in counts for found in names if "*" not in found
            )
            listed = ", ".join(list(found)[:20]) or "none"
            raise ConfigurationError(
                f"{key}.fields: no record has a field '{field}'; the records have: {listed}"
            )
    media = [
        prefix + MEDIA[modality][2]
        for modality in view.modalities
        if modality in MEDIA
        for prefix in ("", f"{view.of}:")
    ]
    if "text" not in view.modalities and not any(
        name in names for names in counts for name in media
    ):
        words = " or ".join(MEDIA[modality][0] for modality in view.modalities)
        raise ConfigurationError(
            f"{key}.modalities: no record has a {words}; `sailplan data validate` counts what the "
            "records have"
        )


def _check_pattern(reader: RecordReader, name: str) -> None:
    dataset, table, count = reader.config, reader.lengths, reader.count(SPLIT)
    query, target = (dataset.views[side] for side in _sides(dataset, name))
    if table is None:
        return
    looked, complete = _looked_at(table, query, target)
    both = (
        _shown(table, lengths, rows, query) & _shown(table, lengths, rows, target)
        for rows, lengths in _train_parts(reader, table, looked)
    )
    if not any(bool(found.any()) for found in both):
        of = (
            f"{count} records"
            if complete
            else f"the records in {len(looked)} of {len(reader.index.shards)} shards, evenly spread,"
        )
        problem = (
            f"data.sets.{reader.name}.patterns.{name}: not one of {of} has both sides, a "
            f"{_words(query)} and a {_words(target)}; "
            "members of a record must lie side by side in the tar, under one name; `sailplan data "
            "validate` counts what is there"
        )
        if complete:
            raise BadDataError(problem)
        logger.warning("%s", problem)
    if count == 1 or (
        list(target.modalities) == ["text"] and count <= READ and _one_text(reader, target)
    ):
        what = "the only record" if count == 1 else f"all {count} records have one text as target"
        raise BadDataError(
            f"data.sets.{reader.name}.patterns.{name}: {what}; a positive without any negative "
            "teaches nothing; add other records"
        )


def _looked_at(table: LengthIndex, query: ViewConfig, target: ViewConfig) -> tuple[list[int], bool]:
    """Return the shards that may have a record with both sides, the first one and others evenly
    spread, and whether these are all.
    """
    sides = [set(table.shards_with(_tags(view)).tolist()) for view in (query, target)]
    shards = sorted(sides[0] & sides[1])
    return shards[:: max(1, -(-len(shards) // SHARDS))], len(shards) <= SHARDS


def _tags(view: ViewConfig) -> list[str]:
    """The names under which the length tables count what a view of an items data set shows."""
    return [MEDIA[modality][2] for modality in view.modalities if modality in MEDIA] + (
        view.fields if "text" in view.modalities else []
    )


def _train_parts(
    reader: RecordReader, table: LengthIndex, shards: list[int]
) -> Iterator[tuple[int, Lengths]]:
    """Yield number of records and lengths of FIRST records to train on after the other."""
    for shard in shards:
        first, count = reader.index.numbers_in(SPLIT, shard)
        for start in range(first, first + count, FIRST):
            numbers = np.arange(start, min(start + FIRST, first + count), dtype=np.int64)
            yield len(numbers), table.lengths(reader.select(SPLIT, numbers))


def _shown(table: LengthIndex, lengths: Lengths, rows: int, view: ViewConfig) -> NDArray[np.bool_]:
    """Which of the records have any of the view's modalities, bool [rows]."""
    codes = [MEDIA[modality][1] for modality in view.modalities if modality in MEDIA]
    codes += [table.field(field) for field in view.fields] if "text" in view.modalities else []
    result = np.zeros(rows, dtype=np.bool_)
    result[lengths.record[np.isin(lengths.field, codes) & (lengths.texts > 0)]] = True
    return result


def _words(view: ViewConfig) -> str:
    words: dict[str, Callable[[], str]] = {"text": lambda: f"text ({', '.join(view.fields)})"}
    return " or ".join(
        words[modality]() if modality in words else MEDIA[modality][0]
        for modality in view.modalities
    )


def _one_text(reader: RecordReader, view: ViewConfig) -> bool:
    """Whether all records to train on show one and the same text, in every language."""
    texts: set[str] = set()
    for position in reader.select(SPLIT, np.arange(reader.count(SPLIT), dtype=np.int64)).tolist():
        try:
            item = reader.read(position, media=frozenset()).item
        except BadSample:  # named where it is drawn
            continue
        for field in view.fields:
            for value in ((item.fields if item is not None else {}).get(field) or {}).values():
                texts |= {
                    clean(text).casefold()
                    for text in ([value] if isinstance(value, str) else value)
                } - {""}
        if len(texts) > 1:
            return False
    return len(texts) == 1
