"""Import a source: shards, `conf/data/NAME.yaml` and a tokenizer.

One function a form of source; all end in `_conclude`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from sailplan.config.fields import JsonObject
from sailplan.data.shards import resolve
from sailplan.data.tar import HeldOut
from sailplan.errors import ConfigurationError
from sailplan.ingest import declare, shuffle
from sailplan.ingest.columns import ROLES, Columns, Kind, find_columns, first_rows, number
from sailplan.ingest.histories import TABLES, PickInteraction, WriteHistories
from sailplan.ingest.job import TOKENIZER, ImportJob, ImportOptions, Result
from sailplan.ingest.known_ids import gather_ids
from sailplan.ingest.media import Media, find_root
from sailplan.ingest.records import MEDIA_ROLES, RecordMaker
from sailplan.ingest.retrieval import JUDGEMENT, QUERY, PickForJoin, WritePairs
from sailplan.ingest.rows import Row, Source, split_of_file
from sailplan.ingest.rows_to_shards import WriteShard
from sailplan.ingest.shuffle import Spill, buckets_of, tagged
from sailplan.ingest.sources import Found, Several, find_source
from sailplan.ingest.tars import look_at_tars
from sailplan.ingest.tokenizer import train_tokenizer, training_texts
from sailplan.ingest.work import Outcome

ITEMS = "items"  # the folder of the items of interactions and of retrieval sets, below the import's


def import_data(
    options: ImportOptions, progress: Callable[[int], None] = lambda rows: None
) -> Result:
    """Import what lies at `options.source`; write shards, YAML and tokenizer; return counts.

    The same call goes on after a kill.

    progress: called with the number of rows of each part that is done. Raises ConfigurationError
    for a source, columns or a name that cannot be, BadDataError for more dropped rows than the
    limit, StopRequested on a signal.
    """
    declare.check_name(options.name)
    declare.target_file(options.name)
    found = find_source(options.source, options.media_folder)
    if found.form == "tars":
        return _import_tars(options)
    if found.form == "retrieval":
        return _import_retrieval(options, found, progress)
    assert found.source is not None
    rows = first_rows(found.source.parts(1000))
    columns = find_columns(rows, options.columns, cast("Kind | None", options.kind), options.source)
    if columns.kind == "interactions":
        return _import_interactions(options, found, columns, rows, progress)
    job = ImportJob(options, found.source.files(), progress)
    result = job.finished()
    if result is None:
        outcome = _write_rows(
            job,
            options.name,
            options.folder,
            found.source,
            columns,
            _root(found, columns, rows, options),
        )
        job.add_set(options.name, options.folder, outcome)
        job.check_dropped()
    body = _body(columns, rows)
    return _conclude(job, result, {options.name: (options.folder, body, _by(columns))})


def _import_tars(options: ImportOptions) -> Result:
    """Only the YAML, and a tokenizer: the tars stay where they are."""
    contents = look_at_tars(options.source)
    job = ImportJob(options, [str(path) for path in contents.shards], writes=False)
    if not contents.fields and not options.tokenizer:
        raise ConfigurationError(
            f"data import {options.source}: no record has a text; expected KEY.txt, or `fields` in "
            "KEY.json"
        )
    held = options.held_out if not contents.splits else 0.0
    job.result.sets[options.name] = {
        "shards": options.source,
        "splits": {"train": round(contents.estimate * (1 - held))},
        "estimated": True,
    }
    job.result.sets[options.name]["splits"]["held_out"] = (
        contents.estimate - job.result.sets[options.name]["splits"]["train"]
    )
    job.result.rows = contents.estimate
    body = declare.items(contents.media, list(contents.fields))
    return _conclude(job, None, {options.name: (Path(options.source), body, "id")})


def _import_interactions(
    options: ImportOptions,
    found: Found,
    columns: Columns,
    rows: Sequence[Row],
    progress: Callable[[int], None],
) -> Result:
    """Items, then one record a user over them."""
    if not options.items:
        raise ConfigurationError(
            f"data import {options.source}: interactions need their items; give the table of them "
            "with --items FILE (id, texts, pictures)"
        )
    assert found.source is not None
    items = find_source(options.items, options.media_folder)
    if items.source is None:
        raise ConfigurationError(
            f"--items {options.items}: found {items.form}, expected a table with an id and texts "
            "or pictures of each item"
        )
    item_rows = first_rows(items.source.parts(1000))
    told = (
        {}
        if any("id" in row.values or "_id" in row.values for row in item_rows)
        else {"id": _id_column(item_rows, options.items)}
    )
    item_columns = find_columns(item_rows, told, "items", options.items)
    item_body = _body(item_columns, item_rows, catalogue=True)
    job = ImportJob(options, [*found.source.files(), *items.source.files()], progress)
    result, name = job.finished(), f"{options.name}_items"
    declare.target_file(name)
    folder = options.folder / ITEMS
    if result is None:
        root, patterns = _root(items, item_columns, item_rows, options), bool(item_body["patterns"])
        outcome = _write_rows(
            job, name, folder, items.source, item_columns, root, complete=False, patterns=patterns
        )
        job.add_set(name, folder, outcome)
        known, twice = gather_ids(folder, "rows")
        if twice:
            job.result.notes["items whose id is there more than once"] = twice
        shop, buckets = job.shop(options.folder), buckets_of(found.source.files())
        labels = [
            number(columns.of("label", row))
            for row in rows
            if columns.of("label", row) not in (None, "")
        ]
        numbers = all(isinstance(label, int | float) for label in labels)
        spill = Spill(options.folder, "interactions", buckets, PickInteraction(columns, numbers))
        job.done(
            shop,
            "interactions",
            shop.run("interactions", tagged(found.source.parts(shuffle.SPILL_ROWS), ""), spill),
        )
        timed = "time" in columns.roles
        write = WriteHistories(
            options.folder,
            "users",
            "interactions",
            options.name,
            known,
            HeldOut(options.held_out),
            timed,
            numbers,
        )
        outcome = shop.run("users", range(buckets), write)
        job.done(shop, "users", outcome)
        job.add_set(options.name, options.folder, outcome)
        job.result.sets[options.name]["interactions"] = str(options.folder / TABLES)
        job.check_dropped()
    bodies = {
        name: (folder, item_body, "id"),
        options.name: (options.folder, declare.sequences(name, item_body["views"]), "id"),
    }
    return _conclude(job, result, bodies)


def _id_column(rows: Sequence[Row], where: str) -> str:
    """The column of the items' ids where it is called as interactions call it."""
    names = {name.lower(): name for row in rows[:1] for name in row.values}
    found = next((names[name] for name in ROLES["item"].split() if name in names), None)
    if found is None:
        raise ConfigurationError(
            f"--items {where}: no column of ids; it has: {', '.join(names.values()) or 'nothing'}; "
            "rename it to id"
        )
    return found


