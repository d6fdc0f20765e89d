"""`sailplan train --multirun seed=0,1,2`: one run for each combination of values, started by a
launcher of Hydra's.

Hydra's basic sweeper expands the values and its launcher starts the jobs: here one after another,
or by `hydra/launcher=submitit_local` or `submitit_slurm` with as many ranks as
`hydra.launcher.tasks_per_node` and `nodes` say.
Every job is the command itself in a process of its own, so that it has the exit codes, signals and
memory of a single run.
A job's run is named by its values, so that the same line with resume=auto goes on with all of them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from sailplan.config.compose import compose, hydra_session
from sailplan.errors import EXIT_DONE, EXIT_STOPPED, ConfigurationError, StopRequested
from sailplan.runtime.environment import world_size_from_environment

PLUGINS = "pip install 'sailplan[slurm]'"
LAUNCH = (
    "hydra.output_subdir=null",
    "hydra.job.chdir=false",
    "hydra.job.name=sailplan",
    "hydra.sweep.subdir=.",
)


@dataclass  # frozen, OmegaConf takes it for read-only
class _Job:
    """What Hydra's launcher carries to a job: the overrides of one run."""

    overrides: list[str] = field(default_factory=list)


class _Stopped(BaseException):
    """A job was stopped on request: no other one should start."""


def run(lines: Sequence[str]) -> int:
    """Start all runs of a sweep; return 0, or the exit code of the first run that failed.

    Raises ConfigurationError, before any run starts, where one of them cannot be composed.
    """
    if world_size_from_environment() > 1:
        raise ConfigurationError(
            "--multirun: found a launch of several ranks, expected one process: the launcher "
            "starts the ranks of each job, "
            "as in hydra/launcher=submitit_local hydra.launcher.tasks_per_node=2"
        )
    ours = [line for line in lines if not re.match(r"[+~]*hydra[./]", line)]
    launch = [line for line in lines if line not in ours]
    if any(line.lstrip("+").startswith("hydra/sweeper") for line in launch):
        raise ConfigurationError(
            "hydra/sweeper: found another sweeper, expected Hydra's basic one, which tries all "
            "combinations; leave it out"
        )
    runs = expand(ours)
    configs = [compose(overrides) for overrides in runs]
    codes = _launch(runs, [*LAUNCH, f"hydra.sweep.dir={configs[0].runs}/sweeps", *launch])
    for config, code in zip(configs, codes, strict=True):
        print(
            f"{Path(config.runs) / config.name}: "
            f"{'done' if code == EXIT_DONE else f'exit code {code}'}",
            flush=True,
        )
    return next((code for code in codes if code != EXIT_DONE), EXIT_DONE)


def expand(lines: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each run of a sweep: every combination of the values of those that
    have several.

    A run is named NAME-KEY=VALUE,KEY=VALUE with the values that it does not share, unless `name` is
    swept itself. Raises ConfigurationError for a line that cannot be read, and one without several
    values.
    """
    try:
        with hydra_session() as hydra:
            overrides = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(
                list(lines)
            )
            [combinations] = BasicSweeper.split_arguments(overrides, None)
    except HydraException as error:
        raise ConfigurationError(
            f"--multirun: {str(error).splitlines()[0]}; expected key=A,B, key=range(1,4) or "
            "key=choice(A,B)"
        ) from error
    swept = [override.get_key_element() for override in overrides if override.is_sweep_override()]
    if not swept:
        raise ConfigurationError(
            "--multirun: no setting has several values, expected one as seed=0,1,2; leave out "
            "--multirun for one run"
        )
    shared = [
        str(override.input_line) for override in overrides if not override.is_sweep_override()
    ]
    found = []
    for combination in combinations:
        values = [line for line in combination if line.partition("=")[0] in swept]
        overrides_of_run = [*shared, *values]
        if "name" not in swept:
            label = ",".join(re.sub(r"[^\w.=+-]", "_", line) for line in values)
            overrides_of_run.append(
                f"name={json.dumps(f'{compose(overrides_of_run).name}-{label}')}"
            )
        found.append(overrides_of_run)
    return found


def _launch(runs: Sequence[list[str]], settings: list[str]) -> list[int]:
    """Return the exit codes of the runs, which the launcher that the settings choose has
    started.
    """
    ConfigStore.instance().store(name="sailplan_job", node=_Job)
    with hydra_session() as hydra:
        try:
            config: DictConfig = hydra.compose_config(
                "sailplan_job", settings, run_mode=RunMode.MULTIRUN, with_log_configuration=False
            )
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ConfigurationError(
                f"--multirun: {reason}; launchers other than Hydra's own come with {PLUGINS}"
            ) from error
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config))
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=job, config=config
        )
        lines = [[f"overrides={json.dumps(each, ensure_ascii=False)}"] for each in runs]
        try:
            return [int(each.return_value) for each in launcher.launch(lines, initial_job_idx=0)]
        except _Stopped as error:
            raise StopRequested(
                "sweep stopped: the same line with resume=auto goes on with it"
            ) from error


def job(config: DictConfig) -> int:
    """Run one job of a sweep and return its exit code: the task function that Hydra's launcher
    calls, once for each rank.
    """
    if "SUBMITIT_EXECUTOR" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        address = os.environ.get("MASTER_ADDR")
        place = TorchDistributedEnvironment()
        place.export(set_cuda_visible_devices=False, overwrite=True)
        if address is None and place.world_size == place.local_world_size:
            address = "127.0.0.1"
        # Else the first node's name in Slurm, which the nodes need not find
        os.environ["MASTER_ADDR"] = address or place.master_addr
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    line = [sys.executable, "-m", "sailplan", "train", *config.overrides]
    process = subprocess.Popen(line, env=environment)
    try:
        code = process.wait()
    finally:  # submitit leaves from its handler of the early warning: not before the save
        process.wait()
    if code == EXIT_STOPPED and "SUBMITIT_EXECUTOR" not in os.environ:
        raise _Stopped
    return code
