"""The artifacts that come with the package: data sets and tables made from the training
histories, before a stage starts.

`interests` and `co_occurrence` become webdataset shards in a folder of their own name, read by the
same reader as any data set (`shards: artifact:interests`); `teachers` becomes one table of ID
embeddings, or an index of the files that a recommender brings (`data.teachers`). All ranks take
part where the model embeds and where timed events are read (`timed`); rank 0 alone computes and
writes the rest, from sets that fit in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sailplan.config.fields import JsonObject
from sailplan.config.schema import ARTIFACT, Config, StageConfig, ViewConfig
from sailplan.curriculum.artifact import Artifact, ArtifactContext, artifact_sets, stage_artifacts
from sailplan.curriculum.balance import unit_rows
from sailplan.curriculum.histories import (
    Histories,
    read_histories,
    source_of_histories,
    write_artifact,
)
from sailplan.curriculum.teachers import FACTORISATIONS, co_occurrence, factorise, pair_records
from sailplan.curriculum.timed import ContentVectors, make_timed_interests
from sailplan.curriculum.unordered import records, rules_count, sequences
from sailplan.data.events import event_files
from sailplan.data.reader import RecordReader
from sailplan.data.teacher_files import build_teachers, teacher_shape
from sailplan.data.teachers import TeacherTable
from sailplan.embed.embedder import Embedder
from sailplan.errors import ConfigurationError
from sailplan.runtime.main_rank import on_main

TEACHERS_FILE, TEACHERS = "teachers.npz", "teachers"
TEACHER_DIMENSIONS = 64


class FromHistories(Artifact):
    """Base of the three: made from the recorded training histories over one item corpus."""

    kind: str

    def check(self, config: Config, stage_name: str, stage: StageConfig) -> None:
        """Raise ConfigurationError where no data set reads it, or where it is not clear which
        histories make it.
        """
        if self.name != self.kind:
            raise ConfigurationError(
                f"artifacts.{self.name}: {type(self).__name__} is made under the name {self.kind}, "
                f"expected artifacts.{self.kind}; rename it"
            )
        histories_of(config, stage_name, stage, self.name)

    def make(self, context: ArtifactContext) -> JsonObject:
        """Write the artifact; return its statistics. Collective."""
        config, stage = context.config, context.stage
        reader = context.readers[histories_of(config, context.stage_name, stage, self.name)]
        histories = read_histories(reader, "train")
        stats: JsonObject = {"users": len(histories.users), "unknown_items": histories.unknown}
        return stats | _make(self.name, stage, context.embedder, reader, histories, context.folder)


class Interests(FromHistories):
    """Sequences of items that explain another item of the same user: of timed events, or of
    recorded sets without an order.
    """

    kind = "interests"

    def check(self, config: Config, stage_name: str, stage: StageConfig) -> None:
        """Raise ConfigurationError also for timed events that are not there or whose set cannot
        hold them.
        """
        name = timed_set(config, stage, self.name)
        if name is None:
            super().check(config, stage_name, stage)
            return
        dataset = config.data.sets[name]
        if dataset.kind != "sequences":
            raise ConfigurationError(
                f"data.sets.{name}.kind={dataset.kind}: expected sequences, as its interests are"
            )
        if dataset.held_out is not None and dataset.held_out.by != "user":
            raise ConfigurationError(
                f"data.sets.{name}.held_out.by={dataset.held_out.by}: expected user: sequences of "
                "one user lie on one side"
            )
        _history_view(config, name)
        assert dataset.interests is not None, "timed_set names such sets only"
        event_files(f"data.sets.{name}.interests.events", dataset.interests.events)

    def embedded(self, config: Config, stage: StageConfig) -> Sequence[tuple[str, ViewConfig]]:
        """Return the items of the histories, as a history shows them: their contents are compared."""
        name = artifact_sets(config, stage, self.name)[0]
        catalogue = config.data.sets[name].catalogue
        assert catalogue is not None, "sequences have a catalogue"
        return [(catalogue, replace(_history_view(config, name), of="item"))]

    def make(self, context: ArtifactContext) -> JsonObject:
        """Write the sequences; return their statistics. Collective."""
        name = timed_set(context.config, context.stage, self.name)
        return (
            super().make(context)
            if name is None
            else _timed(context.embedder, name, context.folder / self.name)
        )


class Teachers(FromHistories):
    """ID embeddings of items: an index of the files that a recommender brings, or factors of the
    user-item matrix.
    """

    kind = TEACHERS

    def check(self, config: Config, stage_name: str, stage: StageConfig) -> None:
        """Raise ConfigurationError also where the files are not there, or a loss of the stage
        expects other teachers.
        """
        if not config.data.teachers:
            super().check(config, stage_name, stage)
            return
        sizes = {
            name: teacher_shape(name, teacher).dimension
            for name, teacher in config.data.teachers.items()
        }
        for objective in stage.objectives:
            wanted = config.objectives.get(objective, {}).get("teachers")
            if isinstance(wanted, Mapping) and dict(wanted) != {
                name: sizes.get(name) for name in wanted
            }:
                raise ConfigurationError(
                    f"objectives.{objective}.teachers={dict(wanted)}: expected some of "
                    f"data.teachers with their dimensions, {sizes}"
                )

    def make(self, context: ArtifactContext) -> JsonObject:
        """Write the table or the index; return its statistics. Collective."""
        given = context.config.data.teachers
        return (
            build_teachers(context.parallel, given, context.folder / TEACHERS)
            if given
            else super().make(context)
        )


class CoOccurrence(FromHistories):
    """Pairs of items that the same users used."""

    kind = "co_occurrence"


def make_artifacts(
    embedder: Embedder, stage_name: str, stage: StageConfig, folder: Path
) -> dict[str, JsonObject]:
    """Write the stage's artifacts below `folder`; return the statistics of each. Collective.

    Raises ConfigurationError where no data set reads an artifact, or where it is not clear which
    histories make it.
    """
    context = ArtifactContext(embedder, stage_name, stage, folder)
    return {
        artifact.name: artifact.make(context)
        for artifact in stage_artifacts(context.config, stage_name)
    }


def timed_set(config: Config, stage: StageConfig, artifact: str) -> str | None:
    """Return the name of the data set whose timed events an artifact is made from; None: it is
    made from recorded histories.
    """
    name = next(iter(artifact_sets(config, stage, artifact)), None)
    return name if name is not None and config.data.sets[name].interests is not None else None


def _history_view(config: Config, name: str) -> ViewConfig:
    view = next(
        (view for view in config.data.sets[name].views.values() if view.of == "history"), None
    )
    if view is None:
        raise ConfigurationError(
            f"data.sets.{name}.views: none is `of: history`; a set of sequences needs one"
        )
    return view


def histories_of(config: Config, stage_name: str, stage: StageConfig, artifact: str) -> str:
    """Name of the data set whose training histories an artifact is made from.

    Raises ConfigurationError where that is not clear.
    """
    return source_of_histories(config, _catalogue(config, stage_name, stage, artifact))


def _catalogue(config: Config, stage_name: str, stage: StageConfig, artifact: str) -> str:
    """The items data set that an artifact is about."""
    key = f"stages.{stage_name}.artifacts"
    if artifact == "teachers":
        about = {config.data.sets[name].catalogue or name for name in stage.data}
        recorded = {
            found.catalogue for found in config.data.sets.values() if found.kind == "sequences"
        }
        found = sorted(about & {name for name in recorded if name is not None})
        if len(found) != 1:
            raise ConfigurationError(
                f"{key}: teachers need one catalogue with histories among the stage's data, found "
                f"{', '.join(found) or 'none'}"
            )
        return found[0]
    readers_of = artifact_sets(config, stage, artifact)
    if not readers_of:
        raise ConfigurationError(
            f"{key}: no data set has `shards: {ARTIFACT}{artifact}`; add one to data.sets, or "
            "leave the artifact out"
        )
    catalogue = config.data.sets[readers_of[0]].catalogue
    if catalogue is None:
        raise ConfigurationError(
            f"data.sets.{readers_of[0]}.catalogue is missing: expected the items data set that its "
            "ids refer to"
        )
    return catalogue


def _timed(embedder: Embedder, name: str, folder: Path) -> JsonObject:
    run = embedder.context
    dataset = run.config.data.sets[name]
    assert dataset.catalogue is not None, "sequences have a catalogue"
    catalogue = run.readers[dataset.catalogue]
    content = _content(embedder, catalogue, _history_view(run.config, name))
    return make_timed_interests(
        run.parallel, name, dataset, catalogue, folder, content, seed=run.config.seed
    )


def _content(embedder: Embedder, catalogue: RecordReader, view: ViewConfig) -> ContentVectors:
    """Return unit vectors of catalogue items as the view shows them; an item that it cannot show
    has zeros.
    """

    def embed(positions: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        rows = embedder.rows(catalogue, replace(view, of="item"), positions)
        vectors = np.where(rows.valid[:, None], unit_rows(rows.fused.numpy()), 0.0).astype(
            np.float32
        )
        return lambda wanted: vectors[np.searchsorted(positions, wanted)]

    return embed


def _make(
    artifact: str,
    stage: StageConfig,
    embedder: Embedder,
    reader: RecordReader,
    histories: Histories,
    folder: Path,
) -> JsonObject:
    assert reader.catalogue is not None
    config, parallel = embedder.context.config, embedder.context.parallel
    catalogue, used = reader.catalogue, histories.used()
    if artifact == "interests":
        name = artifact_sets(config, stage, artifact)[0]
        dataset = config.data.sets[name]
        view = _history_view(config, name)
        content = embedder.rows(catalogue, replace(view, of="item"), used).fused.numpy()

        def interests() -> JsonObject:
            found = sequences(
                histories, used, content, length=dataset.history_length, seed=config.seed
            )
            ids = dict(zip(used.tolist(), catalogue.ids(used), strict=True))
            others = (
                catalogue.ids(np.setdiff1d(catalogue.positions("train"), used))
                if dataset.negatives
                else []
            )
            written = records(
                found, ids, negatives=dataset.negatives, unused=others, seed=config.seed
            )
            write_artifact(written, folder / artifact, artifact)
            return {"sequences": len(found), "kind": "unordered", "rules": rules_count(found)}

        return on_main(parallel, "artifact interests", interests)

    def pairs() -> JsonObject:
        found, scores = co_occurrence(histories.matrix(used))
        write_artifact(
            pair_records(found, scores, catalogue.ids(used)), folder / artifact, artifact
        )
        return {"pairs": len(found)}

    def teachers() -> JsonObject:
        matrix = histories.matrix(used)
        vectors = {
            name: factorise(matrix, name, TEACHER_DIMENSIONS, config.seed).astype(np.float32)
            for name in FACTORISATIONS
        }
        TeacherTable(catalogue.ids(used), vectors).save(folder / TEACHERS_FILE)
        return {
            "items": len(used),
            "dimensions": {name: matrix.shape[1] for name, matrix in vectors.items()},
        }

    return on_main(
        parallel, f"artifact {artifact}", pairs if artifact == "co_occurrence" else teachers
    )
