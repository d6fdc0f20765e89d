"""Commands that work with a run's checkpoint: `evaluate`, `embed`, `mine`, `balance`, `export`.

All but `export` run on all ranks of the launch, at any layout, whatever layout wrote the
checkpoint; in its place they take an exported folder, such as a merged one. `export` is the work of
one process, also for a tensor-parallel run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sailplan.checkpoint.exported import is_exported
from sailplan.cli.configuration import of_run
from sailplan.config.rules import check, check_device
from sailplan.config.schema import BalanceConfig, Config, StageConfig
from sailplan.data.negatives import HardNegativeStore
from sailplan.data.reader import RecordReader
from sailplan.embed.context import RunContext
from sailplan.embed.embedder import Embedder
from sailplan.errors import EXIT_DONE, ConfigurationError
from sailplan.export.weights import exported_model
from sailplan.runtime.environment import is_main_by_environment, world_size_from_environment
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.session import started
from sailplan.runtime.watch import phase, report_to
from sailplan.train.bundle import ModelBundle, load_whole, newest_checkpoint, open_agreed
from sailplan.train.run_folder import RunFolder


@dataclass(frozen=True)
class _Run:
    command: str
    config: Config
    folder: RunFolder
    checkpoint: Path
    parallel: Parallel
    whole: ModelBundle
    step: int | None  # None: the weights are an exported folder's
    stage: str  # that the checkpoint's step was the last of, so far; "" of an exported folder
    readers: dict[str, RecordReader]

    @property
    def context(self) -> RunContext:
        """Vectors are kept below the run while the command works, apart from other commands'."""
        name = f"{self.folder.vectors.name}-{self.command}"
        return RunContext(
            self.config,
            self.parallel,
            self.whole.encoder,
            self.whole.objectives,
            self.readers,
            self.folder.root / name,
        )


def _check_out(out: str | None, *, file: bool = False) -> None:
    """Makes the folder of --out.

    Raises ConfigurationError where nothing can be written: before the work is done, not after it.
    """
    if out is None or not is_main_by_environment():
        return
    folder = Path(out).parent if file else Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = (
            ""
            if os.access(folder, os.W_OK) and not (file and Path(out).is_dir())
            else "expected a file's name"
            if file
            else "not writable"
        )
    except OSError as error:
        reason = str(error)
    if reason:
        raise ConfigurationError(
            f"--out {out}: cannot be written ({reason}); give a place that can"
        )


def _artifacts(folder: RunFolder, config: Config) -> dict[str, Path]:
    """Folders of the data sets that the run's stages made; a later stage's wins."""
    made = {
        name: folder.curriculum(stage) / name
        for stage in config.order
        for name in config.stages[stage].artifacts
    }
    return {name: path for name, path in made.items() if path.is_dir()}


@contextmanager
def _opened(options: argparse.Namespace, names: Iterable[str] | None = None) -> Iterator[_Run]:
    """names: of the data sets to open, None: all."""
    config, folder = options.config, options.folder
    checkpoint = Path(options.checkpoint) if options.checkpoint else newest_checkpoint(folder)
    if is_exported(checkpoint):
        config = replace(config, model=exported_model(checkpoint))
    check(config, world_size_from_environment())
    check_device(config)
    with started(config.parallel) as parallel:
        report_to(folder.root)
        with phase("reading weights"):
            whole, extra = load_whole(config, parallel, checkpoint)
        readers = open_agreed(config, parallel, _artifacts(folder, config), names)
        with phase(options.command):
            yield _Run(
                options.command,
                config,
                folder,
                checkpoint,
                parallel,
                whole,
                extra.get("step"),
                extra.get("stage", ""),
                readers,
            )


def _say(run: _Run, text: str) -> None:
    if run.parallel.is_main:
        print(text, flush=True)


