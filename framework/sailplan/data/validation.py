"""`sailplan data validate`: every record decoded in every view, every problem named, and all
that is passed over counted.

Work goes shard by shard over several processes. What was found in a shard is kept beside its index
and used again as long as the shard, its item corpus and the settings are the same, so that a
validation which was stopped goes on where it was. Ids that occur twice are looked for in ranges of
their hashes: no process holds the ids of all records.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sailplan.config.schema import ARTIFACT, Config
from sailplan.data.datasets import open_datasets
from sailplan.data.index import id_hash
from sailplan.data.inspection import VERSION, Findings, inspect
from sailplan.data.places import explained, kept_places, place_to_write
from sailplan.data.processor import processor_of
from sailplan.data.reader import RecordReader
from sailplan.data.shard_files import Shard, state_of
from sailplan.data.tar import scan
from sailplan.errors import BadDataError
from sailplan.runtime.progress import progress

IDS_AT_ONCE = 1 << 22  # hashes that are compared in one go
MOST_LISTED = 1000  # problems of a kind that are listed; the others are counted
_opened: tuple[
    Config, dict[str, RecordReader]
]  # of the process that shares out the shards; its forked workers read it


@dataclass(frozen=True)
class Problem:
    """Something that is wrong: in which data set, which record (or shard), and what."""

    dataset: str
    record: str
    reason: str

    def __str__(self) -> str:
        return f"{self.dataset}: {self.record}: {self.reason}"


@dataclass
class Validation:
    """What was found in one data set."""

    dataset: str
    problems: list[Problem] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)

    @property
    def notes(self) -> list[str]:
        """Lines on members and bytes that no record shows, and on media of several endings."""
        lines = [
            f"{what}: {count} (first {first})"
            for what, (count, first) in self.findings.passed.items()
        ]
        for kind, endings in self.findings.endings.items():
            if len(endings) > 1:
                counted = ", ".join(
                    f".{ending} ({count})" for ending, count in sorted(endings.items())
                )
                lines.append(f"{kind}s end in {counted}: all are read, by their content")
        return [f"{self.dataset}: {line}" for line in lines]


def validate(
    config: Config, names: Iterable[str] | None = None, processes: int | None = None
) -> list[Problem]:
    """Return all problems of all data sets, [] if there are none (see `validations`)."""
    return [
        problem for found in validations(config, names, processes) for problem in found.problems
    ]


def validations(
    config: Config, names: Iterable[str] | None = None, processes: int | None = None
) -> Iterator[Validation]:
    """Yield what is found in each data set: records read and decoded in every view.

    Problems are bad samples, damaged shards, ids that occur twice, views in which not one record
    has any declared modality, and patterns of which no record has both sides. Data sets that a
    stage makes (`artifact:NAME`) are not there to be read.
    processes: how many work at it; None: as many as there are CPUs. Raises ConfigurationError as
    open_datasets.
    """
    global _opened
    for name in names if names is not None else config.data.sets:
        if config.data.sets[name].shards.startswith(ARTIFACT):
            continue
        result = Validation(name)
        try:
            readers = open_datasets(
                config,
                names=[name],
                processes=processes or len(os.sched_getaffinity(0)),
                thorough=True,
            )
        except BadDataError as error:
            result.problems.append(Problem(name, "-", str(error)))
            yield result
            continue
        _opened = config, readers
        processor_of(config)  # made once, before the workers are forked
        shards = range(len(readers[name].index.shards))
        with progress(f"validating {name}", len(shards), "shards") as advance:
            for _, found in _over(shards, name, processes or len(os.sched_getaffinity(0))):
                result.findings.add(found)
                advance(1)
        result.problems += [Problem(name, *problem) for problem in result.findings.problems]
        result.problems += [
            Problem(name, record, "this id occurs more than once")
            for record in duplicates(readers[name], _cache(config))
        ]
        result.problems += _of_whole(readers[name], result.findings)
        yield result


def _over(shards: range, name: str, processes: int) -> Iterator[tuple[int, Findings]]:
    """Yield the findings of each shard, in order."""
    if min(processes, len(shards)) <= 1:
        yield from ((shard, _shard(name, shard)) for shard in shards)
        return
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # the tokenizer's threads do not survive the fork
    with get_context("fork").Pool(
        min(processes, len(shards)), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.imap(_numbered, [(name, shard) for shard in shards])


def _numbered(work: tuple[str, int]) -> tuple[int, Findings]:
    return work[1], _shard(*work)


def _shard(name: str, shard: int) -> Findings:
    """The findings of a shard: those that are kept, else made and kept."""
    config, readers = _opened
    reader, cache = readers[name], _cache(config)
    path, key = reader.index.shards[shard], _key(config, reader, shard)
    for place in kept_places(path, f"{path.stem}.{name}.checked", cache):
        try:
            kept = json.loads(place.read_text())
            if kept["key"] == key:
                return Findings(**kept["findings"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    try:
        scan(path)
        found = inspect(reader, shard, processor_of(config))
    except BadDataError as error:
        return Findings(problems=[("-", str(error))])
    place = place_to_write(path, f"{path.stem}.{name}.checked", cache)
    with explained(place, cache):
        hashes = np.sort(
            np.fromiter(
                (id_hash(one) for one in reader.index.ids(_positions(reader, shard))), np.uint64
            )
        )
        np.save(place.with_suffix(".ids.npy"), hashes)
        temporary = place.with_name(f".{place.name}-{os.getpid()}")
        temporary.write_text(json.dumps({"key": key, "findings": asdict(found)}))
        os.replace(temporary, place)
    return found


def _positions(reader: RecordReader, shard: int) -> range:
    return range(int(reader.index.starts[shard]), int(reader.index.starts[shard + 1]))


def _cache(config: Config) -> Path | None:
    return Path(config.data.cache).expanduser() if config.data.cache else None


def _key(config: Config, reader: RecordReader, shard: int) -> str:
    """Hash of all that a shard's findings depend on."""
    settings = {
        key: value
        for key, value in asdict(config.data).items()
        if key not in ("sets", "cache", "stream", "workers", "prefetch")
    }
    corpus = (
        []
        if reader.catalogue is None
        else [_state(place) for place in reader.catalogue.index.shards]
    )
    whole = [
        VERSION,
        settings,
        asdict(reader.config),
        _state(reader.index.shards[shard]),
        corpus,
        processor_of(config).tokenizer.digest,
    ]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def _state(shard: Shard) -> list[object]:
    return [str(shard), *state_of(shard)]


