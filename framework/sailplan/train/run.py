"""One training job from configuration to report: joins the world, resumes or starts, runs the
stages, leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sailplan.checkpoint.source import initial_source
from sailplan.config.compose import as_dict, config_hash, identity, shared_settings
from sailplan.config.schema import Config
from sailplan.errors import ConfigurationError
from sailplan.observe.metrics import MetricWriter, RunInfo
from sailplan.observe.report import write_report
from sailplan.runtime.agreement import agree, software
from sailplan.runtime.claim import Claim
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.session import started
from sailplan.runtime.shared_folder import check_shared
from sailplan.runtime.watch import computing, phase, report_to
from sailplan.train.bundle import build_bundle
from sailplan.train.load_pretrained import initialise
from sailplan.train.places import Places
from sailplan.train.run_folder import RunFolder, check_identity
from sailplan.train.trainer import Trainer


def _starting_point(config: Config, folder: RunFolder, parallel: Parallel) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start; ConfigurationError on all ranks
    rather than a lost or mixed run.
    """
    newest = Places(config, folder).newest(parallel, fetch=config.resume == "auto")

    def check() -> None:
        if newest is None:
            return
        if config.resume == "never":
            raise ConfigurationError(
                f"{folder.root} holds a run already ({newest.name}): give resume=auto to go on "
                "with it, or another name="
            )
        check_identity(identity(folder.load_config()), config, folder.root)

    on_main(parallel, "looking for checkpoints", check)
    return newest


def train(config: Config) -> Path:
    """Run the job; returns the report's path. All ranks call it.

    Raises the errors of `sailplan.errors`.
    """
    folder = RunFolder(Path(config.runs) / config.name)
    with started(config.parallel) as parallel, ExitStack() as stack:
        report_to(folder.root)
        agree(
            parallel,
            "settings and versions",
            {"configuration": shared_settings(config)} | software(),
            "start the same code with the same line on all nodes",
        )
        stack.enter_context(_claimed(config, folder, parallel))
        checkpoint, source = _agreed_start(config, folder, parallel)
        with phase("building the model"):
            bundle = build_bundle(config, parallel)
        if source is not None:
            with phase("reading weights"):
                initialise(bundle, source, config.initialise_parts, parallel)
        resumed = None if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
        settings = as_dict(config) | {
            "config_hash": config_hash(config),
            "world_size": parallel.world_size,
        }
        info = RunInfo(folder.root, settings, resumed)
        with MetricWriter(
            info, config.loggers, parallel.rank, allowed_targets=config.allowed_targets
        ) as writer:
            trainer = Trainer(config, parallel, folder, bundle, writer)
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


def _agreed_start(
    config: Config, folder: RunFolder, parallel: Parallel
) -> tuple[Path | None, Path | None]:
    """The checkpoint to go on from, else the source of a fresh start's weights; None where there
    is none.

    Rank 0 looks for the source and writes config.yaml; every rank goes on from what it found, or
    fails with it.
    """
    found = _starting_point(config, folder, parallel)

    def look() -> str:
        source = (
            initial_source(config.initialise_from)
            if config.initialise_from is not None and found is None
            else None
        )
        with _writable(config, folder):
            folder.write_config(config)
            folder.write_versions(software()["versions"])
        return str(source or "")

    source = on_main(parallel, "writing the configuration", look)
    return found, Path(source) if source else None


@contextmanager
def _writable(config: Config, folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"runs={config.runs}: {folder.root} cannot be read and written ({error}); choose a "
            "folder that can, on all ranks' file system"
        ) from error


@contextmanager
def _claimed(config: Config, folder: RunFolder, parallel: Parallel) -> Iterator[None]:
    """Keep other jobs out of the run folder."""
    claims: list[Claim] = []

    def claim() -> None:
        with _writable(config, folder):
            claims.append(Claim(folder.root))

    on_main(parallel, "claiming the run folder", claim)
    try:
        check_shared(parallel, folder.root, f"runs={config.runs}", own=True)
        yield
    finally:
        for one in claims:
            one.release()
