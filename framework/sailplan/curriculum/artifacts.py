"""The artifacts that come with the package: data sets and tables made from the training histories, before a stage starts.

`interests` and `co_occurrence` become webdataset shards in a folder of their own name, read by the same reader as any
data set (`shards: artifact:interests`); `teachers` becomes one table of ID embeddings. All ranks take part where the
model embeds; rank 0 alone computes and writes the rest.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sailplan.config.schema import ARTIFACT, Config, StageConfig
from sailplan.curriculum.artifact import Artifact, ArtifactContext, artifact_sets, stage_artifacts
from sailplan.curriculum.histories import Histories, read_histories, source_of_histories, write_artifact
from sailplan.curriculum.interests import records, sequences, views_count
from sailplan.curriculum.teachers import TEACHERS, co_occurrence, factorise, pair_records
from sailplan.data.reader import RecordReader
from sailplan.data.teachers import TeacherTable
from sailplan.embed.embedder import Embedder
from sailplan.errors import ConfigurationError
from sailplan.runtime.main_rank import on_main

TEACHERS_FILE = "teachers.npz"
TEACHER_DIMENSIONS = 64


class FromHistories(Artifact):
    """Base of the three: made from the recorded training histories over one item corpus."""

    def check(self, config: Config, stage_name: str, stage: StageConfig) -> None:
        """Raise ConfigurationError where no data set reads it, or where it is not clear which histories make it."""
        kind = BUILT_IN[type(self)]
        if self.name != kind:
            raise ConfigurationError(f"artifacts.{self.name}: {type(self).__name__} is made under the name {kind}, expected artifacts.{kind}; rename it")
        histories_of(config, stage_name, stage, self.name)

    def make(self, context: ArtifactContext) -> dict[str, Any]:
        """Write the artifact; return its statistics. Collective."""
        config, stage = context.config, context.stage
        reader = context.readers[histories_of(config, context.stage_name, stage, self.name)]
        histories = read_histories(reader, "train")
        stats: dict[str, Any] = {"users": len(histories.users), "unknown_items": histories.unknown}
        return stats | _make(self.name, stage, context.embedder, reader, histories, context.folder)


class Interests(FromHistories):
    """Sequences of items that explain another item of the same user."""


class Teachers(FromHistories):
    """ID embeddings of items: factors of the user-item matrix."""


class CoOccurrence(FromHistories):
    """Pairs of items that the same users used."""


BUILT_IN: dict[type, str] = {Interests: "interests", Teachers: "teachers", CoOccurrence: "co_occurrence"}


def make_artifacts(embedder: Embedder, stage_name: str, stage: StageConfig, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the stage's artifacts below `folder`; return the statistics of each. Collective.

    Raises ConfigurationError where no data set reads an artifact, or where it is not clear which histories make it.
    """
    context = ArtifactContext(embedder, stage_name, stage, folder)
    return {artifact.name: artifact.make(context) for artifact in stage_artifacts(context.config, stage_name)}


def histories_of(config: Config, stage_name: str, stage: StageConfig, artifact: str) -> str:
    """Name of the data set whose training histories an artifact is made from. Raises ConfigurationError where that is not clear."""
    return source_of_histories(config, _catalogue(config, stage_name, stage, artifact))


def _catalogue(config: Config, stage_name: str, stage: StageConfig, artifact: str) -> str:
    """The items data set that an artifact is about."""
    key = f"stages.{stage_name}.artifacts"
    if artifact == "teachers":
        about = {config.data.sets[name].catalogue or name for name in stage.data}
        recorded = {found.catalogue for found in config.data.sets.values() if found.kind == "sequences"}
        found = sorted(about & {name for name in recorded if name is not None})
        if len(found) != 1:
            raise ConfigurationError(f"{key}: teachers need one catalogue with histories among the stage's data, found {', '.join(found) or 'none'}")
        return found[0]
    readers_of = artifact_sets(config, stage, artifact)
    if not readers_of:
        raise ConfigurationError(f"{key}: no data set has `shards: {ARTIFACT}{artifact}`; add one to data.sets, or leave the artifact out")
    catalogue = config.data.sets[readers_of[0]].catalogue
    if catalogue is None:
        raise ConfigurationError(f"data.sets.{readers_of[0]}.catalogue is missing: expected the items data set that its ids refer to")
    return catalogue


def _make(artifact: str, stage: StageConfig, embedder: Embedder, reader: RecordReader, histories: Histories, folder: Path) -> dict[str, Any]:
    assert reader.catalogue is not None
    config, parallel = embedder.context.config, embedder.context.parallel
    catalogue, used = reader.catalogue, histories.used()
    if artifact == "interests":
        name = artifact_sets(config, stage, artifact)[0]
        dataset = config.data.sets[name]
        view = next((view for view in dataset.views.values() if view.of == "history"), None)
        if view is None:
            raise ConfigurationError(f"data.sets.{name}.views: none is `of: history`; a set of sequences needs one")
        content = embedder.rows(catalogue, replace(view, of="item"), used).fused.numpy()

        def interests() -> dict[str, Any]:
            found = sequences(histories, used, content, length=dataset.history_length, seed=config.seed)
            ids = dict(zip(used.tolist(), catalogue.ids(used), strict=True))
            others = catalogue.ids(np.setdiff1d(catalogue.positions("train"), used)) if dataset.negatives else []
            written = records(found, ids, negatives=dataset.negatives, unused=others, seed=config.seed)
            write_artifact(written, folder / artifact, artifact)
            return {"sequences": len(found), "views": views_count(found)}

        return on_main(parallel, "artifact interests", interests)

    def pairs() -> dict[str, Any]:
        found, scores = co_occurrence(histories.matrix(used))
        write_artifact(pair_records(found, scores, catalogue.ids(used)), folder / artifact, artifact)
        return {"pairs": len(found)}

    def teachers() -> dict[str, Any]:
        matrix = histories.matrix(used)
        vectors = {name: factorise(matrix, name, TEACHER_DIMENSIONS, config.seed).astype(np.float32) for name in TEACHERS}
        TeacherTable(catalogue.ids(used), vectors).save(folder / TEACHERS_FILE)
        return {"items": len(used), "dimensions": {name: matrix.shape[1] for name, matrix in vectors.items()}}

    return on_main(parallel, f"artifact {artifact}", pairs if artifact == "co_occurrence" else teachers)