def duplicates(reader: RecordReader, cache: Path | None) -> list[str]:
    """Return the ids of records of which an earlier one has the same, in the records' order; at
    most MOST_LISTED.
    """
    kept: list[tuple[int, NDArray[np.uint64]]] = []
    for shard, path in enumerate(reader.index.shards):
        places = [
            place.with_suffix(".ids.npy")
            for place in kept_places(path, f"{path.stem}.{reader.name}.checked", cache)
        ]
        place = next((place for place in places if place.is_file()), None)
        if place is not None:
            kept.append((shard, np.load(place, mmap_mode="r")))
    parts = max(1, -(-len(reader) // IDS_AT_ONCE))
    found: set[int] = set()
    for part in range(parts):
        low, high = np.uint64(part * 2**64 // parts), np.uint64((part + 1) * 2**64 // parts - 1)
        cut = [
            hashes[np.searchsorted(hashes, low) : np.searchsorted(hashes, high, side="right")]
            for _, hashes in kept
        ]
        values = np.sort(np.concatenate(cut)) if cut else np.empty(0, dtype=np.uint64)
        found |= set(values[1:][values[1:] == values[:-1]].tolist()[:MOST_LISTED])
    if not found:
        return []
    seen: set[str] = set()
    result = []
    for shard, hashes in kept:
        if np.isin(hashes, np.fromiter(found, np.uint64)).any():
            for one in reader.index.ids(_positions(reader, shard)):
                if id_hash(one) in found:
                    result += [one] * (one in seen)
                    seen.add(one)
    return result[:MOST_LISTED]


def _of_whole(reader: RecordReader, findings: Findings) -> list[Problem]:
    """Problems of a data set as a whole."""
    if not len(reader):
        return [Problem(reader.name, "-", f"no record in {len(reader.index.shards)} shards")]
    problems = []
    for name, view in reader.config.views.items():
        if not findings.views.get(name, {}).get("valid"):
            words = f"view '{name}': no record has any of {', '.join(view.modalities)} (fields {', '.join(view.fields) or '-'})"
            problems.append(Problem(reader.name, "-", words))
    for name in reader.config.patterns:
        if not findings.patterns.get(name):
            problems.append(
                Problem(reader.name, "-", f"pattern '{name}': no record has both of its sides")
            )
    return problems
