"""Open the data sets of a configuration: shards found, indices ready, catalogues linked, views
checked.

Whatever is wrong is told here, with its key, before any step: a missing folder, a view of a part
that the kind does not have, a text view without fields, a catalogue that is absent or is no items
set, a prompt that leaves no room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from sailplan.config.components import validate as check_settings
from sailplan.config.schema import ARTIFACT, Config
from sailplan.data.filling import Progress
from sailplan.data.index import ShardIndex
from sailplan.data.lengths import LengthIndex
from sailplan.data.plan import SPLIT
from sailplan.data.processor import processor_of
from sailplan.data.reader import RecordReader
from sailplan.data.shards import resolve
from sailplan.data.tar import HeldOut
from sailplan.errors import ConfigurationError


def open_datasets(
    config: Config,
    artifacts: Mapping[str, str | Path] | None = None,
    names: Iterable[str] | None = None,
    progress: Callable[[], None] | Progress = lambda: None,
    *,
    processes: int = 1,
    thorough: bool = False,
) -> dict[str, RecordReader]:
    """Data set name -> reader, catalogues included.

    artifacts: folders of the data sets whose shards are `artifact:NAME`; those without a folder yet
    are left out.
    names: open only these (and their catalogues); default all of data.sets. progress: called for
    each shard that is scanned, and while others scan. processes: how many of this process's own
    scan. thorough: look at every shard, compare every checksum.
    Raises ConfigurationError naming the key, BadDataError naming a damaged shard.
    """
    check_settings(config.data, "data")
    sets = config.data.sets
    folders = dict(artifacts or {})
    readers: dict[str, RecordReader] = {}
    for name in list(names) if names is not None else list(sets):
        if name not in sets:
            raise ConfigurationError(
                f"data.sets has no '{name}'; it has: {', '.join(sets) or 'none'}"
            )
        shards = sets[name].shards
        if not shards.startswith(ARTIFACT) or shards.removeprefix(ARTIFACT) in folders:
            _open(
                config,
                name,
                folders,
                readers,
                (
                    progress if isinstance(progress, Progress) else Progress(progress),
                    processes,
                    thorough,
                ),
            )
    return readers


def _open(
    config: Config,
    name: str,
    folders: Mapping[str, str | Path],
    readers: dict[str, RecordReader],
    told: tuple[Progress, int, bool],
) -> RecordReader:
    if name in readers:
        return readers[name]
    dataset = config.data.sets[name]
    catalogue = (
        _open(config, dataset.catalogue, folders, readers, told) if dataset.catalogue else None
    )
    shards = dataset.shards
    if shards.startswith(ARTIFACT):
        shards = str(folders[shards.removeprefix(ARTIFACT)])
    cache = Path(config.data.cache).expanduser() if config.data.cache else None
    held_out = (
        None
        if dataset.held_out is None
        else HeldOut(dataset.held_out.fraction, dataset.held_out.by)
    )
    progress, processes, thorough = told
    index = ShardIndex(
        resolve(name, shards, cache, lambda: progress.advance(0), config.data.stream),
        cache,
        progress,
        held_out,
        processes=processes,
        thorough=thorough,
    )
    reader = RecordReader(name, dataset, index, catalogue)
    variant = (
        ""
        if dataset.kind == "items"
        else dataset.kind
        if catalogue is not None
        else f"{dataset.kind}-inline"
    )
    reader.lengths = LengthIndex(
        index, processor_of(config).tokenizer, reader.outlines, cache, variant
    )
    reader.lengths.build(progress, processes=processes, thorough=thorough)
    if catalogue is not None:
        catalogue.index.prepare_ids(progress)
    readers[name] = reader
    return reader


def check_prompts(config: Config) -> None:
    """Raises ConfigurationError where a view's prompt leaves no room for the item's own text."""
    processor = processor_of(config)
    for dataset in config.data.sets.values():
        for view in dataset.views.values():
            processor.overhead(view)


def check_records(config: Config, readers: Mapping[str, RecordReader]) -> None:
    """Raises ConfigurationError for the first data set of a stage without a record to train on:
    said before the run, not at that stage.
    """
    for stage in config.order:
        for name in config.stages[stage].data:
            if name in readers and not readers[name].count(SPLIT):
                splits = readers[name].index.split_names
                has = f"{len(readers[name])} records, none of split '{SPLIT}' but of {', '.join(splits[:5])}{', ...' * (len(splits) > 5)}"
                found = has if len(readers[name]) else "no record"
                raise ConfigurationError(
                    f"stages.{stage}.data names '{name}', which has {found}: check "
                    f"data.sets.{name}.shards, or leave it out"
                )
