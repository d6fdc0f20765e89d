"""A stage's start: everything it trains on, made from the model as it is then, and read back
when a run is continued.

In this order, because each step may use the one before: artifacts (sequences, teachers, pairs) ->
their data sets are opened -> weights by balancing -> subsets -> hard negatives within the subsets.
The ranks share the work and write what they own; `state.json` comes last, then every rank reads the
same files, as a resumed run does: a resumed stage computes nothing. A start that was stopped or
killed goes on with the steps, shards and blocks that are done, if model and settings are the same.

    runs/NAME/curriculum/STAGE/   state.json  subsets/SET.npy  teachers.npz or teachers/  interests/
                                  co_occurrence/
                                  hard_negatives/   rounds of mining, see `curriculum.rounds`
                                  begun.json  made-*.json  vectors/   while it is being prepared
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sailplan.config.fields import JsonObject
from sailplan.config.schema import ARTIFACT, BalanceConfig, Config, PatternKey, StageConfig
from sailplan.curriculum.artifact import stage_artifacts
from sailplan.curriculum.artifacts import TEACHERS, TEACHERS_FILE, make_artifacts
from sailplan.curriculum.balance import Balance, Summary, balance, by_size, with_floor
from sailplan.curriculum.hard_negatives import check_minable, chosen_patterns, matched, mine
from sailplan.curriculum.judge import judge_of
from sailplan.curriculum.kinds import (
    KindTables,
    kind_tables,
    pattern_views,
    replicates,
    summarise_benchmark,
)
from sailplan.curriculum.mined_files import read_mined
from sailplan.curriculum.rounds import Rounds
from sailplan.curriculum.subset import PART, Scores, keep_highest, nearness
from sailplan.data.datasets import open_datasets
from sailplan.data.negatives import HardNegativeStore, MatchThreshold
from sailplan.data.reader import RecordReader
from sailplan.data.teacher_files import MANIFEST, TeacherFiles
from sailplan.data.teachers import Teachers, TeacherTable
from sailplan.embed.context import RunContext
from sailplan.embed.embedder import Embedder
from sailplan.embed.selection import Positions, SplitPositions
from sailplan.embed.sides import unit
from sailplan.embed.table import EmbeddedTable, SequentialTable
from sailplan.errors import ConfigurationError
from sailplan.runtime.arrays import SharedArray
from sailplan.runtime.files import write_whole
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import apart

STATE, SUBSETS, ROUNDS, VECTORS = "state.json", "subsets", "hard_negatives", "vectors"
JUDGE = "balance_vectors"  # of the model that `balance.initialise_from` names
BEGUN, FORMER_SUBSETS = "begun.json", "subsets.npz"


@dataclass(frozen=True)
class StageState:
    """What a stage trains on besides the configuration."""

    weights: dict[str, float]  # data set -> sampling weight
    subsets: dict[str, NDArray[np.int64]] = field(
        default_factory=dict
    )  # data set -> sorted record positions; others: the train split
    negatives: HardNegativeStore | None = None
    teachers: Teachers | None = None
    thresholds: dict[PatternKey, MatchThreshold] = field(
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

    Goes on with what a start that was stopped or killed left of the same model and settings. The
    context's readers must hold all data sets with recorded shards, and get those that the stage
    makes. Raises
    ConfigurationError for settings that the data cannot serve, SailplanError on all ranks when rank
    0 cannot write.
    """
    began, stage, parallel = time.monotonic(), context.config.stages[name], context.parallel
    check_stage(name, stage, context.config)
    readers = context.readers
    embedder = Embedder(replace(context, store=folder / VECTORS))
    about = {
        "model": embedder.store.folder.name,
        "stage": json.loads(json.dumps(asdict(stage), default=str)),
        "benchmark": {
            task: json.loads(json.dumps(asdict(context.config.evaluation.tasks[task]), default=str))
            for task in context.config.evaluation.benchmark
        },
        "seed": context.config.seed,
    }
    on_main(parallel, f"stage {name}: looking into {folder}", lambda: _begin(folder, about))
    stats: JsonObject = {"stage": name}

    def artifacts() -> JsonObject:
        return make_artifacts(embedder, name, stage, folder)

    if stage.artifacts:
        stats["artifacts"] = _once(parallel, folder, "artifacts", artifacts)
    _open_artifacts(context.config, readers, stage, folder)
    settings = stage.balance or BalanceConfig()
    own = settings.initialise_from is None
    needed = (stage.balance is not None and stage.balance.weights == "similarity" and own) or (
        stage.subset is not None and stage.subset.nearest is not None
    )
    benchmark = summarise_benchmark(embedder, settings) if needed else {}
    stats["weights"] = dict(stage.data)
    if stage.balance is not None:
        stats |= _once(
            parallel,
            folder,
            "balance",
            lambda: _balanced(embedder, stage, benchmark, settings, folder / JUDGE),
        )
    subsets = _subsets(embedder, stage, benchmark, folder / SUBSETS)
    stats["subsets"] = {dataset: len(kept) for dataset, kept in subsets.items()}
    stats["subset_files"] = {
        dataset: Path(str(kept.filename)).name  # type: ignore[attr-defined]
        for dataset, kept in subsets.items()
    }
    stats["subsets_of"] = {dataset: readers[dataset].count("train") for dataset in subsets}
    if stage.hard_negatives is not None:
        stats |= _mine(embedder, stage, folder, subsets, step=0)
    stats["seconds"] = round(time.monotonic() - began, 2)

    def publish() -> None:
        _write_state(folder, stats)
        for made in folder.glob("made-*.json"):
            made.unlink()
        for scores in (folder / SUBSETS).glob("scores-*"):
            shutil.rmtree(scores)

    on_main(parallel, f"stage {name}: saving {folder}", publish)
    embedder.close()
    return load_stage(context.config, context.readers, name, folder, 0)


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
    negatives = None
    if stage.hard_negatives is not None:
        found = _last_round(folder, done)
        if found is None:
            raise ConfigurationError(
                f"{folder / ROUNDS}: found no round up to step {done} of the stage, expected the one "
                "that it trained on; go on from a newer checkpoint, or train under another name"
            )
        negatives = HardNegativeStore.load(found)
    _open_artifacts(config, readers, stage, folder)
    masked = (
        negatives is not None
        and stage.hard_negatives is not None
        and stage.hard_negatives.mask_in_batch
    )
    if negatives is not None and masked:
        _check_prefixes(config, name, negatives.thresholds)
    return StageState(
        weights=stats["weights"],
        subsets=_load_subsets(folder, stats),
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

    A refresh that was stopped or killed leaves the last round in force, and is gone on with.
    """
    embedder = Embedder(replace(context, store=folder / VECTORS))
    stage = context.config.stages[name]
    stats = state.stats | _mine(embedder, stage, folder, state.subsets, step=done)
    on_main(context.parallel, f"saving {folder / STATE}", lambda: _write_state(folder, stats))
    embedder.close()
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


def _once(
    parallel: Parallel, folder: Path, what: str, work: Callable[[], JsonObject]
) -> JsonObject:
    """Return what `work` returned, now or in a start before this one. Collective."""
    note = folder / f"made-{what}.json"
    known = on_main(
        parallel,
        f"looking for {note}",
        lambda: json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None,
    )
    if known is not None:
        return dict(known)
    found = work()
    on_main(parallel, f"writing {note}", lambda: write_whole(note, json.dumps(found)))
    return found


def _balanced(
    embedder: Embedder,
    stage: StageConfig,
    benchmark: dict[str, Summary],
    settings: BalanceConfig,
    folder: Path,
) -> JsonObject:
    judge = judge_of(embedder, settings, folder)
    if judge is not embedder:
        benchmark = summarise_benchmark(judge, settings)
    found = balance_sets(judge, stage, benchmark, settings)
    if judge is not embedder:
        judge.close()
    similar = settings.weights == "similarity"
    return {
        "balance_model": (settings.initialise_from or "the run's own") if similar else None,
        "weights": with_floor(found.weights, stage.data, settings.floor),
        "balance": {
            dataset: {**pairs, "mean": found.scores[dataset]}
            | ({"error": found.errors[dataset]} if dataset in found.errors else {})
            for dataset, pairs in found.pairs.items()
        },
        "balance_kinds": found.kinds,
        "balance_weights": found.weights,
    }


def _subsets(
    embedder: Embedder, stage: StageConfig, benchmark: dict[str, Summary], folder: Path
) -> dict[str, NDArray[np.int64]]:
    subset, readers = stage.subset, embedder.context.readers
    if subset is None:
        return {}
    parallel, result = embedder.context.parallel, {}
    for name in subset.sets or list(stage.data):
        reader, patterns = readers[name], _patterns(stage, readers[name])
        positions: Positions = SplitPositions(reader, "train")
        if subset.nearest is not None:
            wanted = {kind for summary in benchmark.values() for kind in summary}
            views = pattern_views(reader, patterns)
            tables = kind_tables(embedder, reader, views, positions, wanted)
            if any(kind in summary for kind in tables for summary in benchmark.values()):

                def near(start: int, stop: int, tables: KindTables = tables) -> Scores:
                    found = nearness(tables.vectors(start, stop), list(benchmark.values()))
                    assert found is not None, "a kind is shared"
                    return found

                positions = keep_highest(
                    parallel, positions, near, subset.nearest, folder, f"{name}.nearest"
                )
        if subset.drop_noisy is not None:
            pattern = reader.config.patterns[patterns[0]]
            left, right = (
                embedder.table(reader, view, positions) for view in (pattern.query, pattern.target)
            )

            def clean(
                start: int,
                stop: int,
                reader: RecordReader = reader,
                sides: tuple[EmbeddedTable | SequentialTable, EmbeddedTable | SequentialTable] = (
                    left,
                    right,
                ),
            ) -> Scores:
                query, target = (side.read(start, stop) for side in sides)
                own = (unit(query.fused) * unit(target.fused)).sum(1).numpy()
                own[~(query.valid & target.valid)] = -np.inf
                # A low cosine of a pair that is graded low is no noise
                own[~matched(reader, query.positions)] = np.nan
                return own

            keep = 1.0 - subset.drop_noisy
            positions = keep_highest(parallel, positions, clean, keep, folder, f"{name}.clean")
        result[name] = _listed(parallel, positions, folder, name)
    return result


def _listed(parallel: Parallel, positions: Positions, folder: Path, name: str) -> NDArray[np.int64]:
    """Return a subset mapped from its file, which a set that keeps all records gets, too."""
    if isinstance(positions, np.memmap):
        return positions
    array = SharedArray(folder / f"{name}.npy", (len(positions),), "int64")
    on_main(parallel, f"making {array.path}", array.create)

    def write() -> None:
        for start in range(parallel.rank * PART, len(positions), parallel.world_size * PART):
            array.write(start, positions[start : start + PART])

    apart(parallel, f"writing {array.path}", write)
    return np.load(array.path, mmap_mode="r")  # type: ignore[no-any-return]


def _load_subsets(folder: Path, stats: JsonObject) -> dict[str, NDArray[np.int64]]:
    if (folder / FORMER_SUBSETS).is_file():
        with np.load(folder / FORMER_SUBSETS) as arrays:
            return {dataset: arrays[dataset] for dataset in arrays.files}
    return {
        dataset: np.load(folder / SUBSETS / file, mmap_mode="r")
        for dataset, file in stats.get("subset_files", {}).items()
    }


def _last_round(folder: Path, done: int) -> Path | None:
    """Return the round in force after `done` steps; of a run of version 0.1.0 its file."""
    former = {
        int(match[1]): path
        for path in folder.glob("hard_negatives-*.npz")
        if (match := re.fullmatch(r"hard_negatives-(\d+)\.npz", path.name))
    }
    last = max((step for step in former if step <= done), default=None)
    return Rounds(folder / ROUNDS).last(done) or (former[last] if last is not None else None)


def _mine(
    embedder: Embedder,
    stage: StageConfig,
    folder: Path,
    subsets: Mapping[str, NDArray[np.int64]],
    step: int,
) -> JsonObject:
    hard, run, rounds = stage.hard_negatives, embedder.context, Rounds(folder / ROUNDS)
    assert hard is not None
    patterns = chosen_patterns(hard, stage.data, run.config.data.sets)
    if hard.from_folder is not None and step == 0:
        source = Path(hard.from_folder)
        found = read_mined(run.parallel, run.readers, patterns, hard.per_query, source, rounds)
    else:
        found = mine(embedder, patterns, hard, rounds, step, subsets)
    return {
        "mined_at": step,
        "thresholds": {key: pattern["threshold"] for key, pattern in found.items()},
        "prefix_thresholds": {key: pattern["prefixes"] for key, pattern in found.items()},
        "mined": {
            key: {"with_negatives": pattern["with_negatives"]} for key, pattern in found.items()
        },
        "examples": {key: pattern["examples"] for key, pattern in found.items()},
    }


def _check_prefixes(
    config: Config, stage: str, thresholds: Mapping[PatternKey, MatchThreshold]
) -> None:
    """Raise ConfigurationError where negatives of another model have no lambda* of a prefix that
    the loss is paid at.
    """
    shorter = {size for size in config.model.prefixes if size < config.model.embedding}
    for key, found in thresholds.items():
        if found.prefixes is not None and shorter - set(found.prefixes):
            raise ConfigurationError(
                f"stages.{stage}.hard_negatives.mask_in_batch: found lambda* of {key} at "
                f"{', '.join(map(str, sorted(found.prefixes))) or 'the full size alone'}, expected "
                f"model.prefixes, {', '.join(map(str, sorted(shorter)))}; mine with these prefixes, "
                "or set mask_in_batch=false"
            )


def _teachers(folder: Path) -> Teachers | None:
    if (folder / TEACHERS / MANIFEST).is_file():
        return TeacherFiles(folder / TEACHERS)
    return TeacherTable.load(folder / TEACHERS_FILE) if (folder / TEACHERS_FILE).is_file() else None


def _begin(folder: Path, about: JsonObject) -> None:
    """Keep what a start before this one left of the same model and settings; remove all else:
    refreshed negatives of an attempt that was given up must not be taken for this one's.
    """
    note = folder / BEGUN
    same = note.is_file() and json.loads(note.read_text(encoding="utf-8")) == about
    if not same or (folder / STATE).is_file():
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name in (VECTORS, JUDGE):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_whole(note, json.dumps(about))


def _write_state(folder: Path, stats: JsonObject) -> None:
    write_whole(folder / STATE, json.dumps(stats, ensure_ascii=False, indent=1))