def _import_retrieval(
    options: ImportOptions, found: Found, progress: Callable[[int], None]
) -> Result:
    """The corpus as items, and a pair for each judgement above 0."""
    corpus, queries, qrels = (found.retrieval[what] for what in ("corpus", "queries", "qrels"))
    job = ImportJob(
        options, [name for one in (corpus, queries, qrels) for name in one.files()], progress
    )
    result, name, folder = job.finished(), f"{options.name}_corpus", options.folder / ITEMS
    declare.target_file(name)
    rows = first_rows(corpus.parts(1000))
    columns = find_columns(rows, {}, "items", f"{options.source}/corpus")
    body = declare.items((), columns.fields, catalogue=True)
    if result is None:
        job.add_set(
            name,
            folder,
            _write_rows(
                job,
                name,
                folder,
                corpus,
                columns,
                found.path,
                complete=False,
                patterns=bool(body["patterns"]),
            ),
        )
        known, twice = gather_ids(folder, "rows")
        if twice:
            job.result.notes["documents whose id is there more than once"] = twice
        shop, buckets = job.shop(options.folder), buckets_of([*queries.files(), *qrels.files()])
        splits = _file_splits(qrels)
        both = itertools.chain(
            tagged(queries.parts(shuffle.SPILL_ROWS), QUERY),
            tagged(qrels.parts(shuffle.SPILL_ROWS), JUDGEMENT),
        )
        alone = not ("train" in splits and len(splits) > 1)
        job.done(
            shop,
            "join",
            shop.run("join", both, Spill(options.folder, "join", buckets, PickForJoin(alone))),
        )
        held_out = HeldOut(options.held_out, "query_id")
        write = WritePairs(
            options.folder, "pairs", "join", options.name, known, held_out, options.language
        )
        outcome = shop.run("pairs", range(buckets), write)
        job.done(shop, "pairs", outcome)
        job.add_set(options.name, options.folder, outcome)
        job.check_dropped()
    bodies = {
        name: (folder, body, "id"),
        options.name: (options.folder, declare.pairs_by_id(name, body["views"]), "query_id"),
    }
    return _conclude(job, result, bodies)


