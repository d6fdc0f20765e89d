"""`sailplan plan`: what a job will do, computed by the functions that then do it.

Stages, steps and learning rates come from the trainer's schedule; the order of the data from the
trainer's plan.
Where a stage's weights or subsets are computed from the model at its start, the preview says so
instead of guessing.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table

from sailplan.config.compose import config_hash
from sailplan.config.fields import JsonObject
from sailplan.config.schema import Config, StageConfig
from sailplan.config.sharding import sharding_of
from sailplan.curriculum.costs import stage_cost
from sailplan.data.datasets import open_datasets
from sailplan.data.plan import Plan
from sailplan.data.processor import processor_of
from sailplan.data.reader import RecordReader
from sailplan.errors import ConfigurationError
from sailplan.model.count import count_parameters
from sailplan.objective.backends import planned_backends
from sailplan.objective.registry import objective_class
from sailplan.runtime.environment import node_count
from sailplan.runtime.process import device_type
from sailplan.step.schedules import learning_rate_scale
from sailplan.train.bundle import check_data
from sailplan.train.memory import estimate_memory
from sailplan.train.schedule import StageSpan, spans


def describe(config: Config, world_size: int) -> JsonObject:
    """Everything that `render` shows, as JSON values. Opens the data sets; makes no weights."""
    readers = open_datasets(config)
    check_data(config, readers)
    data_parallel = world_size // config.parallel.tensor
    rank_rows = max(
        (stage.global_batch or config.global_batch) * _views(config, stage)
        for stage in config.stages.values()
    )
    rank_rows = -(-rank_rows // data_parallel)
    nodes = node_count(world_size)
    sharding, copies = sharding_of(config.parallel, data_parallel, nodes)
    shown = [
        tuple(view.modalities)
        for stage in config.stages.values()
        for name in stage.data
        for view in config.data.sets[name].views.values()
    ]
    memory = estimate_memory(config, shown, world_size=world_size, nodes=nodes, rank_rows=rank_rows)
    parameters = count_parameters(config.model)
    return {
        "name": config.name,
        "config_hash": config_hash(config),
        "world": {
            "ranks": world_size,
            "data_parallel": data_parallel,
            "tensor_parallel": config.parallel.tensor,
            "sharding": sharding,
            "copies": copies,
        },
        "parameters": parameters,
        "memory_bytes": asdict(memory) | {"total": memory.total},
        "records": {name: len(reader) for name, reader in readers.items()},
        "backends": _backends(config),
        "stages": [_stage(config, span, readers, parameters["total"]) for span in spans(config)],
    }


def _backends(config: Config) -> dict[str, dict[str, str]]:
    """Device -> objective -> what its scores would go through: here, and on a GPU, where here is
    none. Refusals stand where they would come.
    """
    classes = {
        name: objective_class(name, options.get("_target_"), config.allowed_targets)
        for name, options in config.objectives.items()
    }
    used = {
        name: cls
        for name, cls in classes.items()
        if any(config.stages[stage].objectives.get(name) for stage in config.order)
    }
    found: dict[str, dict[str, str]] = {}
    for device in dict.fromkeys((device_type(), "cuda")):
        try:
            found[device] = planned_backends(
                used,
                config.step.backend,
                torch.device(device),
                getattr(torch, config.parallel.dtype),
            )
        except ConfigurationError as error:
            found[device] = {"refused": str(error)}
    return found


def _views(config: Config, stage: StageConfig) -> int:
    """Encoder rows for each row of a step: the most of any data set of the stage, histories
    counted in full, with the records' own negatives.
    """
    sets = [config.data.sets[name] for name in stage.data]
    rows = {
        "history": lambda dataset: dataset.history_length,
        "target": lambda dataset: 1 + dataset.negatives,
    }
    return max(
        sum(rows[view.of](dataset) if view.of in rows else 1 for view in dataset.views.values())
        for dataset in sets
    )


def _stage(
    config: Config, span: StageSpan, readers: dict[str, RecordReader], parameters: int
) -> JsonObject:
    stage = config.stages[span.name]
    scales = [
        learning_rate_scale(stage.optimizer, step, span.steps) * stage.optimizer.learning_rate
        for step in range(span.steps)
    ]
    made = {
        "balance": stage.balance,
        "subset": stage.subset,
        "hard_negatives": stage.hard_negatives,
        "artifacts": stage.artifacts,
    }
    return {
        "name": span.name,
        "first_step": span.first,
        "last_step": span.last,
        "global_batch": stage.global_batch or config.global_batch,
        "data": dict(stage.data),
        "objectives": dict(stage.objectives),
        "trainable": list(stage.trainable),
        "learning_rate": {"first": scales[0], "peak": max(scales), "last": scales[-1]},
        "at_start": [name for name, value in made.items() if value],
        "preparation": stage_cost(config, stage, readers, parameters, processor_of(config))
        if stage.balance or stage.subset or stage.hard_negatives or stage.artifacts
        else None,
        "digests": _digests(config, span, stage, readers),
    }


def _digests(
    config: Config, span: StageSpan, stage: StageConfig, readers: dict[str, RecordReader]
) -> list[str] | None:
    """`data/digest` of each step, or None where the order depends on what the stage's start
    computes from the model.
    """
    if stage.balance or stage.subset or not all(name in readers for name in stage.data):
        return None
    plan = Plan(config, span.name, stage, stage.data, readers)
    return [plan.digest(step) for step in range(span.steps)]


def _cost(cost: JsonObject) -> str:
    """The cost of a stage's preparation in words."""
    again = (
        f"; {cost['refreshes']} times again for hard negatives, {cost['refresh_rows']:,} rows each"
        if cost["refreshes"]
        else ""
    )
    return (
        f"{cost['rows']:,} rows to embed ({cost['encoder_flop']:.1e} FLOP), vectors of "
        f"{cost['vector_bytes'] / 2**20:,.1f} MiB, searches of {cost['search_flop']:.1e} FLOP, "
        f"{cost['disk_bytes'] / 2**20:,.1f} MiB of disk{again}"
    )


