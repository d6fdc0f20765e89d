"""A stage's start: everything it trains on, made from the model as it is then, and read back when a run is continued.

In this order, because each step may use the one before: artifacts (sequences, teachers, pairs) -> their data sets are
opened -> weights by balancing -> subsets -> hard negatives within the subsets. Rank 0 writes each file whole or not at
all, `state.json` last; then every rank reads the same files, as a resumed run does: a resumed stage computes nothing.

    runs/NAME/curriculum/STAGE/   state.json  subsets.npz  teachers.npz  interests/  co_occurrence/
                                  hard_negatives-00000000.npz (number: the stage's step at which they were mined)
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sailplan.config.schema import ARTIFACT, BalanceConfig, Config, StageConfig
from sailplan.curriculum.artifacts import TEACHERS_FILE, histories_of, make_artifacts
from sailplan.curriculum.balance import Balance, Summary, balance, with_floor
from sailplan.curriculum.hard_negatives import check_minable, chosen_patterns, matched, mine
from sailplan.curriculum.kinds import embed_kinds, pattern_views, summarise, summarise_benchmark
from sailplan.curriculum.subset import drop_lowest, keep_highest, nearness
from sailplan.data.datasets import open_datasets
from sailplan.data.negatives import HardNegativeStore, save_arrays
from sailplan.data.reader import RecordReader
from sailplan.data.teachers import TeacherTable
from sailplan.embed.embedder import Embedder
from sailplan.embed.scoring import unit
from sailplan.errors import ConfigurationError
from sailplan.runtime.files import write_whole
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel

STATE, SUBSETS = "state.json", "subsets.npz"


@dataclass
class StageState:
    """What a stage trains on besides the configuration."""

    weights: dict[str, float]  # data set -> sampling weight
    subsets: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # data set -> sorted record positions; others: the train split
    readers: dict[str, RecordReader] = field(default_factory=dict)  # the data sets that the stage made
    negatives: HardNegativeStore | None = None
    teachers: TeacherTable | None = None
    thresholds: dict[str, float] = field(default_factory=dict)  # "DATASET/PATTERN" -> lambda*, where in-batch masking is on
    told: dict[str, Any] = field(default_factory=dict)  # the content of state.json


def check_stage(name: str, stage: StageConfig, config: Config) -> None:
    """Raises ConfigurationError for what the configuration alone says a stage's start cannot make: said before the run, which may
    be days before that start."""
    for dataset in stage.data:
        shards = config.data.sets[dataset].shards
        if shards.startswith(ARTIFACT) and shards.removeprefix(ARTIFACT) not in stage.artifacts:
            raise ConfigurationError(f"stages.{name}.data.{dataset}: its shards are {shards}; list that in stages.{name}.artifacts")
    for artifact in stage.artifacts:
        histories_of(config, name, stage, artifact)
    for dataset in stage.subset.sets if stage.subset is not None else ():
        if dataset not in stage.data:
            raise ConfigurationError(f"stages.{name}.subset.sets: found {dataset}; expected data sets of the stage: {', '.join(stage.data)}")
    if stage.hard_negatives is not None:
        for dataset, patterns in chosen_patterns(stage.hard_negatives, stage.data, config.data.sets).items():
            check_minable(dataset, config.data.sets[dataset], patterns)


def prepare_stage(
    stage_name: str,
    stage: StageConfig,
    encoder: nn.Module,
    objectives: Mapping[str, nn.Module] | nn.ModuleDict,
    readers: Mapping[str, RecordReader],
    config: Config,
    parallel: Parallel,
    folder: Path,
) -> StageState:
    """Computes and saves a stage's data below `folder`. Collective; the same result on all ranks.

    readers: all data sets with recorded shards; those of earlier stages' artifacts may be among them. Raises
    ConfigurationError for settings that the data cannot serve, SailplanError on all ranks when rank 0 cannot write.
    """
    began, embedder = time.monotonic(), Embedder(encoder, parallel, config)
    told: dict[str, Any] = {"stage": stage_name}
    check_stage(stage_name, stage, config)
    on_main(parallel, f"stage {stage_name}: clearing {folder}", lambda: _clear(folder))
    if stage.artifacts:
        told["artifacts"] = make_artifacts(stage_name, stage, embedder, readers, folder)
    readers = {**readers, **_artifact_readers(stage, config, folder)}
    needed = stage.balance is not None or (stage.subset is not None and stage.subset.nearest is not None)
    settings = stage.balance or BalanceConfig()
    benchmark = summarise_benchmark(encoder, readers, settings, parallel, config, embedder) if needed else {}
    told["weights"] = dict(stage.data)
    if stage.balance is not None:
        found = balance_sets(stage, encoder, readers, benchmark, settings, parallel, config, embedder)
        told["weights"] = with_floor(found.weights, stage.data)
        told["balance"] = {name: {**pairs, "mean": found.scores[name]} for name, pairs in found.pairs.items()}
        told["balance_kinds"], told["balance_weights"] = found.kinds, found.weights
    subsets = _subsets(stage, embedder, readers, benchmark)
    told["subsets"] = {name: len(kept) for name, kept in subsets.items()}
    told["subsets_of"] = {name: len(readers[name].positions("train")) for name in subsets}
    if stage.hard_negatives is not None:
        told |= _mine(stage, embedder, readers, folder, subsets, step=0)
    told["seconds"] = round(time.monotonic() - began, 2)

    def publish() -> None:
        save_arrays(folder / SUBSETS, dict(subsets))
        _write_state(folder, told)

    on_main(parallel, f"stage {stage_name}: saving {folder}", publish)
    return load_stage(folder, 0, readers, config, stage)


def load_stage(folder: Path, done: int, readers: Mapping[str, RecordReader], config: Config, stage: StageConfig | None = None) -> StageState:
    """Reads what `prepare_stage` and `refresh_hard_negatives` saved, as it was when `done` steps of the stage were done.

    stage: the stage's configuration; None: `config.stages` under the folder's name. Raises ConfigurationError where the
    folder has no complete state: the run folder was damaged or moved in part.
    """
    stage = stage or config.stages[folder.name]
    if not (folder / STATE).is_file():
        raise ConfigurationError(f"{folder}: no {STATE}; the run folder is not complete: restore it, or train under another name")
    told = json.loads((folder / STATE).read_text(encoding="utf-8"))
    with np.load(folder / SUBSETS) as arrays:
        subsets = {name: arrays[name] for name in arrays.files}
    mined = {int(match[1]): path for path in folder.glob("hard_negatives-*.npz") if (match := re.fullmatch(r"hard_negatives-(\d+)\.npz", path.name))}
    last = max((step for step in mined if step <= done), default=None)
    negatives = HardNegativeStore.load(mined[last]) if last is not None else None
    masked = negatives is not None and stage.hard_negatives is not None and stage.hard_negatives.mask_in_batch
    return StageState(
        weights=told["weights"],
        subsets=subsets,
        readers=_artifact_readers(stage, config, folder),
        negatives=negatives,
        teachers=TeacherTable.load(folder / TEACHERS_FILE) if (folder / TEACHERS_FILE).is_file() else None,
        thresholds=dict(negatives.thresholds) if masked and negatives is not None else {},
        told=told,
    )


def refresh_hard_negatives(
    state: StageState,
    done: int,
    stage: StageConfig,
    encoder: nn.Module,
    readers: Mapping[str, RecordReader],
    config: Config,
    parallel: Parallel,
    folder: Path,
) -> StageState:
    """Mines again with the model after `done` steps of the stage; the state with the new negatives and thresholds. Collective."""
    embedder = Embedder(encoder, parallel, config)
    told = state.told | _mine(stage, embedder, {**readers, **state.readers}, folder, state.subsets, step=done)
    on_main(parallel, f"saving {folder / STATE}", lambda: _write_state(folder, told))
    fresh = load_stage(folder, done, readers, config, stage)
    return replace(fresh, readers=state.readers)


def balance_sets(
    stage: StageConfig,
    encoder: nn.Module,
    readers: Mapping[str, RecordReader],
    benchmark: dict[str, Summary],
    settings: BalanceConfig,
    parallel: Parallel,
    config: Config,
    embedder: Embedder | None = None,
) -> Balance:
    """Similarities of the stage's data sets to the benchmark and the weights they give. Collective.

    embedder: one that has embedded with this encoder already, to save work.
    """
    embedder = embedder or Embedder(encoder, parallel, config)
    views = {name: pattern_views(readers[name], _patterns(stage, readers[name])) for name in stage.data}
    training = {name: summarise(embedder, readers[name], views[name], readers[name].positions("train"), settings, name) for name in stage.data}
    return balance(training, benchmark, settings)


# ---------------------------------------------------------------- parts
def _artifact_readers(stage: StageConfig, config: Config, folder: Path) -> dict[str, RecordReader]:
    """Readers of the stage's data sets whose shards are artifacts that it made."""
    made: dict[str, Path] = {name: folder / name for name in stage.artifacts if (folder / name).is_dir()}
    wanted = [name for name in stage.data if config.data.sets[name].shards in {ARTIFACT + artifact for artifact in made}]
    opened = open_datasets(config, made, wanted)
    return {name: opened[name] for name in wanted}


