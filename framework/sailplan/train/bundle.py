"""The trainable whole of a run: encoder, objectives and temperatures as one module, for training
and for every
command that works with a run's checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sailplan.checkpoint.loading import load_model_only
from sailplan.checkpoint.store import latest
from sailplan.config.fields import JsonObject
from sailplan.config.schema import Config
from sailplan.curriculum.stages import check_stage
from sailplan.data.datasets import check_prompts, check_records, open_datasets
from sailplan.data.first_records import check_views
from sailplan.data.processor import processor_of
from sailplan.data.reader import RecordReader
from sailplan.errors import ConfigurationError
from sailplan.evaluate.retrieval_task import check_queries
from sailplan.model.build import build_encoder
from sailplan.model.component import EncoderComponent
from sailplan.objective.registry import build_objectives
from sailplan.objective.temperature import Temperatures
from sailplan.runtime.agreement import agree
from sailplan.runtime.process import Parallel
from sailplan.runtime.watch import alone, phase
from sailplan.step.optimizer import check_optimizer
from sailplan.train.run_folder import RunFolder


@dataclass(frozen=True)
class ModelBundle:
    """`module` holds the other three under their names: what a checkpoint holds."""

    module: nn.ModuleDict
    encoder: nn.Module
    objectives: nn.ModuleDict
    temperatures: Temperatures


def build_bundle(config: Config, parallel: Parallel) -> ModelBundle:
    """Build everything from `config.seed`; equal on all ranks and layouts."""
    encoder = build_encoder(config.model, config.parallel, parallel, config.seed)
    objectives = build_objectives(
        config.objectives,
        config.model.embedding,
        config.data.sets,
        allowed_targets=config.allowed_targets,
        seed=config.seed,
    )
    temperatures = Temperatures(config.data.sets, config.data.temperature_by)
    if config.parallel.dtype == "float64":
        objectives, temperatures = objectives.double(), temperatures.double()
    objectives, temperatures = objectives.to(parallel.device), temperatures.to(parallel.device)
    module = nn.ModuleDict(
        {"encoder": encoder, "objectives": objectives, "temperatures": temperatures}
    )
    return ModelBundle(module, encoder, objectives, temperatures)


def open_agreed(
    config: Config,
    parallel: Parallel,
    artifacts: Mapping[str, Path] | None = None,
    names: Iterable[str] | None = None,
) -> dict[str, RecordReader]:
    """Open the data sets of all ranks; raise ConfigurationError on all where some see other
    shards than the rest.

    The first opening of many shards takes long, and is no hang: it beats with each, and obeys a
    stop between two.
    """
    with phase("opening data", local=True):
        readers = open_datasets(config, artifacts, names, progress=alone)
    agree_on_data(parallel, readers)
    return readers


def agree_on_data(parallel: Parallel, readers: Mapping[str, RecordReader]) -> None:
    """Raise ConfigurationError on all ranks where some have opened other shards. A collective."""
    agree(
        parallel,
        "data",
        lambda: {
            f"data set {name}": reader.index.description() for name, reader in readers.items()
        },
        "give all nodes the same shards; `sailplan data index` reads those that were replaced anew",
        digest=" ".join(f"{name}={reader.index.digest()}" for name, reader in readers.items()),
    )


def check_data(config: Config, readers: Mapping[str, RecordReader]) -> None:
    """Raise ConfigurationError for what a stage or an evaluation of the run would miss in the
    open data sets, before the first step.
    """
    check_optimizer(config)
    for name in config.order:
        check_stage(name, config.stages[name], config)
    component: EncoderComponent = config.model.component()
    component.check_processor(config, processor_of(config))
    check_prompts(config)
    check_records(config, readers)
    check_views(config, readers)
    check_queries(readers, config.evaluation.tasks)


def newest_checkpoint(folder: RunFolder) -> Path:
    """The run's newest complete checkpoint; ConfigurationError if it has none."""
    found = latest(folder.checkpoints)
    if found is None:
        raise ConfigurationError(
            f"{folder.checkpoints}: no complete checkpoint; train first, or give --checkpoint, such "
            "as one that checkpoint.copy_to or checkpoint.local has"
        )
    return found


def load_whole(
    config: Config, parallel: Parallel, checkpoint: Path
) -> tuple[ModelBundle, JsonObject]:
    """The run's parts with a checkpoint's weights, and what the trainer noted in it (step,
    stage, ...).
    """
    bundle = build_bundle(config, parallel)
    extra = load_model_only(checkpoint, model=bundle.module, parallel=parallel)
    return bundle, extra