def render(plan: JsonObject) -> str:
    """The description as text for a terminal."""
    world, stream = plan["world"], io.StringIO()
    console = Console(file=stream, width=150)
    console.print(
        f"{plan['name']}: configuration {plan['config_hash']}, {plan['stages'][-1]['last_step']} "
        "steps",
        highlight=False,
    )
    console.print(
        f"ranks {world['ranks']} = data-parallel {world['data_parallel']} x tensor-parallel "
        f"{world['tensor_parallel']}",
        highlight=False,
    )
    console.print(
        f"parameters lie as parallel.sharding={world['sharding']}, {world['copies']} copies",
        highlight=False,
    )
    console.print(
        "parameters "
        + ", ".join(f"{part} {count:,}" for part, count in plan["parameters"].items()),
        highlight=False,
    )
    parts = ", ".join(
        f"{part} {size / 2**20:,.0f} MiB" for part, size in plan["memory_bytes"].items()
    )
    console.print(f"memory of a rank (estimate) {parts}", highlight=False)
    console.print(
        "records " + ", ".join(f"{name} {count:,}" for name, count in plan["records"].items()),
        highlight=False,
    )
    for device, backends in plan["backends"].items():
        console.print(
            f"losses on {device}: "
            + ", ".join(f"{name} {backend}" for name, backend in backends.items()),
            highlight=False,
            soft_wrap=True,
        )
    table = Table()
    for heading in (
        "stage",
        "steps",
        "rows",
        "data (weight)",
        "objectives (weight)",
        "learning rate",
        "computed at its start",
        "order of the data",
    ):
        table.add_column(heading)
    for stage in plan["stages"]:
        rate = stage["learning_rate"]
        digests = stage["digests"]
        order = (
            "follows from its start"
            if digests is None
            else hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        )
        table.add_row(
            stage["name"],
            f"{stage['first_step']}-{stage['last_step']}",
            str(stage["global_batch"]),
            ", ".join(f"{name} {weight:g}" for name, weight in stage["data"].items()),
            ", ".join(f"{name} {weight:g}" for name, weight in stage["objectives"].items()),
            f"{rate['first']:.1e} > {rate['peak']:.1e} > {rate['last']:.1e}",
            ", ".join(stage["at_start"]) or "-",
            order,
        )
    console.print(table)
    for stage in plan["stages"]:
        if stage["preparation"] is not None:
            text = f"{stage['name']} at its start, at most: {_cost(stage['preparation'])}"
            console.print(text, highlight=False, soft_wrap=True)
    return stream.getvalue().rstrip()