def _patterns(stage: StageConfig, reader: RecordReader) -> list[str]:
    return stage.patterns.get(reader.name) or list(reader.config.patterns)


def _subsets(
    stage: StageConfig, embedder: Embedder, readers: Mapping[str, RecordReader], benchmark: dict[str, Summary]
) -> dict[str, NDArray[np.int64]]:
    subset = stage.subset
    if subset is None:
        return {}
    result = {}
    for name in subset.sets or list(stage.data):
        reader, patterns = readers[name], _patterns(stage, readers[name])
        positions = reader.positions("train")
        if subset.nearest is not None:
            wanted = {kind for summary in benchmark.values() for kind in summary}
            rows = embed_kinds(embedder, reader, pattern_views(reader, patterns), positions, wanted)
            vectors = {kind: np.where(found.valid[:, None], found.fused.numpy(), 0.0) for kind, found in rows.items()}
            scores = nearness(vectors, list(benchmark.values()))
            if scores is not None:
                positions = keep_highest(positions, scores, subset.nearest)
        if subset.drop_noisy is not None:
            pattern = reader.config.patterns[patterns[0]]
            sides = [embedder.rows(reader, view, positions) for view in (pattern.query, pattern.target)]
            own = (unit(sides[0].fused) * unit(sides[1].fused)).sum(1)
            own = torch.where(torch.from_numpy(sides[0].valid & sides[1].valid), own, torch.nan)
            positive = matched(reader, positions)  # a low cosine of a pair that is graded low is no noise
            kept = drop_lowest(positions[positive], own.numpy()[positive], subset.drop_noisy)
            positions = np.sort(np.concatenate([kept, positions[~positive]]))
        result[name] = positions
    return result


