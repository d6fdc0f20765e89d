"""A mixed step that uses every loss at once, in miniature, and the same step's gradients by
plain autograd.

Four data sets: items with pictures, names and speech (InfoNCE over patterns that share views,
mined hard negatives, mICL, late fusion, id2item, classes for the multi-positive loss), graded pairs
(CoSENT), histories (seq2item), and pairs with negatives that a teacher scored (score distillation).
Rows lack modalities, ids repeat, some rows are not valid. `global_batches` makes the whole batch;
`share` cuts a rank's rows and micro-batches out of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from sailplan.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    PatternConfig,
    PatternKey,
    StepConfig,
    ViewConfig,
)
from sailplan.data.config import Modality
from sailplan.data.negatives import MatchThreshold
from sailplan.data.record import (
    EncoderInputs,
    HardNegatives,
    StepBatch,
    TeacherKey,
    ViewBatch,
    ViewKey,
)
from sailplan.model.component import EncoderComponent
from sailplan.model.encoders.transformers.processor import PRESENT
from sailplan.model.protocol import Encoder
from sailplan.model.testing import random_inputs, small_config
from sailplan.model.tower import OmniEncoder
from sailplan.objective.protocol import EncodedStep, EncodedView, Objective, ObjectiveContext
from sailplan.objective.registry import build_objectives
from sailplan.objective.temperature import Temperatures
from sailplan.parity.published import TINY, tiny_inputs, tiny_settings
from sailplan.step.config import Backend
from sailplan_kernels.exchange import Local

OMNI = "omni"
WEIGHTS = {
    "infonce": 1.0,
    "cosent": 0.3,
    "micl": 0.4,
    "late_fusion": 0.5,
    "seq2item": 0.7,
    "id2item": 0.6,
    "sigmoid": 0.2,
    "multi_positive": 0.5,
    "score_distillation": 0.4,
}
THRESHOLDS = {PatternKey("items", "name_to_item"): MatchThreshold(0.6, {4: 0.75, 8: 0.65})}
ROWS = {"items": 32, "pairs": 16, "sequences": 8, "scored": 8}
HISTORY, HARD_NEGATIVES = 3, 2
TEACHERS = {"svd": 3, "nmf": 5}


def step_config(
    *,
    kept_graphs: int = 0,
    dropout: float = 0.0,
    backend: Backend = "chunked",
    vision: str = "own",
    encoder: str = OMNI,
) -> Config:
    """A configuration with four data sets and all objectives over model.testing's small
    encoder; vision: as there.

    encoder: omni, or one of parity.published, without the views that it cannot encode.
    """
    items = DatasetConfig(
        kind="items",
        views={
            "image": ViewConfig(modalities=["vision"]),
            "name": ViewConfig(modalities=["text"]),
            "item": ViewConfig(modalities=["vision", "text"]),
            "speech": ViewConfig(modalities=["audio"]),
        },
        patterns={
            "image_to_name": PatternConfig("image", "name", 1.0),
            "name_to_item": PatternConfig("name", "item", 0.5),
            "image_to_item": PatternConfig("image", "item", 0.7),
            "speech_to_name": PatternConfig("speech", "name", 0.3),
        },
        temperature=0.2,
        label="class",
    )
    both: list[Modality] = ["vision", "text"]
    pairs = DatasetConfig(
        kind="pairs",
        views={"query": ViewConfig("query", both), "item": ViewConfig("target", both)},
        patterns={"item_to_item": PatternConfig("query", "item")},
        temperature=0.1,
        symmetric=False,
    )
    scored = DatasetConfig(
        kind="pairs",
        views={"query": ViewConfig("query", ["text"]), "item": ViewConfig("target", both)},
        patterns={"query_to_item": PatternConfig("query", "item")},
        negatives=HARD_NEGATIVES,
        teacher_scores="scores",
    )
    sequences = DatasetConfig(
        kind="sequences",
        views={"history": ViewConfig("history", both), "item": ViewConfig("target", both)},
        patterns={"history_to_item": PatternConfig("history", "item")},
        history_length=HISTORY,
    )
    sets = {"items": items, "pairs": pairs, "sequences": sequences, "scored": scored}
    if encoder != OMNI:
        for dataset in sets.values():
            _show_only(dataset, TINY[encoder][0])
    return Config(
        seed=3,
        data=DataConfig(sets=sets),
        model=small_config(dropout, vision=vision) if encoder == OMNI else tiny_settings(encoder),
        step=StepConfig(kept_graphs=kept_graphs, backend=backend),
        objectives={
            "infonce": {"_target_": "sailplan.objective.infonce.InfoNCE", "margin_absolute": 0.4},
            "cosent": {"_target_": "sailplan.objective.cosent.CoSENT", "matryoshka": True},
            "micl": {"_target_": "sailplan.objective.micl.MICL"},
            "late_fusion": {"_target_": "sailplan.objective.late_fusion.LateFusion"},
            "seq2item": {
                "_target_": "sailplan.objective.seq2item.Seq2Item",
                "pooling": "encoder",
                "layers": 1,
                "heads": 2,
                "positions": True,
            },
            "id2item": {
                "_target_": "sailplan.objective.id2item.ID2Item",
                "teachers": TEACHERS,
                "form": "relational",
            },
            "sigmoid": {
                "_target_": "sailplan.objective.sigmoid.Sigmoid",
                "bias": -2.0,
                "by": "modality",
                "matryoshka": True,
            },
            "multi_positive": {"_target_": "sailplan.objective.multi_positive.MultiPositive"},
            "late_interaction": {
                "_target_": "sailplan.objective.late_interaction.LateInteraction",
                "dimension": 6,
            },
            "score_distillation": {
                "_target_": "sailplan.objective.score_distillation.ScoreDistillation",
                "temperature": 0.2,
                "matryoshka": True,
            },
        },
    )


def _show_only(dataset: DatasetConfig, modalities: Sequence[str]) -> None:
    """Leave out what an encoder has not: modalities of views, in the end whole views, and their
    patterns.
    """
    for view in dataset.views.values():
        view.modalities = [modality for modality in view.modalities if modality in modalities]
    dataset.views = {name: view for name, view in dataset.views.items() if view.modalities}
    dataset.patterns = {
        name: one
        for name, one in dataset.patterns.items()
        if {one.query, one.target} <= dataset.views.keys()
    }


def build_modules(
    config: Config,
    dtype: torch.dtype = torch.float64,
    *,
    share_encoders: bool = True,
    sequence_parallel: bool = False,
) -> tuple[Encoder, nn.ModuleDict, Temperatures]:
    """Encoder, objectives and temperatures; the parameters that start at zero are moved away
    from it. Equal in all dtypes up to rounding.
    """
    encoder: Encoder
    if isinstance(config.model, ModelConfig):
        encoder = OmniEncoder(
            config.model,
            dtype=dtype,
            seed=config.seed,
            share_encoders=share_encoders,
            sequence_parallel=sequence_parallel,
        )
    else:
        component: EncoderComponent = config.model.component()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            encoder = component.module(dtype)
    objectives = build_objectives(
        config.objectives, config.model.embedding, config.data.sets, seed=config.seed
    ).double()
    temperatures = Temperatures(config.data.sets, config.data.temperature_by).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in objectives.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            )
    return encoder, objectives.to(dtype), temperatures.to(dtype)


def _view(
    modalities: Sequence[str], rows: int, group: int, seed: int, vision: str | None
) -> ViewBatch:
    """vision: None: for a published encoder."""
    generator = torch.Generator().manual_seed(seed)
    inputs: EncoderInputs
    present = torch.zeros(rows * group, dtype=torch.bool)
    if vision is None:
        inputs = tiny_inputs(modalities, rows * group, seed)
        present |= list(modalities) == ["text"]
        for modality in modalities:
            if PRESENT[modality] in inputs.named:
                present |= inputs.named[PRESENT[modality]].view(rows * group, -1).any(1)
    else:
        inputs = random_inputs(tuple(modalities), rows * group, seed, vision=vision)
        for modality, mask in (
            ("text", inputs.text_mask),
            ("vision", inputs.image_mask),
            ("audio", inputs.audio_mask),
        ):
            if modality in modalities and mask is not None:
                present |= mask.any(1)
    valid = present & (torch.rand(rows * group, generator=generator) < 0.9)
    ids = torch.randint(0, 3 * rows, (rows * group,), generator=generator)
    return ViewBatch([inputs], torch.arange(rows * group), valid, ids, group)


def global_batches(config: Config, step: int) -> list[StepBatch]:
    """The whole batch of a step: one StepBatch for each data set, each view in one micro-batch."""
    batches, vision = (
        [],
        config.model.vision.backbone if isinstance(config.model, ModelConfig) else None,
    )
    for number, (name, dataset) in enumerate(config.data.sets.items()):
        rows, seed = ROWS[name], 1000 * step + 100 * number
        views: dict[ViewKey, ViewBatch] = {
            view: _view(
                declared.modalities,
                rows,
                HISTORY if declared.of == "history" else 1,
                seed + place,
                vision,
            )
            for place, (view, declared) in enumerate(dataset.views.items())
        }
        if "image_to_name" in dataset.patterns:
            views[HardNegatives("image_to_name")] = _view(
                ["text"], rows, HARD_NEGATIVES, seed + 50, vision
            )
        for pattern, declared in dataset.patterns.items() if dataset.negatives else ():
            shown = dataset.views[declared.target].modalities
            views[HardNegatives(pattern)] = _view(shown, rows, HARD_NEGATIVES, seed + 70, vision)
        generator = torch.Generator().manual_seed(seed + 60)
        unknown = torch.rand(rows, 1, generator=generator) < 0.2
        teachers = {
            TeacherKey("item", teacher): torch.randn(rows, size, generator=generator).masked_fill(
                unknown, 0.0
            )
            for teacher, size in TEACHERS.items()
        }
        scores = torch.randint(0, 4, (rows,), generator=generator) / 4
        teacher_scores = torch.rand(rows, 1 + HARD_NEGATIVES, generator=generator)
        teacher_scores[torch.rand(teacher_scores.shape, generator=generator) < 0.1] = torch.nan
        batches.append(
            StepBatch(
                step=step,
                dataset=name,
                record_ids=[f"{name}/{row}" for row in range(rows)],
                views=views,
                scores=scores if name == "pairs" else None,
                teachers=teachers if name == "items" else {},
                teacher_scores=teacher_scores if dataset.teacher_scores else None,
                labels=torch.randint(-1, 6, (rows,), generator=generator)
                if name == "items"
                else None,
                patterns={
                    pattern: declared.weight for pattern, declared in dataset.patterns.items()
                },
            )
        )
    return batches


def _rows(inputs: EncoderInputs, chosen: Tensor, dtype: torch.dtype) -> EncoderInputs:
    return inputs.mapped(
        lambda tensor: tensor[chosen].to(dtype if tensor.is_floating_point() else tensor.dtype)
    )


def share(
    batch: StepBatch,
    rank: int,
    size: int,
    micro_batches: int,
    rows: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> StepBatch:
    """A data-parallel rank's rows of a whole batch, in shuffled order, cut into micro-batches of
    rows / `micro_batches`.

    rows: of each rank, in rank order (default: equal parts). As in a real step, all ranks have as
    many micro-batches as the one with most rows; those that others have no rows for are empty.
    """
    rows = [len(batch.record_ids) // size] * size if rows is None else rows
    assert len(rows) == size and sum(rows) == len(batch.record_ids)
    micro_batch = -(-max(rows) // micro_batches)
    start, stop = sum(rows[:rank]), sum(rows[: rank + 1])
    views = {}
    for name, view in batch.views.items():
        mine = slice(start * view.group, stop * view.group)
        shuffled = torch.randperm(
            mine.stop - mine.start, generator=torch.Generator().manual_seed(rank)
        )
        count = -(-max(rows) * view.group // micro_batch)
        parts = [
            shuffled[number * micro_batch : (number + 1) * micro_batch] for number in range(count)
        ]
        inputs = [_rows(view.micro_batches[0], mine.start + chosen, dtype) for chosen in parts]
        views[name] = ViewBatch(
            inputs, shuffled.argsort(), view.valid[mine], view.ids[mine], view.group
        )
    own = slice(start, stop)
    return dataclasses.replace(
        batch,
        record_ids=batch.record_ids[own],
        views=views,
        scores=None if batch.scores is None else batch.scores[own],
        teachers={name: vectors[own] for name, vectors in batch.teachers.items()},
        teacher_scores=None if batch.teacher_scores is None else batch.teacher_scores[own],
        labels=None if batch.labels is None else batch.labels[own],
        target_log_probability=None
        if batch.target_log_probability is None
        else batch.target_log_probability[own],
        rank_rows=tuple(rows),
    )


def full_batch_gradients(
    weights: dict[str, float],
    step: int = 1,
    datasets: Sequence[str] = tuple(ROWS),
    change: Callable[[StepBatch], StepBatch] | None = None,
    vision: str = "own",
    encoder: str = OMNI,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole batch in one process by plain autograd: no cache, no
    exchange, reference backend.

    change: done to each data set's whole batch first. vision, encoder: of `step_config`.
    """
    config = step_config(backend="reference", vision=vision, encoder=encoder)
    module, objectives, temperatures = build_modules(config)
    context = ObjectiveContext(
        config.data.sets,
        Local(),
        temperatures,
        tuple(config.model.prefixes),
        "reference",
        dict(THRESHOLDS),
    )
    batches = [
        change(batch) if change else batch
        for batch in global_batches(config, step)
        if batch.dataset in datasets
    ]
    rows = sum(len(batch.record_ids) for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    asked = {"tokens": True} if any(objectives[name].per_token for name in weights) else {}
    for batch in batches:
        views = {}
        for name, view in batch.views.items():
            vectors = module(view.micro_batches[0], per_modality=True, **asked)
            views[name] = EncodedView(
                vectors.fused,
                view.valid,
                view.ids,
                view.group,
                vectors.by_modality,
                vectors.tokens,
                vectors.token_mask,
            )
        encoded = EncodedStep(
            batch.dataset,
            views,
            batch.patterns,
            batch.scores,
            batch.teachers,
            batch.teacher_scores,
            batch.labels,
            batch.target_log_probability,
        )
        for name, weight in weights.items():
            objective = objectives[name]
            assert isinstance(objective, Objective)
            if objective.applies(config.data.sets[batch.dataset]):
                total = (
                    total + weight * len(batch.record_ids) / rows * objective(encoded, context).loss
                )
    total.backward()
    return total.item(), named_gradients(module, objectives, temperatures)


def named_gradients(
    encoder: nn.Module, objectives: nn.Module, temperatures: nn.Module
) -> dict[str, Tensor]:
    """The gradients that exist, by name, as they lie in `.grad`."""
    modules = (("encoder", encoder), ("objectives", objectives), ("temperatures", temperatures))
    named = (
        (f"{prefix}.{name}", parameter)
        for prefix, module in modules
        for name, parameter in module.named_parameters()
    )
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


Call = tuple[
    str, tuple[int, ...], tuple[object, ...]
]  # operation, the group's ranks, (shape, dtype) of every tensor


class Recorder(TorchDispatchMode):
    """All collectives of this rank, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self,
        function: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if function.namespace == "c10d":
            group, tensors = None, []
            for argument in args:
                if isinstance(argument, Tensor):
                    tensors.append(argument)
                elif isinstance(argument, list):
                    tensors += [
                        each
                        for part in argument
                        for each in (part if isinstance(part, list) else [part])
                        if isinstance(each, Tensor)
                    ]
                elif "ProcessGroup" in str(getattr(argument, "_type", lambda: "")()):
                    group = dist.ProcessGroup.unbox(argument)
            assert group is not None, (
                f"{function}: no group among {[type(argument) for argument in args]}"
            )
            ranks = tuple(dist.get_process_group_ranks(group))
            self.calls.append(
                (
                    function.__name__.partition(".")[0],
                    ranks,
                    tuple((tuple(t.shape), str(t.dtype)) for t in tensors),
                )
            )
        return function(*args, **(kwargs or {}))