def _write_rows(
    job: ImportJob,
    name: str,
    folder: Path,
    source: Source,
    columns: Columns,
    root: Path,
    *,
    complete: bool = True,
    patterns: bool = True,
) -> Outcome:
    """Shards of a table's rows."""
    options = job.options
    make = RecordMaker(
        columns, Media(root, options.check), options.language, complete, options.score_maximum
    )
    by_file = len(_file_splits(source)) > 1
    share = (
        options.held_out if patterns else 0.0
    )  # items that are only referred to are all there to be found
    shop = job.shop(folder)
    outcome = shop.run(
        "rows",
        source.parts(options.shard_size),
        WriteShard(folder, "rows", name, make, HeldOut(share, _by(columns)), by_file),
    )
    job.done(shop, "rows", outcome)
    return outcome


def _file_splits(source: Source) -> set[str]:
    """The splits that the names of a source's files tell."""
    sources = source.sources if isinstance(source, Several) else [source]
    found = (
        getattr(one, "split", None) or split_of_file(Path(one.files()[0]).name) for one in sources
    )
    return {split for split in found if split}


def _root(found: Found, columns: Columns, rows: Sequence[Row], options: ImportOptions) -> Path:
    """The folder that names of media are relative to."""
    if options.media is not None or found.form != "table":
        return found.media
    roles = [
        role for role in (*MEDIA_ROLES, "query_image", "target_image") if role in columns.roles
    ]
    names = [
        value
        for row in rows[:100]
        for role in roles
        if isinstance(value := columns.of(role, row), str)
    ]
    return find_root(names, found.media) if names else found.media


def _by(columns: Columns) -> str:
    """The key whose values lie on one side: several captions of one picture, several answers to
    one query.
    """
    if columns.kind == "pairs":
        return "query"
    return "source" if any(role in columns.roles for role in MEDIA_ROLES) else "id"


def _body(columns: Columns, rows: Sequence[Row], *, catalogue: bool = False) -> JsonObject:
    """The data set's views and patterns."""
    if columns.kind == "items":
        return declare.items(
            [role for role in MEDIA_ROLES if role in columns.roles],
            columns.fields,
            catalogue=catalogue,
        )
    sides: dict[str, set[str]] = {}
    for side in ("query", "target"):
        values = [columns.of(side, row) for row in rows]
        objects = [value for value in values if isinstance(value, Mapping)]
        sides[side] = (
            {"vision"}
            if f"{side}_image" in columns.roles or any("image" in value for value in objects)
            else set()
        )
        sides[side] |= {"audio"} if any("audio" in value for value in objects) else set()
        texts = any(
            value not in (None, "")
            and (not isinstance(value, Mapping) or value.keys() - {*MEDIA_ROLES, "id"})
            for value in values
        )
        sides[side] |= {"text"} if texts else set()
    return declare.pairs(sides, columns.most_negatives)


def _conclude(
    job: ImportJob, known: Result | None, bodies: Mapping[str, tuple[Path, dict[str, object], str]]
) -> Result:
    """Write the tokenizer and the YAMLs of the import's data sets."""
    options, result = job.options, known or job.result
    if options.tokenizer:
        result.tokenizer = options.tokenizer
    elif known is None or not (options.folder / TOKENIZER).is_file():
        rules = {
            name: HeldOut(options.held_out if body["patterns"] else 0.0, by)
            for name, (_, body, by) in bodies.items()
        }
        sets = [
            (resolve(name, str(folder)), rules[name]) for name, (folder, _, _) in bodies.items()
        ]
        result.tokenizer = str(options.folder / TOKENIZER)
        result.tokens = train_tokenizer(training_texts(sets), Path(result.tokenizer))
    for name, (folder, body, by) in bodies.items():
        share = options.held_out if body["patterns"] else 0.0
        splits = result.sets[name]["splits"]
        counts = "about " * ("estimated" in result.sets[name]) + f"{sum(splits.values())} records"
        path, about = (
            declare.target_file(name),
            f"{counts} of kind {body['kind']}, imported from {options.source}.",
        )
        declare.write(
            path, name, about, str(folder), body, held_out=share, by=by, language=options.language
        )
    if known is None:
        job.finish()
    return result
