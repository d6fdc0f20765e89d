"""Steps that compute in bfloat16 beside exact ones, over all that decides which unit runs and
gets a gradient.

A case is which modalities the data has, what is trained, how the rows are cut, which graphs are
kept, how parameters lie on the ranks and what the process did before the step. `pairwise` picks few
cases in which every two choices meet. What is frozen changes none of the other gradients, so one
exact reference serves all cases of the same
data: the whole batch's, by plain autograd in float64. The same in plain bfloat16 says what rounding
alone costs: a step may be as far off, and no further.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from sailplan.checkpoint.loading import load
from sailplan.checkpoint.store import save
from sailplan.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    OptimizerConfig,
    ParallelConfig,
    PatternConfig,
    StepConfig,
    ViewConfig,
)
from sailplan.data.config import Modality
from sailplan.data.record import StepBatch, ViewBatch, ViewKey
from sailplan.model.parallelize import checkpoint_activations, shard
from sailplan.model.testing import join_layout, random_inputs, small_config, whole_tensor
from sailplan.model.tower import PARTS
from sailplan.objective.protocol import EncodedStep, EncodedView, Objective, ObjectiveContext
from sailplan.parity.testing import build_modules, named_gradients, share
from sailplan.runtime.config import Dtype
from sailplan.runtime.process import Parallel
from sailplan.step.config import Backend
from sailplan.step.optimizer import build_optimizer, set_learning_rate, set_trainable
from sailplan.step.training_step import TrainingStep
from sailplan_kernels.exchange import AllGather, Local, RowSplit

ROWS = 8
EVERYTHING: tuple[Modality, ...] = ("text", "vision", "audio")
Gradients = dict[
    str, Tensor
]  # parameter, as `parity.testing.named_gradients` names them -> its whole gradient

CHOICES: dict[str, tuple[Any, ...]] = {
    "layout": ((1, 1), (2, 1), (2, 2)),
    "modalities": tuple(
        some for count in (1, 2, 3) for some in itertools.combinations(EVERYTHING, count)
    ),
    "trainable": (
        ("all",),
        *[tuple(part for part in PARTS if part != frozen) for frozen in PARTS],
        ("vision", "temperatures"),
    ),
    "views": ("single", "fused"),
    "micro_batches": (1, 3),
    "kept_graphs": (0, 1, -1),
    "sharding": ("shard", "replicate"),
    "before": ("nothing", "a step", "other parts", "a checkpoint"),
    "rows": ("equal", "none"),
    "activations": ("kept", "repeated"),
}


@dataclass(frozen=True)
class Case:
    """One choice of each of CHOICES."""

    layout: tuple[int, int] = (1, 1)  # (ranks, tensor-parallel size)
    modalities: tuple[Modality, ...] = (
        EVERYTHING  # of the step's data; other parts take no part in it
    )
    trainable: tuple[str, ...] = ("all",)  # as in a stage
    # single: a view has one modality, so that the last micro-batch alone runs its part | fused:
    # some have all
    views: str = "single"
    micro_batches: int = 1  # a view and rank; 1: its rows fit into one
    kept_graphs: int = 0
    sharding: str = "shard"  # shard, replicate, or hybrid: two copies
    # A step | other parts: a step that trained what this one does not | a checkpoint: of another
    # process
    before: str = "nothing"
    rows: str = "equal"  # none: all rows are the first data-parallel rank's
    activations: str = "kept"  # repeated: activation checkpointing


def pairwise(choices: Mapping[str, Sequence[Any]] = CHOICES) -> list[Case]:
    """Cases in which any two choices meet at least once, few of them; always the same ones."""
    names, sizes = list(choices), [len(options) for options in choices.values()]
    places = range(len(names))
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(places, 2)
        for x in range(sizes[a])
        for y in range(sizes[b])
    }
    cases: list[Case] = []
    while missing:
        chosen = dict(
            min(missing)
            # These two must meet; the other choices are those that meet most of what is missing
            # beside them
        )
        for place in places:
            if place not in chosen:
                turns = [
                    (len(cases) + turn) % sizes[place] for turn in range(sizes[place])
                ]  # of equals, each in turn
                meets = [
                    sum(
                        tuple(sorted([(place, option), other])) in missing
                        for other in chosen.items()
                    )
                    for option in turns
                ]
                chosen[place] = turns[meets.index(max(meets))]
        missing -= set(itertools.combinations(sorted(chosen.items()), 2))
        cases.append(
            Case(
                **{names[place]: choices[names[place]][option] for place, option in chosen.items()}
            )
        )
    return cases


def case_config(
    modalities: Sequence[Modality],
    views: str = "single",
    *,
    kept_graphs: int = 0,
    dtype: Dtype = "bfloat16",
    backend: Backend = "auto",
) -> Config:
    """One data set of items: a view of each modality, paired with the next, or with one that has
    them all.
    """
    declared: dict[str, ViewConfig] = {name: ViewConfig(modalities=[name]) for name in modalities}
    if views == "fused" or len(modalities) == 1:
        declared["item"] = ViewConfig(modalities=list(modalities))
        pairs = [(name, "item") for name in modalities]
    else:
        pairs = list(itertools.pairwise(modalities))
    patterns = {f"{query}_to_{target}": PatternConfig(query, target) for query, target in pairs}
    return Config(
        seed=3,
        data=DataConfig(
            sets={
                "items": DatasetConfig(
                    kind="items", views=declared, patterns=patterns, temperature=0.2
                )
            }
        ),
        model=small_config(),
        step=StepConfig(kept_graphs=kept_graphs, backend=backend),
        parallel=ParallelConfig(dtype=dtype),
        objectives={"infonce": {"_target_": "sailplan.objective.infonce.InfoNCE"}},
    )


def whole_batch(config: Config, number: int) -> StepBatch:
    """A step's whole batch of the configuration's one data set: all rows are present, some
    frames, chunks and tokens are not.
    """
    ((name, dataset),) = config.data.sets.items()
    order, ids = torch.arange(ROWS), torch.arange(ROWS)
    views: dict[ViewKey, ViewBatch] = {}
    for place, (view, declared) in enumerate(dataset.views.items()):
        inputs = random_inputs(tuple(declared.modalities), ROWS, 100 * number + place)
        for mask in (inputs.token_mask, inputs.text_mask, inputs.image_mask, inputs.audio_mask):
            if mask is not None:
                mask[:, 1] = True
        views[view] = ViewBatch([inputs], order, torch.ones(ROWS, dtype=torch.bool), ids)
    patterns = {pattern: declared.weight for pattern, declared in dataset.patterns.items()}
    return StepBatch(
        step=number,
        dataset=name,
        record_ids=[str(row) for row in range(ROWS)],
        views=views,
        patterns=patterns,
    )


def plain_gradients(
    modalities: Sequence[Modality], views: str, dtype: torch.dtype, number: int = 2
) -> tuple[float, Gradients]:
    """Loss and gradients of a step's whole batch: an encoder of `dtype`, plain autograd, nothing
    frozen, no cache; in a world of one rank.
    """
    join_layout(1)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    config = case_config(modalities, views, backend="reference")
    encoder, objectives, temperatures = build_modules(config, wide)
    encoder.to(dtype)
    batch = share(whole_batch(config, number), 0, 1, 1, dtype=wide)
    encoded = {
        name: EncodedView(encoder(view.micro_batches[0]).fused[view.order], view.valid, view.ids)
        for name, view in batch.views.items()
    }
    context = ObjectiveContext(
        config.data.sets,
        Local(),
        temperatures,
        tuple(config.model.prefixes),
        "reference",
        compute_dtype=dtype,
    )
    objective = objectives["infonce"]
    assert isinstance(objective, Objective)
    loss = objective(EncodedStep(batch.dataset, encoded, batch.patterns), context).loss
    loss.backward()
    return loss.item(), {
        name: gradient.double()
        for name, gradient in named_gradients(encoder, objectives, temperatures).items()
    }


def _build(case: Case, config: Config, parallel: Parallel) -> tuple[TrainingStep, nn.ModuleDict]:
    dtype = getattr(torch, config.parallel.dtype)
    encoder, objectives, temperatures = build_modules(
        config, torch.float64 if dtype is torch.float64 else torch.float32
    )
    if case.activations == "repeated":
        checkpoint_activations(encoder)
    shard(
        encoder,
        parallel,
        shard=case.sharding != "replicate",
        replicas=2 if case.sharding == "hybrid" else 1,
        compute_dtype=dtype if dtype is torch.bfloat16 else None,
    )
    for module in (objectives, temperatures):
        module.to(parallel.device)
    optimizer = build_optimizer(encoder, objectives, temperatures, OptimizerConfig())
    set_learning_rate(
        optimizer, 0.0
    )  # weights stay what the reference has, whatever steps come before
    exchange = RowSplit(
        AllGather(parallel.data_parallel_group), AllGather(parallel.tensor_parallel_group)
    )
    whole = nn.ModuleDict(
        {"encoder": encoder, "objectives": objectives, "temperatures": temperatures}
    )
    return TrainingStep(
        encoder, objectives, temperatures, optimizer, config, parallel, exchange
    ), whole


def _batches(case: Case, config: Config, number: int, parallel: Parallel) -> list[StepBatch]:
    size = parallel.data_parallel_size
    rows = [ROWS, *[0] * (size - 1)] if case.rows == "none" else None
    dtype = torch.float64 if config.parallel.dtype == "float64" else torch.float32
    return [
        share(
            whole_batch(config, number),
            parallel.data_parallel_rank,
            size,
            case.micro_batches,
            rows,
            dtype,
        )
    ]


def case_step(
    case: Case, parallel: Parallel, folder: Path, *, dtype: Dtype = "bfloat16"
) -> tuple[TrainingStep, list[StepBatch]]:
    """A training step that has come as far as the case says, and this rank's rows of the step to
    do; folder: for a checkpoint, shared by all ranks.
    """
    config = case_config(case.modalities, case.views, kept_graphs=case.kept_graphs, dtype=dtype)
    step, whole = _build(case, config, parallel)
    if case.before != "nothing":
        # What another process did is done by another model: this one has gathered nothing yet.
        first, saved = (
            _build(case, config, parallel) if case.before == "a checkpoint" else (step, whole)
        )
        parts = case.trainable
        if case.before == "other parts":
            parts = tuple(
                part for part in PARTS if part not in case.trainable and "all" not in case.trainable
            ) or ("temperatures",)
        set_trainable(first.encoder, first.objectives, first.temperatures, parts)
        first.run(_batches(case, config, 1, parallel), {"infonce": 1.0}, step=1, stage="one")
        if case.before == "a checkpoint":
            save(folder, model=saved, optimizer=first.optimizer, extra={}, parallel=parallel)
            with torch.no_grad():
                for parameter in whole.parameters():
                    parameter.zero_()
            load(folder, model=whole, optimizer=step.optimizer, parallel=parallel)
            set_learning_rate(step.optimizer, 0.0)
    set_trainable(step.encoder, step.objectives, step.temperatures, case.trainable)
    return step, _batches(case, config, 2, parallel)


def case_gradients(
    case: Case, parallel: Parallel, folder: Path, *, dtype: Dtype = "bfloat16"
) -> tuple[float, Gradients]:
    """Loss and whole gradients of a case's step, on every rank of the layout."""
    step, batches = case_step(case, parallel, folder, dtype=dtype)
    loss, *_ = step.gradients(batches, {"infonce": 1.0}, step=2, stage="one")
    modules = (
        ("encoder", step.encoder),
        ("objectives", step.objectives),
        ("temperatures", step.temperatures),
    )
    parameters = {
        f"{prefix}.{name}": parameter
        for prefix, module in modules
        for name, parameter in module.named_parameters()
    }
    found = named_gradients(step.encoder, step.objectives, step.temperatures)
    return float(loss), {
        name: whole_tensor(parameters[name], gradient, parallel).cpu()
        for name, gradient in found.items()
    }


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, as a stage's `trainable` names it."""
    module, part, *_ = name.split(".")
    return part if module == "encoder" else module


def trained(name: str, trainable: Sequence[str]) -> bool:
    return "all" in trainable or part_of(name) in trainable


def apart(found: Gradients, expected: Gradients) -> dict[str, tuple[float, float]]:
    """Part -> (cosine, relative error) of all its gradients together; those that `found` has,
    which `expected` must have too.
    """
    measured = {}
    for part in sorted({part_of(name) for name in found}):
        names = [name for name in found if part_of(name) == part]
        one, other = (
            torch.cat([some[name].double().flatten() for name in names])
            for some in (found, expected)
        )
        measured[part] = (
            float(cosine_similarity(one, other, dim=0)),
            float((one - other).norm() / other.norm()),
        )
    return measured
