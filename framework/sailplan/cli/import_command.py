"""`sailplan data import` and `sailplan new`: from people's own data to an experiment, without a
line of YAML by hand.
"""

from __future__ import annotations

import argparse
import os

from sailplan.errors import EXIT_DONE, ConfigurationError
from sailplan.runtime.progress import progress

SOURCES = """SOURCE is one of
  a table          .csv .tsv .jsonl .parquet .arrow, a .txt of captions; files that it names are looked for beside it, or in --media
  a folder         with such a table; or with pictures or sound and a .txt beside each
  a folder         of Hugging Face's save_to_disk, or of Parquet files
  tars             a folder or brace pattern, as img2dataset makes them: read where they lie, nothing is copied
  a retrieval set  corpus, queries and qrels, as BEIR and MTEB have them
Columns are found by their names: image, audio or video with texts; query and target (anchor, positive), negatives, score; user, item, time
and label. Others are named with --column ROLE=COLUMN. The same command goes on after a stop."""


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `sailplan data import`."""
    parser.epilog, parser.formatter_class = SOURCES, argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SOURCE", help="what to import, see below")
    parser.add_argument(
        "--name", required=True, help="name of the data set: conf/data/NAME.yaml and data/NAME/"
    )
    parser.add_argument(
        "--kind",
        choices=["items", "pairs", "interactions"],
        default=None,
        help="what rows are (default: found by the columns)",
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=COLUMN",
        help="the column of a role; of texts several: text=title+tags",
    )
    parser.add_argument(
        "--items",
        default=None,
        metavar="TABLE",
        help="interactions: the table of the items, with their ids, texts or pictures",
    )
    parser.add_argument(
        "--media",
        default=None,
        metavar="FOLDER",
        help="folder that names of files are relative to (default: found)",
    )
    parser.add_argument(
        "--out",
        default=None,
        metavar="FOLDER",
        help="where shards are written (default: data/NAME)",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="held out where rows name no split, by hash (default: 0.1)",
    )
    parser.add_argument(
        "--shard-size",
        type=int,
        default=10_000,
        metavar="ROWS",
        help="rows of a shard (default: 10000)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=None,
        help="processes (default: one a CPU); the bytes do not depend on it",
    )
    parser.add_argument("--language", default="en", help="of the texts (default: en)")
    parser.add_argument(
        "--check",
        choices=["decode", "open"],
        default="decode",
        help="how media are tried: whole, or their beginning (default: decode)",
    )
    parser.add_argument(
        "--score-maximum",
        type=float,
        default=1.0,
        metavar="NUMBER",
        help="what scores are divided by (default: 1)",
    )
    parser.add_argument(
        "--drop-limit",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="of rows that may be dropped (default: 0.01)",
    )
    parser.add_argument(
        "--tokenizer",
        default=None,
        metavar="FILE",
        help="a tokenizer.json to use (default: one is learned from the texts)",
    )


def add_new_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `sailplan new`."""
    parser.add_argument(
        "name", metavar="NAME", help="name of the experiment: conf/experiment/NAME.yaml"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="SET[,SET]",
        help="data sets of conf/data; the items that they refer to come along",
    )
    parser.add_argument(
        "--model", default=None, help="a file of conf/model (default: quickstart, from scratch)"
    )
    parser.add_argument(
        "--steps", type=int, default=None, help="steps (default: about ten passes over the data)"
    )
    parser.add_argument(
        "--tokenizer",
        default=None,
        metavar="FILE",
        help="a tokenizer.json (default: the data sets' own)",
    )


def run(options: argparse.Namespace) -> int:
    """Import, and print what came of it."""
    from sailplan.ingest.importing import import_data
    from sailplan.ingest.job import DROPPED, ImportOptions

    _check(options)
    names = (
        "source",
        "name",
        "kind",
        "items",
        "media",
        "out",
        "held_out",
        "shard_size",
        "language",
        "check",
        "score_maximum",
        "drop_limit",
        "tokenizer",
    )
    workers = options.workers or len(os.sched_getaffinity(0))
    from sailplan.ingest.columns import parse_told

    told = ImportOptions(
        **{name: getattr(options, name) for name in names},
        columns=parse_told(options.column),
        workers=workers,
    )
    with progress("importing", None, "rows") as advance:
        result = import_data(told, advance)
    for name, one in result.sets.items():
        splits = ", ".join(f"{count} {split}" for split, count in one["splits"].items())
        print(
            f"{name}: {'about ' * ('estimated' in one)}{sum(one['splits'].values())} records "
            f"({splits}) in {one['shards']}"
        )
    if result.dropped:
        print(f"{result.dropped} of {result.rows} rows dropped: {told.folder / DROPPED}")
    for what, count in result.notes.items():
        if what != "scored":
            print(f"{count} {what}")
    if result.repaired:
        print(f"{result.repaired} rows with text that needed repair")
    print(f"next: sailplan new {told.name} --data {told.name}")
    return EXIT_DONE


def run_new(options: argparse.Namespace) -> int:
    """Write an experiment, and print what was chosen."""
    from sailplan.ingest.experiment import write_experiment

    if options.steps is not None and options.steps < 1:
        raise ConfigurationError(f"--steps {options.steps}: expected at least 1")
    sets = [name for name in options.data.split(",") if name]
    if not sets:
        raise ConfigurationError(
            "--data is empty: expected data sets of conf/data, such as shoes,shoe_pairs"
        )
    path, chosen = write_experiment(
        options.name, sets, model=options.model, steps=options.steps, tokenizer=options.tokenizer
    )
    print(
        f"{path}: {chosen['steps']} steps of {chosen['global_batch']} rows, tasks: "
        f"{', '.join(chosen['tasks']) or 'none'}"
    )
    for name in chosen["without_held_out"]:
        print(
            f"{name}: no record is held out, so no task is evaluated; import with a larger "
            "--held-out to have some"
        )
    print(
        f"next: sailplan plan experiment={options.name}, then sailplan train "
        f"experiment={options.name}"
    )
    return EXIT_DONE


def _check(options: argparse.Namespace) -> None:
    for flag, value, low in (
        ("--shard-size", options.shard_size, 1),
        ("--workers", options.workers, 1),
    ):
        if value is not None and value < low:
            raise ConfigurationError(f"{flag} {value}: expected at least {low}")
    for flag, share in (("--held-out", options.held_out), ("--drop-limit", options.drop_limit)):
        if not 0 <= share < 1:
            raise ConfigurationError(f"{flag} {share}: expected a share, at least 0 and below 1")
    if not options.score_maximum > 0:
        raise ConfigurationError(
            f"--score-maximum {options.score_maximum}: expected a number above 0"
        )
    if options.tokenizer and not os.path.isfile(options.tokenizer):
        raise ConfigurationError(
            f"--tokenizer {options.tokenizer}: no such file; expected a tokenizer.json of the "
            "tokenizers library"
        )
