"""`sailplan data index|validate`: prepare and prove the data before a long run."""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from sailplan.config.compose import compose
from sailplan.config.schema import Config
from sailplan.data.filling import Progress
from sailplan.data.validation import Validation
from sailplan.errors import EXIT_BAD_DATA, EXIT_DONE, ConfigurationError
from sailplan.runtime.progress import Meter


def run(options: argparse.Namespace) -> int:
    from sailplan.data.validation import validations

    if options.processes is not None and options.processes < 1:
        raise ConfigurationError(f"--processes {options.processes}: expected at least 1")
    config = compose(options.overrides)
    if not config.data.sets:
        raise ConfigurationError(
            "no data set is configured: add experiment=NAME or data=[reading,NAME]"
        )
    if options.action == "index":
        return _index(config, options.processes or len(os.sched_getaffinity(0)))
    found = []
    for one in validations(config, processes=options.processes):
        for line in [*one.problems, *one.notes]:
            print(line, flush=True)
        found.append(one)
    print(_tables(found, config))
    count = sum(len(one.problems) for one in found)
    print(f"{count} problems")
    return EXIT_BAD_DATA if count else EXIT_DONE


class _Shown(Progress):
    """Shards of a table as they are done.

    It is drawn by this thread: another would not survive the fork of helpers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._meter: Meter | None = None

    def expect(self, what: str, shards: int) -> None:
        self.close()
        self._meter = Meter(what, shards, "shards")

    def advance(self, shards: int) -> None:
        if self._meter is not None:
            self._meter.advance(shards)

    def close(self) -> None:
        """Leave nothing on a terminal."""
        if self._meter is not None:
            self._meter.close()


def _index(config: Config, processes: int) -> int:
    """Index all data sets; every shard is looked at, and every checksum of what is kept
    compared.
    """
    from sailplan.data.datasets import open_datasets

    shown = _Shown()
    try:
        readers = open_datasets(config, progress=shown, processes=processes, thorough=True)
    finally:
        shown.close()
    for name, reader in readers.items():
        print(f"{name}: {len(reader)} records, {reader.count('train')} of them train")
    return EXIT_DONE


def _tables(found: Sequence[Validation], config: Config) -> str:
    """What the views' rows have, and what else was counted, as text."""
    stream = io.StringIO()
    console = Console(file=stream, width=150)
    views = _table(
        "data set",
        "view",
        "rows",
        "text",
        "vision",
        "audio",
        "without any",
        "tokens (mean, longest)",
        "cut",
        "a text",
    )
    others = _table("data set", "counted", "times", "first")
    for one in found:
        for name, numbers in one.findings.views.items():
            mean = numbers["tokens"] / max(numbers.get("text", 0), 1)
            has = [
                str(numbers[modality]) if modality in numbers else "-"
                for modality in ("text", "vision", "audio")
            ]
            lengths = f"{mean:.1f}, {numbers['longest']}" if "text" in numbers else "-"
            views.add_row(
                one.dataset,
                name,
                str(numbers["rows"]),
                *has,
                str(numbers["rows"] - numbers["valid"]),
                lengths,
                str(numbers["cut"]),
                numbers["sample"],
            )
        for what, (count, first) in one.findings.counted.items():
            others.add_row(one.dataset, what, str(count), first)
        used = {"train"} | {
            task.split for task in config.evaluation.tasks.values() if task.dataset == one.dataset
        }
        unused = {
            split: count
            for split, count in one.findings.splits.items()
            if split not in used and "all" not in used
        }
        if unused:
            others.add_row(
                one.dataset,
                "records in splits that nobody uses",
                str(sum(unused.values())),
                ", ".join(list(unused)[:5]),
            )
    console.print(views)
    if others.row_count:
        console.print(others)
    return stream.getvalue().rstrip()


def _table(*headings: str) -> Table:
    table = Table()
    for heading in headings:
        table.add_column(heading)
    return table
