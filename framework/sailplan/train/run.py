"""One training job from configuration to report: joins the world, resumes or starts, runs the stages, leaves."""

from __future__ import annotations

import sys
from pathlib import Path

from sailplan.checkpoint.store import damaged, latest
from sailplan.config.compose import as_dict, config_hash, identity, shared_settings
from sailplan.config.schema import Config
from sailplan.errors import ConfigurationError
from sailplan.observe.metrics import MetricWriter
from sailplan.observe.report import write_report
from sailplan.runtime.agreement import agree, software
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.session import started
from sailplan.runtime.watch import computing, phase, report_to
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
    with started(config.parallel) as parallel:
        report_to(folder.root)
        agree(parallel, "settings and versions", {"configuration": shared_settings(config)} | software(), "start the same code with the same line on all nodes")
        checkpoint, source = _agreed_start(config, folder, parallel)
        with phase("building the model"):
            whole = assemble(config, parallel)
        if source is not None:
            with phase("reading weights"):
                initialise(whole, source, config.initialise_parts, parallel)
        resumed = None if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
        settings = as_dict(config) | {"config_hash": config_hash(config), "world_size": parallel.world_size}
        with MetricWriter(folder.root, config.tracking, parallel.rank, resumed_step=resumed, settings=settings) as writer:
            trainer = Trainer(config, parallel, folder, whole, writer)
            if checkpoint is not None:
                with phase("loading the checkpoint"):
                    trainer.resume(checkpoint)
            trainer.run()
        report = folder.root / "report.html"

        def write() -> None:
            with computing("writing the report"):
                print(f"report: {write_report(folder.root)}", flush=True)

        on_main(parallel, "writing the report", write)
    return report


def _agreed_start(config: Config, folder: RunFolder, parallel: Parallel) -> tuple[Path | None, Path | None]:
    """The checkpoint to go on from, else the source of a fresh start's weights; None where there is none.

    Rank 0 looks for them and writes config.yaml; every rank goes on from what it found, or fails with it.
    """

    def look() -> list[str]:
        try:
            found = _starting_point(config, folder)
            source = initial_source(config.initialise_from) if config.initialise_from is not None and found is None else None
            folder.write_config(config)
        except OSError as error:
            raise ConfigurationError(
                f"runs={config.runs}: {folder.root} cannot be read and written ({error}); choose a folder that can, on all ranks' file system"
            ) from error
        return [str(found or ""), str(source or "")]

    found, source = on_main(parallel, "looking for checkpoints", look)
    return Path(found) if found else None, Path(source) if source else None