def evaluate(options: argparse.Namespace) -> int:
    """Prints the tasks' metrics as JSON; those of a checkpoint also go to
    evaluation/step-XXXXXXXX.json of the run.
    """
    from sailplan.evaluate.runner import evaluate as run_tasks
    from sailplan.observe.run_files import write_json

    names = dict.fromkeys(task.dataset for task in options.config.evaluation.tasks.values())
    with _opened(options, names) as run:
        found = run_tasks(run.context)
        if run.parallel.is_main and run.step is not None:
            path = run.folder.evaluation(run.step)
            record = found.as_dict(run.step, run.stage)
            known = (
                json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            )  # of training: tasks left out now keep their results
            write_json(
                path,
                record | {key: known.get(key, {}) | record[key] for key in ("tasks", "examples")},
            )
        _say(run, json.dumps(found.tasks, indent=1))
    return EXIT_DONE


def embed(options: argparse.Namespace) -> int:
    """All records of a view: vectors, ids, and semantic IDs where sizes are given."""
    from sailplan.export.embedding_parts import Part
    from sailplan.export.embeddings import export_embeddings
    from sailplan.export.semantic_ids import parse_sizes

    sizes = parse_sizes("--semantic-ids", options.semantic_ids)
    part = None if options.part is None else Part.parse(options.part)
    if part is not None and sizes:
        raise ConfigurationError(
            "--semantic-ids: found --part beside it, expected all rows; run `sailplan semantic-ids` "
            "when all parts are done"
        )
    if options.shard_rows < 1:
        raise ConfigurationError(
            f"--shard-rows: found {options.shard_rows}, expected at least 1; leave it out for 65536"
        )
    _check_out(options.out)
    if options.dataset not in options.config.data.sets:
        raise ConfigurationError(
            f"--dataset {options.dataset}: expected one of {', '.join(options.config.data.sets)}"
        )
    with _opened(options, [options.dataset]) as run:
        if options.dataset not in run.readers:
            raise ConfigurationError(
                f"--dataset {options.dataset}: made at a stage's start and not in "
                f"{run.folder.root} yet"
            )
        out = (
            Path(options.out)
            if options.out
            else run.folder.root / "embeddings" / options.dataset / options.view
        )
        told = export_embeddings(
            run.whole.encoder,
            run.readers[options.dataset],
            options.view,
            out,
            parallel=run.parallel,
            config=run.config,
            semantic_id_sizes=sizes,
            label=options.label,
            shard_rows=options.shard_rows,
            part=part,
        )
        _say(run, json.dumps(told, indent=1))
    return EXIT_DONE


def mine(options: argparse.Namespace) -> int:
    """Hard negatives of a stage's data sets with the checkpoint's model: ids and scores as parquet
    files in a folder (or positions as an .npz), and the thresholds as JSON.
    """
    from sailplan.curriculum.hard_negatives import chosen_patterns
    from sailplan.curriculum.hard_negatives import mine as mine_patterns
    from sailplan.curriculum.mined_files import write_mined
    from sailplan.curriculum.rounds import Rounds

    _check_out(options.out, file=str(options.out).endswith(".npz"))
    with _opened(options) as run:
        stage = _stage(run.config, options.stage)
        if stage.hard_negatives is None:
            raise ConfigurationError(
                f"stages.{options.stage}.hard_negatives is not set: name a stage that mines"
            )
        patterns = chosen_patterns(stage.hard_negatives, stage.data, run.config.data.sets)
        name = f"hard_negatives-{run.checkpoint.name.removeprefix('step-')}"
        out = Path(options.out) if options.out else run.folder.root / name
        work = out.with_name(f"{out.name}.working")
        embedder = Embedder(replace(run.context, store=work / "vectors"))
        rounds = Rounds(work / "rounds")
        found = mine_patterns(embedder, patterns, stage.hard_negatives, rounds, step=0)
        if out.suffix == ".npz":  # as of version 0.1.0: positions, in one process's memory
            store = HardNegativeStore.load(rounds.path(0))
            on_main(run.parallel, f"writing {out}", lambda: store.save(out))
        else:
            write_mined(run.parallel, run.readers, rounds.path(0), out)
        embedder.close()
        on_main(run.parallel, f"removing {work}", lambda: shutil.rmtree(work, ignore_errors=True))
        _say(
            run,
            json.dumps(
                {
                    "file": str(out),
                    "thresholds": {key: one["threshold"] for key, one in found.items()},
                },
                indent=1,
            ),
        )
    return EXIT_DONE


