"""Rules between components, checked before any process group or model exists: each failure is one line that says what to do.

The rules of a component's own settings stand beside it (see `sailplan.config.components`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import get_args

from sailplan.config.components import validate
from sailplan.config.schema import ARTIFACT, Config, EvaluationTask, StageConfig
from sailplan.curriculum.config import Part
from sailplan.data.config import RATES
from sailplan.errors import ConfigurationError


def check(config: Config, world_size: int) -> None:
    """Raise ConfigurationError at the first rule that the configuration breaks for a world of `world_size` ranks."""
    validate(config)
    check_layout(config, world_size)
    if not config.order:
        raise ConfigurationError("order is empty: list the stages to run, as in conf/experiment/quickstart.yaml, or choose experiment=quickstart")
    for name in config.order:
        if name not in config.stages:
            raise ConfigurationError(f"order names the stage '{name}', but stages has: {', '.join(config.stages) or 'none'}")
        if config.order.count(name) > 1:
            raise ConfigurationError(f"order names the stage '{name}' more than once, which would mix their files: give the second its own name in stages")
        _check_stage(config, name, config.stages[name])
    for name, task in config.evaluation.tasks.items():
        check_task(config, name, task)
    if config.model.audio.mel_bins != config.data.mel_bins:
        raise ConfigurationError(f"model.audio.mel_bins={config.model.audio.mel_bins}: expected data.mel_bins={config.data.mel_bins}, what the decoder makes")
    _check_sound(config)
    _check_pictures(config)


def check_layout(config: Config, world_size: int) -> None:
    """Raise ConfigurationError where the world or a batch cannot be cut as the configuration says."""
    config.parallel.check_world(world_size)
    data_parallel = world_size // config.parallel.tensor
    if config.parallel.sequence:
        _check_sequence(config)
    if config.data.lanes % data_parallel:
        raise ConfigurationError(
            f"data.lanes={config.data.lanes} does not divide by the data-parallel size {data_parallel}: use a multiple of every size you plan to use"
        )
    batches = {"global_batch": config.global_batch} | {f"stages.{name}.global_batch": stage.global_batch for name, stage in config.stages.items()}
    for key, rows in batches.items():
        if rows is not None and (rows < 1 or rows % config.data.lanes):
            raise ConfigurationError(f"{key}={rows} does not divide by data.lanes={config.data.lanes}: use a multiple of data.lanes")


def check_device(config: Config) -> None:
    """Raise ConfigurationError for what this machine's devices cannot run; `check` says the rest, which can be said anywhere."""
    import torch

    if torch.cuda.is_available():
        return
    for key, on, needs in (
        ("parallel.cuda_graphs", config.parallel.cuda_graphs, "CUDA"),
        ("parallel.sequence", config.parallel.sequence, "GPUs, which megatron-core's sequence parallelism needs"),
    ):
        if on:
            raise ConfigurationError(f"{key} is on, but there is no GPU here: expected {needs}; leave it off")


def _check_sequence(config: Config) -> None:
    lora = config.model.lora
    for key, found, expected, fits in (
        ("parallel.tensor", config.parallel.tensor, "2 or more", config.parallel.tensor > 1),
        ("parallel.compile", config.parallel.compile, "none", config.parallel.compile == "none"),
        ("model.tower.dropout", config.model.tower.dropout, "0", config.model.tower.dropout == 0),
        ("model.lora.rank", lora.rank, "0, or model.lora.parts without tower", not lora.rank or "tower" not in lora.parts),
        ("model.vision.deepstack", list(config.model.vision.deepstack), "[]: its features are added to whole sequences", not config.model.vision.deepstack),
    ):
        if not fits:
            raise ConfigurationError(f"parallel.sequence is on, but {key} is {found}: expected {expected}; leave parallel.sequence off")


