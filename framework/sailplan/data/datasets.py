"""Open the data sets of a configuration: shards found, indices ready, catalogues linked, views checked.

Whatever is wrong is told here, with its key, before any step: a missing folder, a view of a part that the kind does
not have, a text view without fields, a catalogue that is absent or is no items set, a prompt that leaves no room.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sailplan.config.schema import MODALITIES, Config, DatasetConfig
from sailplan.data.index import ShardIndex
from sailplan.data.reader import BadSample, RecordReader
from sailplan.data.shards import ARTIFACT, resolve
from sailplan.data.tar import scan
from sailplan.data.views import ViewDecoder, shared_decoder
from sailplan.errors import BadDataError, ConfigurationError

PARTS = {"items": ("item",), "pairs": ("query", "target"), "sequences": ("history", "target")}


def open_datasets(config: Config, artifacts: Mapping[str, str | Path] | None = None, names: Iterable[str] | None = None) -> dict[str, RecordReader]:
    """Data set name -> reader, catalogues included.

    artifacts: folders of the data sets whose shards are `artifact:NAME`; those without a folder yet are left out.
    names: open only these (and their catalogues); default all of data.sets.
    Raises ConfigurationError naming the key, BadDataError naming a damaged shard.
    """
    sets = config.data.sets
    folders = dict(artifacts or {})
    readers: dict[str, RecordReader] = {}
    for name in list(names) if names is not None else list(sets):
        if name not in sets:
            raise ConfigurationError(f"data.sets has no '{name}'; it has: {', '.join(sets) or 'none'}")
        shards = sets[name].shards
        if not shards.startswith(ARTIFACT) or shards.removeprefix(ARTIFACT) in folders:
            _open(config, name, folders, readers)
    return readers


def _open(config: Config, name: str, folders: Mapping[str, str | Path], readers: dict[str, RecordReader]) -> RecordReader:
    if name in readers:
        return readers[name]
    dataset = config.data.sets[name]
    check_dataset(config, name)
    catalogue = _open(config, dataset.catalogue, folders, readers) if dataset.catalogue else None
    shards = dataset.shards
    if shards.startswith(ARTIFACT):
        shards = str(folders[shards.removeprefix(ARTIFACT)])
    cache = Path(config.data.cache) if config.data.cache else None
    readers[name] = RecordReader(name, dataset, ShardIndex(resolve(name, shards, cache), cache), catalogue)
    return readers[name]


def check_dataset(config: Config, name: str) -> None:
    """Raises ConfigurationError at the first thing in data.sets.NAME that cannot work, whatever the shards hold."""
    dataset, key = config.data.sets[name], f"data.sets.{name}"
    if dataset.kind not in PARTS:
        raise ConfigurationError(f"{key}.kind={dataset.kind}: expected one of {', '.join(PARTS)}")
    _check_catalogue(config, name, dataset)
    for view_name, view in dataset.views.items():
        place = f"{key}.views.{view_name}"
        if view.of not in PARTS[dataset.kind]:
            raise ConfigurationError(f"{place}.of={view.of}: a data set of kind '{dataset.kind}' has {', '.join(PARTS[dataset.kind])}")
        unknown = [modality for modality in view.modalities if modality not in MODALITIES]
        if unknown or not view.modalities:
            raise ConfigurationError(f"{place}.modalities={view.modalities}: expected some of {', '.join(MODALITIES)}")
        if "text" in view.modalities and not view.fields:
            raise ConfigurationError(f"{place}.fields is empty: a view with text needs the names of its text fields, such as title")
        if view.pick not in ("join", "one"):
            raise ConfigurationError(f"{place}.pick={view.pick}: expected join or one")
    for pattern_name, pattern in dataset.patterns.items():
        for side in (pattern.query, pattern.target):
            if side not in dataset.views:
                raise ConfigurationError(f"{key}.patterns.{pattern_name}: no view '{side}'; this data set has: {', '.join(dataset.views) or 'none'}")


def _check_catalogue(config: Config, name: str, dataset: DatasetConfig) -> None:
    key = f"data.sets.{name}.catalogue"
    if dataset.kind == "items":
        return
    if not dataset.catalogue:
        raise ConfigurationError(f"{key} is missing: a data set of kind '{dataset.kind}' refers to the items of another data set by id")
    if dataset.catalogue not in config.data.sets:
        raise ConfigurationError(f"{key}={dataset.catalogue}: no such data set; data.sets has: {', '.join(config.data.sets)}")
    if config.data.sets[dataset.catalogue].kind != "items":
        raise ConfigurationError(f"{key}={dataset.catalogue}: is of kind '{config.data.sets[dataset.catalogue].kind}', expected 'items'")


@dataclass(frozen=True)
class Problem:
    """Something that `validate` found: in which data set, which record (or shard), and what."""

    dataset: str
    record: str
    reason: str

    def __str__(self) -> str:
        return f"{self.dataset}: {self.record}: {self.reason}"


def validate(config: Config, names: Iterable[str] | None = None) -> list[Problem]:
    """Reads every record of every data set and decodes it in every view; returns all problems found, [] if none.

    Also found: damaged shards, ids that occur twice, and views in which not one record has any declared modality.
    Data sets that a stage makes (`artifact:NAME`) are not there to be read. Raises ConfigurationError as open_datasets.
    """
    problems: list[Problem] = []
    decoder = shared_decoder(config.data)
    for name in names if names is not None else config.data.sets:
        if config.data.sets[name].shards.startswith(ARTIFACT):
            continue
        try:
            reader = open_datasets(config, names=[name])[name]
            for shard in reader.index.shards:
                scan(shard)
        except BadDataError as error:
            problems.append(Problem(name, "-", str(error)))
            continue
        problems += validate_reader(reader, decoder)
    return problems


def validate_reader(reader: RecordReader, decoder: ViewDecoder) -> list[Problem]:
    """All problems of an open data set's records (see `validate`)."""
    problems: list[Problem] = []
    seen: set[str] = set()
    shown = dict.fromkeys(reader.config.views, 0)
    for position in range(len(reader)):
        record_id = reader.ids([position])[0]
        if record_id in seen:
            problems.append(Problem(reader.name, record_id, "this id occurs more than once"))
        seen.add(record_id)
        try:
            record = reader.read(position)
            for view_name, view in reader.config.views.items():
                items = record.history if view.of == "history" else [getattr(record, view.of)]
                shown[view_name] += any([decoder.row(item, view, reader.config).valid for item in items])
        except BadSample as problem:
            problems.append(Problem(reader.name, record_id, problem.reason if problem.record_id == record_id else str(problem)))
    for view_name, count in shown.items():
        if count == 0 and len(reader):
            view = reader.config.views[view_name]
            problems.append(
                Problem(
                    reader.name,
                    "-",
                    f"view '{view_name}': no record has any of {', '.join(view.modalities)} (fields {', '.join(view.fields) or '-'})",
                )
            )
    return problems
