"""A stage's start: everything it trains on, made from the model as it is then, and read back
when a run is continued.

In this order, because each step may use the one before: artifacts (sequences, teachers, pairs) ->
their data sets are opened -> weights by balancing -> subsets -> hard negatives within the subsets.
Rank 0 writes each file whole or not at all, `state.json` last; then every rank reads the same
files, as a resumed run does: a resumed stage computes nothing.

    runs/NAME/curriculum/STAGE/   state.json  subsets.npz  teachers.npz or teachers/  interests/
    co_occurrence/
                                  hard_negatives-00000000.npz (number: the stage's step at which
                                  they were mined)
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sailplan.config.fields import JsonObject
from sailplan.config.schema import ARTIFACT, BalanceConfig, Config, PatternKey, StageConfig
from sailplan.curriculum.artifact import stage_artifacts
from sailplan.curriculum.artifacts import TEACHERS, TEACHERS_FILE, make_artifacts
from sailplan.curriculum.balance import Balance, Summary, balance, by_size, with_floor
from sailplan.curriculum.hard_negatives import check_minable, chosen_patterns, matched, mine
from sailplan.curriculum.kinds import embed_kinds, pattern_views, replicates, summarise_benchmark
from sailplan.curriculum.subset import drop_lowest, keep_highest, nearness
from sailplan.data.datasets import open_datasets
from sailplan.data.negatives import HardNegativeStore, save_arrays
from sailplan.data.reader import RecordReader
from sailplan.data.teacher_files import MANIFEST, TeacherFiles
from sailplan.data.teachers import Teachers, TeacherTable
from sailplan.embed.context import RunContext
from sailplan.embed.embedder import Embedder
from sailplan.embed.scoring import unit
from sailplan.errors import ConfigurationError
from sailplan.runtime.files import write_whole
from sailplan.runtime.main_rank import on_main

STATE, SUBSETS = "state.json", "subsets.npz"


@dataclass
class StageState:
    """What a stage trains on besides the configuration."""

    weights: dict[str, float]  # data set -> sampling weight
    subsets: dict[str, NDArray[np.int64]] = field(
        default_factory=dict
    )  # data set -> sorted record positions; others: the train split
    negatives: HardNegativeStore | None = None
    teachers: Teachers | None = None
    thresholds: dict[PatternKey, float] = field(
        default_factory=dict
    )  # lambda*, where in-batch masking is on
    stats: JsonObject = field(default_factory=dict)  # the content of state.json


def check_stage(name: str, stage: StageConfig, config: Config) -> None:
    """Raise ConfigurationError for what the configuration alone says a stage's start cannot
    make: said before the run, which may
    be days before that start."""
    for dataset in stage.data:
        shards = config.data.sets[dataset].shards
        if shards.startswith(ARTIFACT) and shards.removeprefix(ARTIFACT) not in stage.artifacts:
            raise ConfigurationError(
                f"stages.{name}.data.{dataset}: its shards are {shards}; list that in "
                f"stages.{name}.artifacts"
            )
    stage_artifacts(config, name)
    for dataset in stage.subset.sets if stage.subset is not None else ():
        if dataset not in stage.data:
            raise ConfigurationError(
                f"stages.{name}.subset.sets: found {dataset}; expected data sets of the stage: "
                f"{', '.join(stage.data)}"
            )
    if stage.hard_negatives is not None:
        for dataset, patterns in chosen_patterns(
            stage.hard_negatives, stage.data, config.data.sets
        ).items():
            check_minable(dataset, config.data.sets[dataset], patterns)


def prepare_stage(context: RunContext, name: str, folder: Path) -> StageState:
    """Compute and save a stage's data below `folder`. Collective; the same result on all ranks.

    The context's readers must hold all data sets with recorded shards, and get those that the stage
    makes. Raises
    ConfigurationError for settings that the data cannot serve, SailplanError on all ranks when rank
    0 cannot write.
    """
    began, embedder, stage = time.monotonic(), Embedder(context), context.config.stages[name]
    parallel, readers = context.parallel, context.readers
    stats: JsonObject = {"stage": name}
    check_stage(name, stage, context.config)
    on_main(parallel, f"stage {name}: clearing {folder}", lambda: _clear(folder))
    if stage.artifacts:
        stats["artifacts"] = make_artifacts(embedder, name, stage, folder)
    _open_artifacts(context.config, readers, stage, folder)
    needed = (stage.balance is not None and stage.balance.weights == "similarity") or (
        stage.subset is not None and stage.subset.nearest is not None
    )
    settings = stage.balance or BalanceConfig()
    benchmark = summarise_benchmark(embedder, settings) if needed else {}
    stats["weights"] = dict(stage.data)
    if stage.balance is not None:
        found = balance_sets(embedder, stage, benchmark, settings)
        stats["weights"] = with_floor(found.weights, stage.data, stage.balance.floor)
        stats["balance"] = {
            dataset: {**pairs, "mean": found.scores[dataset]}
            | ({"error": found.errors[dataset]} if dataset in found.errors else {})
            for dataset, pairs in found.pairs.items()
        }
        stats["balance_kinds"], stats["balance_weights"] = found.kinds, found.weights
    subsets = _subsets(embedder, stage, benchmark)
    stats["subsets"] = {dataset: len(kept) for dataset, kept in subsets.items()}
    stats["subsets_of"] = {dataset: len(readers[dataset].positions("train")) for dataset in subsets}
    if stage.hard_negatives is not None:
        stats |= _mine(embedder, stage, folder, subsets, step=0)
    stats["seconds"] = round(time.monotonic() - began, 2)

    def publish() -> None:
        save_arrays(folder / SUBSETS, dict(subsets))
        _write_state(folder, stats)

    on_main(parallel, f"stage {name}: saving {folder}", publish)
    return load_stage(context.config, readers, name, folder, 0)


def load_stage(
    config: Config, readers: dict[str, RecordReader], name: str, folder: Path, done: int
) -> StageState:
    """Read what `prepare_stage` and `refresh_hard_negatives` saved, as it was when `done` steps
    of the stage were done.

    `readers` gets the data sets that the stage made. Raises ConfigurationError where the folder has
    no complete state: the run folder was damaged or moved in part.
    """
    stage = config.stages[name]
    if not (folder / STATE).is_file():
        raise ConfigurationError(
            f"{folder}: no {STATE}; the run folder is not complete: restore it, or train under "
            "another name"
        )
    stats = json.loads((folder / STATE).read_text(encoding="utf-8"))
    with np.load(folder / SUBSETS) as arrays:
        subsets = {dataset: arrays[dataset] for dataset in arrays.files}
    mined = {
        int(match[1]): path
        for path in folder.glob("hard_negatives-*.npz")
        if (match := re.fullmatch(r"hard_negatives-(\d+)\.npz", path.name))
    }
    last = max((step for step in mined if step <= done), default=None)
    negatives = HardNegativeStore.load(mined[last]) if last is not None else None
    _open_artifacts(config, readers, stage, folder)
    masked = (
        negatives is not None
        and stage.hard_negatives is not None
        and stage.hard_negatives.mask_in_batch
    )
    return StageState(
        weights=stats["weights"],
        subsets=subsets,
        negatives=negatives,
        teachers=_teachers(folder),
        thresholds=dict(negatives.thresholds) if masked and negatives is not None else {},
        stats=stats,
    )


def refresh_hard_negatives(
    context: RunContext, name: str, folder: Path, state: StageState, done: int
) -> StageState:
    """Mine again with the model after `done` steps of the stage; return the state with the new
    negatives and thresholds. Collective.
    """
    stats = state.stats | _mine(
        Embedder(context), context.config.stages[name], folder, state.subsets, step=done
    )
    on_main(context.parallel, f"saving {folder / STATE}", lambda: _write_state(folder, stats))
    return load_stage(context.config, context.readers, name, folder, done)


def balance_sets(
    embedder: Embedder, stage: StageConfig, benchmark: dict[str, Summary], settings: BalanceConfig
) -> Balance:
    """Return the similarities of the stage's data sets to the benchmark and the weights they
    give. Collective.
    """
    readers = embedder.context.readers
    if settings.weights != "similarity":
        return by_size(
            {name: readers[name].count("train") for name in stage.data}, settings.weights
        )
    training = {}
    for name in stage.data:
        training[name] = replicates(
            embedder,
            readers[name],
            pattern_views(readers[name], _patterns(stage, readers[name])),
            settings,
            name,
        )
    return balance(training, benchmark, settings)


# ---------------------------------------------------------------- parts
def _open_artifacts(
    config: Config, readers: dict[str, RecordReader], stage: StageConfig, folder: Path
) -> None:
    """Open the stage's data sets whose shards are artifacts that it made."""
    made: dict[str, Path] = {
        name: folder / name for name in stage.artifacts if (folder / name).is_dir()
    }
    wanted = [
        name
        for name in stage.data
        if config.data.sets[name].shards in {ARTIFACT + artifact for artifact in made}
    ]
    opened = open_datasets(config, made, wanted)
    readers.update({name: opened[name] for name in wanted})


