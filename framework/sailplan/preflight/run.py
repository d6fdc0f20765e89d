"""The preflight: all checks in order, each on all ranks, one table and one line.

A check that refuses does not keep the later ones from looking, as long as they can: a job in a
queue should learn of all its problems at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sailplan.config.compose import config_hash, shared_settings
from sailplan.config.schema import Config
from sailplan.data.datasets import open_datasets
from sailplan.data.reader import RecordReader
from sailplan.model.count import count_parameters
from sailplan.model.fused import FUSED_OPS, chosen_extension, extensions
from sailplan.preflight.bandwidth import judge_bandwidth, measure
from sailplan.preflight.findings import Findings
from sailplan.preflight.gpus import judge_gpus
from sailplan.preflight.hosts import RankFacts, gather_facts, judge_hosts
from sailplan.preflight.shards import check_shards
from sailplan.runtime.agreement import agree, software
from sailplan.runtime.environment import local_world_size
from sailplan.runtime.process import Parallel
from sailplan.runtime.session import started
from sailplan.runtime.shared_folder import check_shared
from sailplan.runtime.turns import everywhere
from sailplan.runtime.watch import alone, phase
from sailplan.step.optimizer import optimizer_state_size
from sailplan.train.bundle import agree_on_data, check_data


def preflight(config: Config) -> None:
    """Look at everything that a run of this launch needs; print a table and a line on rank 0.

    Raises ConfigurationError or BadDataError on all ranks where something will not do, after the
    table.
    """
    with started(config.parallel) as parallel, phase("preflight"):
        findings = Findings()
        _settings(config, parallel, findings)
        runs = Path(config.runs)
        facts = gather_facts(parallel, runs)
        judge_hosts(facts, findings, checkpoint_bytes(config) * (config.checkpoint.keep + 1))
        _run_folder(config, parallel, findings)
        local = local_world_size(parallel.world_size)
        judge_gpus([(fact.host, fact.rank, fact.gpu) for fact in facts], local, findings)
        ranks = ranks_of_hosts(facts)
        hosts = [facts[members[0]].host for members in ranks]
        judge_bandwidth(hosts, measure(parallel, hosts, ranks) if len(hosts) > 1 else {}, findings)
        _data(config, parallel, ranks, findings)
        if parallel.is_main:
            print("\n".join(findings.table()), flush=True)
        places = f"{len(hosts)} host{'' if len(hosts) == 1 else 's'}"
        line = findings.verdict(f"check: {parallel.world_size} ranks on {places}")
        if parallel.is_main:
            print(line, flush=True)


def ranks_of_hosts(facts: Sequence[RankFacts]) -> list[list[int]]:
    """Return the ranks of each launcher's host: a host begins at each rank with local number 0."""
    found: list[list[int]] = []
    for fact in facts:
        if fact.local_rank == 0 or not found:
            found.append([])
        found[-1].append(fact.rank)
    return found


def checkpoint_bytes(config: Config) -> int:
    """Return the size of one checkpoint: weights and the optimizer's state."""
    width = 8 if config.parallel.dtype == "float64" else 4
    states = 1 + optimizer_state_size(config.optimizer, config.allowed_targets)
    return int(count_parameters(config.model)["total"] * width * states)


def _settings(config: Config, parallel: Parallel, findings: Findings) -> None:
    steps = sum(config.stages[name].steps for name in config.order)
    findings.add(
        "configuration", "ok", f"{config_hash(config)}: {len(config.order)} stages, {steps} steps"
    )
    layout = (
        f"data-parallel {parallel.data_parallel_size} x "
        f"tensor-parallel {parallel.tensor_parallel_size}"
    )
    findings.add("ranks", "ok", f"{parallel.world_size} ({layout}), {parallel.device.type}")
    versions = software()["versions"]

    def same() -> bool:
        agree(
            parallel,
            "settings and versions",
            {"configuration": shared_settings(config), "versions": versions},
            "start the same code with the same line on all nodes",
        )
        return True

    if findings.attempt("versions", same):
        shown = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "numpy"))
        findings.add("versions", "ok", f"{shown}; all packages, settings and code are the same")
    optional = ", ".join(f"{name} {found or 'not found'}" for name, found in extensions().items())
    blocks = FUSED_OPS[chosen_extension(config.parallel, parallel.device.type)]
    findings.add(
        "blocks", "ok", f"{blocks} (parallel.fused={config.parallel.fused}); optional: {optional}"
    )


def _run_folder(config: Config, parallel: Parallel, findings: Findings) -> None:
    runs = Path(config.runs)
    there = runs.is_dir()
    hosts = findings.attempt(
        "run folder", lambda: check_shared(parallel, runs, f"runs={config.runs}")
    )
    if hosts:
        findings.add("run folder", "ok", f"{runs}: written by one rank, seen and written by all")
    if parallel.is_main and not there:
        with suppress(OSError):  # not empty: a run has begun meanwhile
            runs.rmdir()


def _data(
    config: Config, parallel: Parallel, ranks: Sequence[Sequence[int]], findings: Findings
) -> None:
    def opened() -> dict[str, RecordReader]:
        with phase("opening data", local=True):
            readers = everywhere(
                parallel, "opening data", lambda: open_datasets(config, progress=alone)
            )
        agree_on_data(parallel, readers)
        everywhere(parallel, "checking data", lambda: check_data(config, readers))
        return readers

    readers = findings.attempt("data", opened)
    if readers is not None:
        check_shards(parallel, readers, ranks, findings)
