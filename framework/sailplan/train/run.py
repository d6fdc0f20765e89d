"""One training job from configuration to report: joins the world, resumes or starts, runs the stages, leaves."""

from __future__ import annotations

import sys
from pathlib import Path

from sailplan.checkpoint.store import damaged, latest
from sailplan.config.compose import as_dict, config_hash, identity
from sailplan.config.schema import Config
from sailplan.errors import ConfigurationError
from sailplan.observe.metrics import MetricWriter, RunInfo
from sailplan.observe.report import write_report
from sailplan.runtime.process import Parallel, started
from sailplan.runtime.signals import stop_flag
from sailplan.runtime.watchdog import watchdog
from sailplan.train.assemble import assemble
from sailplan.train.initialise import initial_source, initialise
from sailplan.train.run_folder import RunFolder, check_identity
from sailplan.train.trainer import Trainer


def _starting_point(config: Config, folder: RunFolder) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start; ConfigurationError rather than a lost or mixed run."""
    newest = latest(folder.checkpoints)
    broken = [path for path in damaged(folder.checkpoints) if newest is None or path > newest]
    if broken and newest is None:
        raise ConfigurationError(
            f"{broken[-1]} is damaged and {folder.root} has no whole checkpoint: restore its files, choose another name=, or delete the folder to start afresh"
        )
    for path in broken:
        print(f"sailplan: checkpoint {path} is damaged, going on from {newest}", file=sys.stderr, flush=True)
    if newest is None:
        return None
    if config.resume == "never":
        raise ConfigurationError(f"{folder.root} holds a run already ({newest.name}): give resume=auto to go on with it, or another name=")
    check_identity(identity(folder.load_config()), config, folder.root)
    return newest


def train(config: Config) -> Path:
    """Runs the job; returns the report's path. All ranks call it. Raises the errors of `sailplan.errors`."""
    folder = RunFolder(Path(config.runs) / config.name)
    with stop_flag() as flag, started(config.parallel) as parallel, watchdog(config.parallel.timeout_seconds) as dog:
        checkpoint, source = _agreed_start(config, folder, parallel)
        whole = assemble(config, parallel)
        dog.beat()
        if source is not None:
            initialise(whole, source, config.initialise_parts, parallel)
        resumed = None if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
        settings = as_dict(config) | {"config_hash": config_hash(config), "world_size": parallel.world_size}
        info = RunInfo(folder.root, settings, resumed)
        with MetricWriter(info, config.loggers, parallel.rank, allowed_targets=config.allowed_targets) as writer:
            trainer = Trainer(config, parallel, folder, whole, writer, dog, flag)
            if checkpoint is not None:
                with dog.paused():
                    trainer.resume(checkpoint)
            trainer.run()
        report = folder.root / "report.html"
        if parallel.is_main:
            report = write_report(folder.root)
            print(f"report: {report}", flush=True)
        parallel.barrier()
    return report


def _agreed_start(config: Config, folder: RunFolder, parallel: Parallel) -> tuple[Path | None, Path | None]:
    """The checkpoint to go on from, else the source of a fresh start's weights; None where there is none.

    Rank 0 looks for them and writes config.yaml; every rank goes on from what it found, or fails with it.
    """
    found, source, problem = "", "", ""
    if parallel.is_main:
        try:
            found = str(_starting_point(config, folder) or "")
            if config.initialise_from is not None and not found:
                source = str(initial_source(config.initialise_from))
            folder.write_config(config)
        except ConfigurationError as error:
            problem = str(error)
        except OSError as error:
            problem = f"runs={config.runs}: {folder.root} cannot be read and written ({error}); choose a folder that can, on all ranks' file system"
    problem, found, source = (parallel.broadcast_text(text) for text in (problem, found, source))
    if problem:
        raise ConfigurationError(problem)
    return Path(found) if found else None, Path(source) if source else None