def check_task(config: Config, name: str, task: EvaluationTask) -> None:
    """Raise ConfigurationError where a task asks for what its data set has not, whatever the shards hold."""
    key = f"evaluation.tasks.{name}"
    _one_of(f"{key}.dataset", task.dataset, config.data.sets)
    dataset = config.data.sets[task.dataset]
    if dataset.shards.startswith(ARTIFACT):
        raise ConfigurationError(f"{key}.dataset={task.dataset}: a stage makes its shards ({dataset.shards}); expected a data set that is there before the run")
    if task.kind != "clustering" and (task.kind == "sequence") != (dataset.kind == "sequences"):
        wanted = "sequences" if task.kind == "sequence" else "items or pairs; for sequences use kind: sequence"
        raise ConfigurationError(f"{key}.kind={task.kind}: data set '{task.dataset}' is of kind {dataset.kind}; expected {wanted}")
    for side, view in (("query", task.query), ("target", task.target)):
        if (view or side == "query" or task.kind != "clustering") and view not in dataset.views:
            raise ConfigurationError(f"{key}.{side}={view}: data set '{task.dataset}' has the views {', '.join(dataset.views)}")


def _check_pictures(config: Config) -> None:
    data, vision = config.data, config.model.vision
    pixels = vision.patch * (vision.merge if vision.backbone == "qwen3_vl" else 1)
    if vision.backbone == "siglip2":
        if data.image_patches is None or data.image_patches < 1:
            raise ConfigurationError(
                f"data.image_patches={data.image_patches}: expected a number of patches with model.vision.backbone=siglip2; 256 is what its files know"
            )
        if data.image_patch != vision.patch:
            raise ConfigurationError(f"data.image_patch={data.image_patch}: expected model.vision.patch={vision.patch}")
    elif data.image_patches is not None:
        raise ConfigurationError(
            f"data.image_patches={data.image_patches}: expected null with model.vision.backbone={vision.backbone}, which sees squares of data.image_size"
        )
    elif pixels > 0 and data.image_size % pixels:
        raise ConfigurationError(f"data.image_size={data.image_size}: expected a multiple of {pixels}, the side of model.vision's tokens in pixels")


def _check_sound(config: Config) -> None:
    data, audio = config.data, config.model.audio
    if audio.backbone in RATES and data.spectrogram != audio.backbone:
        raise ConfigurationError(
            f"data.spectrogram={data.spectrogram}: expected {audio.backbone}, what model.audio.backbone={audio.backbone} was made for; "
            f"data.audio_rate is then {RATES[audio.backbone]}"
        )
    if audio.backbone in ("clap", "clap_fusion") and data.audio_chunk_seconds * 100 + 1 > audio.swin.image**2 // audio.mel_bins:
        longest = (audio.swin.image**2 // audio.mel_bins - 1) / 100
        raise ConfigurationError(
            f"data.audio_chunk_seconds={data.audio_chunk_seconds}: expected at most {longest:g} with model.audio.backbone={audio.backbone}, "
            "whose files know chunks of 10 s"
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
        raise ConfigurationError(f"{key}.objectives is empty: name at least one of {', '.join(config.objectives)} and its weight")
    if not stage.trainable:
        raise ConfigurationError(f"{key}.trainable is empty: expected all, or some of {', '.join(get_args(Part)[1:])}; a stage that trains nothing is none")
    if "lora" in stage.trainable and not config.model.lora.rank:
        raise ConfigurationError(f"{key}.trainable names lora, but model.lora.rank is 0: set a rank, 8 to 32 are usual")
    if set(stage.trainable) == {"perceiver"} and config.model.vision.backbone == "qwen3_vl":
        raise ConfigurationError(
            f"{key}.trainable names the perceiver alone, which model.vision.backbone=qwen3_vl does not have: nothing would be trained; "
            "expected a part with parameters, such as vision or tower"
        )
    named = {**stage.patterns, **(stage.hard_negatives.patterns if stage.hard_negatives else {})}
    for dataset, patterns in named.items():
        _one_of(f"{key}.patterns", dataset, stage.data)
        for pattern in patterns:
            _one_of(f"{key}.patterns.{dataset}", pattern, config.data.sets[dataset].patterns)
    if (stage.balance or (stage.subset and stage.subset.nearest)) and not config.evaluation.benchmark:
        raise ConfigurationError(f"{key} measures similarity to the benchmark: list its tasks in evaluation.benchmark")


def _one_of(key: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ConfigurationError(f"{key}={value}: expected one of {', '.join(allowed)}")
