"""Rules between components, checked before any process group or model exists: each failure is
one line that says what to do.

The rules of a component's own settings stand beside it (see `sailplan.config.components`).
"""

from __future__ import annotations

from collections.abc import Collection

from sailplan.config.components import check_effects, validate
from sailplan.config.schema import ARTIFACT, Config, EvaluationTask, StageConfig
from sailplan.errors import ConfigurationError


def check(config: Config, world_size: int) -> None:
    """Raise ConfigurationError at the first rule that the configuration breaks for a world of
    `world_size` ranks.
    """
    validate(config)
    check_effects(config)
    check_layout(config, world_size)
    if not config.order:
        raise ConfigurationError(
            "stages is empty: give the run some, as conf/experiment/quickstart.yaml does, or "
            "choose experiment=quickstart"
        )
    for name in config.order:
        if name not in config.stages:
            raise ConfigurationError(
                f"order names the stage '{name}', but stages has: "
                f"{', '.join(config.stages) or 'none'}"
            )
        if config.order.count(name) > 1:
            raise ConfigurationError(
                f"order names the stage '{name}' more than once, which would mix their files: give "
                "the second its own name in stages"
            )
        _check_stage(config, name, config.stages[name])
    for name, task in config.evaluation.tasks.items():
        check_task(config, name, task)
    config.model.check_run(config)


def check_layout(config: Config, world_size: int) -> None:
    """Raise ConfigurationError where the world or a batch cannot be cut as the configuration
    says.
    """
    config.parallel.check_world(world_size)
    data_parallel = world_size // config.parallel.tensor
    batches = {"global_batch": config.global_batch} | {
        f"stages.{name}.global_batch": stage.global_batch for name, stage in config.stages.items()
    }
    for key, rows in batches.items():
        if rows is not None and rows < data_parallel:
            raise ConfigurationError(
                f"{key}={rows}: expected at least a row for each of {data_parallel} data-parallel "
                "ranks: use more rows, or fewer ranks"
            )


def check_device(config: Config) -> None:
    """Raise ConfigurationError for what this machine's devices cannot run; `check` says the
    rest, which can be said anywhere.
    """
    import torch

    if torch.cuda.is_available():
        return
    for key, on, needs in (
        ("parallel.cuda_graphs", config.parallel.cuda_graphs, "CUDA"),
        (
            "parallel.sequence",
            config.parallel.sequence,
            "GPUs, which megatron-core's sequence parallelism needs",
        ),
    ):
        if on:
            raise ConfigurationError(
                f"{key} is on, but there is no GPU here: expected {needs}; leave it off"
            )


def check_task(config: Config, name: str, task: EvaluationTask) -> None:
    """Raise ConfigurationError where a task asks for what its data set has not, whatever the
    shards hold.
    """
    key = f"evaluation.tasks.{name}"
    validate(task, key)
    _one_of(f"{key}.dataset", task.dataset, config.data.sets)
    dataset = config.data.sets[task.dataset]
    if dataset.shards.startswith(ARTIFACT):
        raise ConfigurationError(
            f"{key}.dataset={task.dataset}: a stage makes its shards ({dataset.shards}); expected "
            "a data set that is there before the run"
        )
    if task.kind != "clustering" and (task.kind == "sequence") != (dataset.kind == "sequences"):
        wanted = (
            "sequences"
            if task.kind == "sequence"
            else "items or pairs; for sequences use kind: sequence"
        )
        raise ConfigurationError(
            f"{key}.kind={task.kind}: data set '{task.dataset}' is of kind {dataset.kind}; "
            f"expected {wanted}"
        )
    for side, view in (("query", task.query), ("target", task.target)):
        if (view or side == "query" or task.kind != "clustering") and view not in dataset.views:
            raise ConfigurationError(
                f"{key}.{side}={view}: data set '{task.dataset}' has the views "
                f"{', '.join(dataset.views)}"
            )


def _check_stage(config: Config, name: str, stage: StageConfig) -> None:
    key = f"stages.{name}"
    if not stage.data:
        raise ConfigurationError(f"{key}.data is empty: name at least one data set and its weight")
    for dataset in stage.data:
        _one_of(f"{key}.data", dataset, config.data.sets)
    for objective in stage.objectives:
        _one_of(f"{key}.objectives", objective, config.objectives)
    if not stage.objectives:
        raise ConfigurationError(
            f"{key}.objectives is empty: name at least one of {', '.join(config.objectives)} and "
            "its weight"
        )
    parts = ("all", *config.model.part_names(), "objectives", "temperatures")
    if not stage.trainable:
        raise ConfigurationError(
            f"{key}.trainable is empty: expected all, or some of {', '.join(parts[1:])}; a stage "
            "that trains nothing is none"
        )
    for part in stage.trainable:
        _one_of(f"{key}.trainable", part, parts)
    named = {**stage.patterns, **(stage.hard_negatives.patterns if stage.hard_negatives else {})}
    for dataset, patterns in named.items():
        _one_of(f"{key}.patterns", dataset, stage.data)
        for pattern in patterns:
            _one_of(f"{key}.patterns.{dataset}", pattern, config.data.sets[dataset].patterns)
    similar = stage.balance is not None and stage.balance.weights == "similarity"
    if (similar or (stage.subset and stage.subset.nearest)) and not config.evaluation.benchmark:
        raise ConfigurationError(
            f"{key} measures similarity to the benchmark: list its tasks in evaluation.benchmark"
        )


def _one_of(key: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ConfigurationError(f"{key}={value}: expected one of {', '.join(allowed)}")