def _mine(
    stage: StageConfig, embedder: Embedder, readers: Mapping[str, RecordReader], folder: Path, subsets: Mapping[str, NDArray[np.int64]], step: int
) -> dict[str, Any]:
    assert stage.hard_negatives is not None
    config, parallel = embedder.config, embedder.parallel
    patterns = chosen_patterns(stage.hard_negatives, stage.data, config.data.sets)
    found = mine(embedder.encoder, readers, patterns, stage.hard_negatives, parallel, config, subsets, embedder)
    path = folder / f"hard_negatives-{step:08d}.npz"
    on_main(parallel, f"saving {path}", lambda: found.store.save(path))
    return {
        "mined_at": step,
        "thresholds": {key: threshold.as_dict() for key, threshold in found.thresholds.items()},
        "mined": {key: {"with_negatives": int((table >= 0).any(1).sum())} for key, table in found.store.positions.items()},
        "examples": found.examples,
    }


def _clear(folder: Path) -> None:
    """Removes what an attempt that was given up left: its refreshed negatives must not be taken for this one's."""
    for path in [folder / STATE, folder / SUBSETS, folder / TEACHERS_FILE, *folder.glob("hard_negatives-*.npz")]:
        path.unlink(missing_ok=True)


def _write_state(folder: Path, told: dict[str, Any]) -> None:
    write_whole(folder / STATE, json.dumps(told, ensure_ascii=False, indent=1))