def _patterns(stage: StageConfig, reader: RecordReader) -> list[str]:
    return stage.patterns.get(reader.name) or list(reader.config.patterns)


def _subsets(
    embedder: Embedder, stage: StageConfig, benchmark: dict[str, Summary]
) -> dict[str, NDArray[np.int64]]:
    subset, readers = stage.subset, embedder.context.readers
    if subset is None:
        return {}
    result = {}
    for name in subset.sets or list(stage.data):
        reader, patterns = readers[name], _patterns(stage, readers[name])
        positions = reader.positions("train")
        if subset.nearest is not None:
            wanted = {kind for summary in benchmark.values() for kind in summary}
            rows = embed_kinds(embedder, reader, pattern_views(reader, patterns), positions, wanted)
            vectors = {
                kind: np.where(found.valid[:, None], found.fused.numpy(), 0.0)
                for kind, found in rows.items()
            }
            scores = nearness(vectors, list(benchmark.values()))
            if scores is not None:
                positions = keep_highest(positions, scores, subset.nearest)
        if subset.drop_noisy is not None:
            pattern = reader.config.patterns[patterns[0]]
            sides = [
                embedder.rows(reader, view, positions) for view in (pattern.query, pattern.target)
            ]
            own = (unit(sides[0].fused) * unit(sides[1].fused)).sum(1)
            own = torch.where(torch.from_numpy(sides[0].valid & sides[1].valid), own, torch.nan)
            positive = matched(
                reader, positions
            )  # a low cosine of a pair that is graded low is no noise
            kept = drop_lowest(positions[positive], own.numpy()[positive], subset.drop_noisy)
            positions = np.sort(np.concatenate([kept, positions[~positive]]))
        result[name] = positions
    return result