def balance(options: argparse.Namespace) -> int:
    """Weights of a stage's data sets from their similarity to the benchmark, with the
    checkpoint's model.
    """
    from sailplan.curriculum.kinds import summarise_benchmark
    from sailplan.curriculum.stages import balance_sets

    _check_out(options.out, file=True)
    with _opened(options) as run:
        stage = _stage(run.config, options.stage)
        settings = stage.balance or BalanceConfig()
        missing = [name for name in stage.data if name not in run.readers]
        if missing:
            raise ConfigurationError(
                f"stages.{options.stage}.data.{missing[0]}: made at the stage's start and not in "
                f"{run.folder.root} yet"
            )
        embedder = Embedder(run.context)
        benchmark = (
            summarise_benchmark(embedder, settings) if settings.weights == "similarity" else {}
        )
        found = balance_sets(embedder, replace(stage, balance=settings), benchmark, settings)
        embedder.close()
        text = json.dumps(
            {
                "weights": found.weights,
                "scores": found.scores,
                "errors": found.errors,
                "pairs": found.pairs,
            },
            indent=1,
        )
        if options.out and run.parallel.is_main:
            Path(options.out).write_text(text)
        _say(run, text)
    return EXIT_DONE


def export(options: argparse.Namespace) -> int:
    """Write a folder: of sailplan's own form (weights, model.json, tokenizer), or one that
    sentence-transformers and transformers open.
    """
    from sailplan.export.sentence_transformers import export_sentence_transformers
    from sailplan.export.weights import export_weights

    if not is_main_by_environment():
        return EXIT_DONE
    _check_out(options.out)
    if options.merge:
        return _merge(options)
    if options.weights or options.last is not None or len(options.checkpoint or []) > 1:
        raise ConfigurationError(
            "export: found several checkpoints, --last or --weights, expected one checkpoint; for "
            "an average write: sailplan export merge"
        )
    config, folder = options.config, options.folder
    checkpoint = Path(options.checkpoint[0]) if options.checkpoint else newest_checkpoint(folder)
    if options.to == "sentence-transformers":
        out = Path(options.out) if options.out else folder.root / "sentence-transformers"
        print(
            export_sentence_transformers(checkpoint, out, config=config, run=folder.root),
            flush=True,
        )
    else:
        print(
            export_weights(
                checkpoint,
                Path(options.out) if options.out else folder.root / "export",
                config=config,
            ),
            flush=True,
        )
    return EXIT_DONE


def _merge(options: argparse.Namespace) -> int:
    """The weighted average of checkpoints and exported folders."""
    from sailplan.export.merge import merge

    if options.last is not None:
        return _merge_last(options)
    if not options.out:
        raise ConfigurationError("export merge: --out is missing; give the folder to write")
    sources = [Path(source) for source in options.checkpoint or []]
    try:
        weights = (
            [float(weight) for weight in options.weights.split(",")] if options.weights else None
        )
    except ValueError as error:
        raise ConfigurationError(
            f"--weights {options.weights}: expected numbers such as 0.5,0.5"
        ) from error
    folder = (
        Path(options.run_folder)
        if options.run_folder
        else next((s.parents[1] for s in sources if s.resolve().parent.name == "checkpoints"), None)
    )
    config = (
        RunFolder(folder).load_config()
        if folder and (options.run_folder or (folder / "config.yaml").is_file())
        else None
    )
    print(merge(sources, Path(options.out), weights=weights, config=config), flush=True)
    return EXIT_DONE


def _merge_last(options: argparse.Namespace) -> int:
    """The run's newest checkpoints, averaged equally or with a decay."""
    from sailplan.export.merge import last_checkpoints, merge

    if options.checkpoint or options.weights:
        raise ConfigurationError(
            "export merge --last: found --checkpoint or --weights beside it, expected none; "
            "--decay gives unequal weights"
        )
    config, folder = of_run(options)
    sources, weights = last_checkpoints(folder.checkpoints, options.last, options.decay)
    print(
        merge(
            sources,
            Path(options.out) if options.out else folder.root / "merged",
            weights=weights,
            config=config,
        ),
        flush=True,
    )
    return EXIT_DONE


def _stage(config: Config, name: str) -> StageConfig:
    if name not in config.stages:
        raise ConfigurationError(f"--stage {name}: expected one of {', '.join(config.stages)}")
    return config.stages[name]
