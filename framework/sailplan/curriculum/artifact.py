"""What a stage makes for itself at its start: the base of all artifacts, and how the
configuration names them.

A new artifact is one file with a subclass, one YAML of the group `artifact` with its `_target_`,
and one test. Most make a data set, read by the same reader as any other (`shards: artifact:NAME`):
these subclass `ShardArtifact` and yield records.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from sailplan.config.fields import JsonObject
from sailplan.config.schema import ARTIFACT, Config, StageConfig, ViewConfig
from sailplan.config.targets import check_options, class_at
from sailplan.data.reader import RecordReader
from sailplan.data.writer import Record, write_shards
from sailplan.embed.embedder import Embedder
from sailplan.errors import BadDataError, ConfigurationError, SailplanError
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel

PER_SHARD = 4096


def artifact_sets(config: Config, stage: StageConfig, name: str) -> list[str]:
    """Return the data sets whose shards are the artifact `name`, those of the stage first."""
    every = [
        dataset for dataset, found in config.data.sets.items() if found.shards == ARTIFACT + name
    ]
    return sorted(every, key=lambda dataset: dataset not in stage.data)


@dataclass(frozen=True)
class ArtifactContext:
    """What an artifact is made from.

    folder: of the stage, in the run folder; an artifact's data set lies in folder/NAME.
    """

    embedder: Embedder
    stage_name: str
    stage: StageConfig
    folder: Path

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.embedder.context.config

    @property
    def parallel(self) -> Parallel:
        """This rank's place."""
        return self.embedder.context.parallel

    @property
    def readers(self) -> dict[str, RecordReader]:
        """The open data sets by name."""
        return self.embedder.context.readers


class Artifact(ABC):
    """Base of all artifacts.

    The constructor takes the artifact's name and, by keyword, the options of its YAML file.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, config: Config, stage_name: str, stage: StageConfig) -> None:  # noqa: B027  nothing to check by default
        """Raise ConfigurationError for what the configuration alone says cannot be made: said
        before the run.
        """

    def embedded(self, config: Config, stage: StageConfig) -> Sequence[tuple[str, ViewConfig]]:
        """Return the data sets whose records `make` embeds, at most all of each, with the view."""
        return ()

    @abstractmethod
    def make(self, context: ArtifactContext) -> JsonObject:
        """Write the artifact and return its statistics (JSON values).

        Collective: all ranks call it, all get the same.

        What one rank alone knows must fail on all ranks, so that none waits for ever.
        """


class ShardArtifact(Artifact):
    """A data set that ranks write side by side: `parts` parts, whatever the number of ranks, so
    that the bytes are the same.
    """

    parts = 8

    @abstractmethod
    def records(self, context: ArtifactContext, part: int) -> Iterable[JsonObject]:
        """Yield the records of one of `self.parts` parts: {"id": "NAME/KEY", "split": "train",
        ...} as docs/data.md says.

        One rank alone runs it for a part, so it must call nothing collective. It is read once, and
        held a shard at a time.
        """

    def prepare(self, context: ArtifactContext) -> None:
        """Do what all ranks do together before the parts are made, such as embedding.

        Collective.
        """

    def check(self, config: Config, stage_name: str, stage: StageConfig) -> None:
        """Raise ConfigurationError where no data set reads the artifact."""
        if not artifact_sets(config, stage, self.name):
            raise ConfigurationError(
                f"stages.{stage_name}.artifacts: no data set has `shards: {ARTIFACT}{self.name}`; "
                "add one to data.sets, or leave the artifact out"
            )

    def make(self, context: ArtifactContext) -> JsonObject:
        """Write this rank's parts; return the number of records of all."""
        parallel, target = context.parallel, context.folder / self.name
        on_main(parallel, f"clearing {target}", lambda: shutil.rmtree(target, ignore_errors=True))
        self.prepare(context)
        written, problem = 0, None
        try:
            for part in range(parallel.rank, self.parts, parallel.world_size):
                bodies = iter(self.records(context, part))
                shards = iter(partial(_some, bodies), [])
                for number, shard in enumerate(shards):
                    write_shards(
                        [Record(body) for body in shard],
                        target,
                        f"{self.name}-{part:04d}-{number:04d}",
                        PER_SHARD,
                    )
                    written += len(shard)
        except Exception as error:
            problem = error
        if parallel.agree(problem is not None):
            raise problem or SailplanError(
                f"artifact {self.name}: making it failed on another rank, whose message says why; "
                "correct that"
            )
        total = torch.tensor(written, dtype=torch.int64, device=parallel.device)
        dist.all_reduce(total)
        if not int(total):
            raise BadDataError(
                f"artifact {self.name}: {type(self).__name__} yielded no record, expected some; "
                "look at what it is made from"
            )
        return {"records": int(total)}


def _some(bodies: Iterator[JsonObject]) -> list[JsonObject]:
    return list(islice(bodies, PER_SHARD))


def artifact(name: str, options: JsonObject | None, allowed: Sequence[str]) -> Artifact:
    """Return the artifact that `artifacts.NAME` describes.

    Raises ConfigurationError for a name without an entry, a target that is missing, not allowed or
    no Artifact, and an option that it does not have or refuses.
    """
    key = f"artifacts.{name}"
    if options is None:
        raise ConfigurationError(
            f"{key} is missing: a stage lists it in its artifacts; add +artifact={name}, a file "
            f"conf/artifact/{name}.yaml"
        )
    given = dict(options)
    target = given.pop("_target_", None)
    if not isinstance(target, str) or not target:
        raise ConfigurationError(
            f"{key}._target_: found {target!r}, expected a class, such as "
            "sailplan.curriculum.artifacts.Interests"
        )
    cls = class_at(f"{key}._target_", target, Artifact, allowed)  # type: ignore[type-abstract]
    check_options(key, cls, given, ("name",))
    return cls(name, **given)


def stage_artifacts(config: Config, stage_name: str) -> list[Artifact]:
    """Return a stage's artifacts in the order in which it makes them, each checked;
    ConfigurationError as `artifact` and `Artifact.check`.
    """
    stage = config.stages[stage_name]
    found = [
        artifact(name, config.artifacts.get(name), config.allowed_targets)
        for name in stage.artifacts
    ]
    for each in found:
        each.check(config, stage_name, stage)
    return found