def _mine(
    embedder: Embedder,
    stage: StageConfig,
    folder: Path,
    subsets: Mapping[str, NDArray[np.int64]],
    step: int,
) -> JsonObject:
    assert stage.hard_negatives is not None
    run = embedder.context
    patterns = chosen_patterns(stage.hard_negatives, stage.data, run.config.data.sets)
    found = mine(embedder, patterns, stage.hard_negatives, subsets)
    path = folder / f"hard_negatives-{step:08d}.npz"
    on_main(run.parallel, f"saving {path}", lambda: found.store.save(path))
    return {
        "mined_at": step,
        "thresholds": {
            str(key): threshold.as_dict() for key, threshold in found.thresholds.items()
        },
        "mined": {
            str(key): {"with_negatives": int((table >= 0).any(1).sum())}
            for key, table in found.store.positions.items()
        },
        "examples": {str(key): examples for key, examples in found.examples.items()},
    }


def _teachers(folder: Path) -> Teachers | None:
    if (folder / TEACHERS / MANIFEST).is_file():
        return TeacherFiles(folder / TEACHERS)
    return TeacherTable.load(folder / TEACHERS_FILE) if (folder / TEACHERS_FILE).is_file() else None


def _clear(folder: Path) -> None:
    """Remove what an attempt that was given up left: its refreshed negatives must not be taken
    for this one's.
    """
    shutil.rmtree(folder / TEACHERS, ignore_errors=True)
    for path in [
        folder / STATE,
        folder / SUBSETS,
        folder / TEACHERS_FILE,
        *folder.glob("hard_negatives-*.npz"),
    ]:
        path.unlink(missing_ok=True)


def _write_state(folder: Path, stats: JsonObject) -> None:
    write_whole(folder / STATE, json.dumps(stats, ensure_ascii=False, indent=1))
