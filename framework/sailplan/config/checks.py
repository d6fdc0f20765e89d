"""Rules between fields, checked before any process group or model exists: each failure is one line that says what to do."""

from __future__ import annotations

import torch

from sailplan.config.ranges import check_ranges
from sailplan.config.schema import ARTIFACT, MODALITIES, Config, DatasetConfig, EvaluationTask, StageConfig
from sailplan.errors import ConfigurationError
from sailplan_kernels.exchange import ALL_EXCHANGES

KINDS = {"items": ("item",), "pairs": ("query", "target"), "sequences": ("history", "target")}  # and the parts that their records have
PARTS = ("all", "text", "vision", "perceiver", "audio", "tower", "lora", "objectives", "temperatures")
INITIALISED = ("encoder", "objectives", "temperatures")  # what `initialise_from` can take
RATES = {"whisper": 16000, "clap": 48000, "clap_fusion": 48000}  # Hz, of the front ends that published sound encoders were made for
ARTIFACTS = ("interests", "teachers", "co_occurrence")
TASK_KINDS = ("retrieval", "classification", "clustering", "sequence")
METRICS = ("recall", "prefixes", "auc", "gap", "bijection", "kendall", "overlap", "nmi")  # of an evaluation task


def _one_of(key: str, value: str, allowed: tuple[str, ...] | list[str]) -> None:
    if value not in allowed:
        raise ConfigurationError(f"{key}={value}: expected one of {', '.join(map(str, allowed))}")


def check(config: Config, world_size: int) -> None:
    """Raises ConfigurationError at the first rule that the configuration breaks for a world of `world_size` ranks."""
    check_ranges(config)
    _check_parallel(config, world_size)
    _one_of("resume", config.resume, ("never", "auto"))
    for part in config.initialise_parts:
        _one_of("initialise_parts", part, INITIALISED)
    if config.initialise_from is not None and not config.initialise_parts:
        raise ConfigurationError(f"initialise_parts is empty beside initialise_from={config.initialise_from}: name some of {', '.join(INITIALISED)}")
    _one_of("tracking.wandb", config.tracking.wandb, ("offline", "online", "disabled"))
    _one_of("parallel.exchange", config.parallel.exchange, tuple(ALL_EXCHANGES))
    _one_of("step.backend", config.step.backend, ("auto", "reference", "chunked", "triton"))
    _one_of("step.dealing", config.step.dealing, ("length", "lanes"))
    if "/" in config.name or not config.name:
        raise ConfigurationError(f"name={config.name!r}: expected a folder name without '/'")
    for name in config.data.sets:
        check_dataset(config, name)
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
    for name in config.evaluation.benchmark:
        _one_of("evaluation.benchmark", name, list(config.evaluation.tasks))
    if config.model.audio.mel_bins != config.data.mel_bins:
        raise ConfigurationError(f"model.audio.mel_bins={config.model.audio.mel_bins}: expected data.mel_bins={config.data.mel_bins}, what the decoder makes")
    _check_sound(config)
    _check_pictures(config)
    prefixes = config.model.prefixes
    if not prefixes or sorted(set(prefixes)) != list(prefixes) or prefixes[-1] > config.model.embedding:
        raise ConfigurationError(f"model.prefixes={prefixes}: expected rising sizes up to model.embedding={config.model.embedding}")


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
    _one_of("data.spectrogram", data.spectrogram, ("own", *RATES))
    rate = RATES.get(data.spectrogram, data.audio_rate)
    if data.audio_rate != rate:
        raise ConfigurationError(f"data.audio_rate={data.audio_rate}: expected {rate}, the rate of data.spectrogram={data.spectrogram}")
    if audio.backbone in RATES and data.spectrogram != audio.backbone:
        raise ConfigurationError(
            f"data.spectrogram={data.spectrogram}: expected {audio.backbone}, what model.audio.backbone={audio.backbone} was made for; "
            f"data.audio_rate is then {RATES[audio.backbone]}"
        )
    if data.spectrogram == "clap_fusion" and data.audio_chunks != 1:
        raise ConfigurationError(f"data.audio_chunks={data.audio_chunks}: expected 1 with data.spectrogram=clap_fusion, which shows a recording as a whole")
    if audio.backbone in ("clap", "clap_fusion") and data.audio_chunk_seconds * 100 + 1 > audio.swin.image**2 // audio.mel_bins:
        longest = (audio.swin.image**2 // audio.mel_bins - 1) / 100
        raise ConfigurationError(
            f"data.audio_chunk_seconds={data.audio_chunk_seconds}: expected at most {longest:g} with model.audio.backbone={audio.backbone}, "
            "whose files know chunks of 10 s"
        )


def _check_parallel(config: Config, world_size: int) -> None:
    tensor = config.parallel.tensor
    if tensor < 1 or world_size % tensor:
        raise ConfigurationError(
            f"parallel.tensor={tensor} does not divide the world of {world_size} processes: use a divisor, or start another number of processes"
        )
    _one_of("parallel.dtype", config.parallel.dtype, ("float32", "bfloat16", "float64"))
    _one_of("parallel.sharding", config.parallel.sharding, ("auto", "shard", "hybrid", "replicate"))
    _one_of("parallel.encoders", config.parallel.encoders, ("share", "tensor"))
    data_parallel = world_size // tensor
    _one_of("parallel.activation_checkpointing", config.parallel.activation_checkpointing, ("none", "full"))
    _one_of("parallel.compile", config.parallel.compile, ("none", "blocks"))
    _one_of("parallel.fused", config.parallel.fused, ("none", "auto", "apex", "transformer_engine"))
    if config.parallel.fused not in ("none", "auto") and config.parallel.compile != "none":
        raise ConfigurationError(
            f"parallel.fused={config.parallel.fused} beside parallel.compile={config.parallel.compile}: expected one of the two, as no compiler "
            "looks into the extension's kernels; set parallel.fused=none, or parallel.compile=none"
        )
    if config.parallel.sequence:
        _check_sequence(config)
    if config.parallel.cuda_graphs and config.parallel.compile != "blocks":
        raise ConfigurationError("parallel.cuda_graphs is on beside parallel.compile=none: expected blocks, what the graphs are recorded of; set it")
    replicas = config.parallel.replicas
    if config.parallel.sharding == "hybrid" and (replicas < 1 or data_parallel % replicas):
        allowed = ", ".join(str(size) for size in range(1, data_parallel + 1) if data_parallel % size == 0)
        raise ConfigurationError(f"parallel.replicas={replicas} does not divide the data-parallel size {data_parallel}: expected one of {allowed}")
    if config.data.lanes % data_parallel:
        raise ConfigurationError(
            f"data.lanes={config.data.lanes} does not divide by the data-parallel size {data_parallel}: use a multiple of every size you plan to use"
        )
    batches = {"global_batch": config.global_batch} | {f"stages.{name}.global_batch": stage.global_batch for name, stage in config.stages.items()}
    for key, rows in batches.items():
        if rows is not None and (rows < 1 or rows % config.data.lanes):
            raise ConfigurationError(f"{key}={rows} does not divide by data.lanes={config.data.lanes}: use a multiple of data.lanes")


def check_device(config: Config) -> None:
    """Raises ConfigurationError for what this machine's devices cannot run; `check` says the rest, which can be said anywhere."""
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


def check_dataset(config: Config, name: str) -> None:
    """Raises ConfigurationError at the first thing in data.sets.NAME that cannot work, whatever the shards hold."""
    dataset, key = config.data.sets[name], f"data.sets.{name}"
    if dataset.kind not in KINDS:
        raise ConfigurationError(f"{key}.kind={dataset.kind}: expected one of {', '.join(KINDS)}")
    _check_catalogue(config, name, dataset)
    if dataset.negatives < 0 or (dataset.negatives and dataset.kind == "items"):
        raise ConfigurationError(
            f"{key}.negatives={dataset.negatives}: expected 0 or more for pairs and sequences, whose records list them, and 0 for items"
        )
    for view_name, view in dataset.views.items():
        place = f"{key}.views.{view_name}"
        if view.of not in KINDS[dataset.kind]:
            raise ConfigurationError(f"{place}.of={view.of}: a data set of kind '{dataset.kind}' has {', '.join(KINDS[dataset.kind])}")
        unknown = [modality for modality in view.modalities if modality not in MODALITIES]
        if unknown or not view.modalities:
            raise ConfigurationError(f"{place}.modalities={view.modalities}: expected some of {', '.join(MODALITIES)}")
        if "text" in view.modalities and not view.fields:
            raise ConfigurationError(f"{place}.fields is empty: a view with text needs the names of its text fields, such as title")
        if view.pick not in ("join", "one"):
            raise ConfigurationError(f"{place}.pick={view.pick}: expected join or one")
    for pattern_name, pattern in dataset.patterns.items():
        for side in (pattern.query, pattern.target):
            if side not in dataset.views:
                raise ConfigurationError(f"{key}.patterns.{pattern_name}: no view '{side}'; this data set has: {', '.join(dataset.views) or 'none'}")


def check_task(config: Config, name: str, task: EvaluationTask) -> None:
    """Raises ConfigurationError at the first thing in evaluation.tasks.NAME that cannot be, whatever the shards hold."""
    key = f"evaluation.tasks.{name}"
    _one_of(f"{key}.dataset", task.dataset, list(config.data.sets))
    dataset = config.data.sets[task.dataset]
    if dataset.shards.startswith(ARTIFACT):
        raise ConfigurationError(f"{key}.dataset={task.dataset}: a stage makes its shards ({dataset.shards}); expected a data set that is there before the run")
    _one_of(f"{key}.kind", task.kind, TASK_KINDS)
    if task.kind != "clustering" and (task.kind == "sequence") != (dataset.kind == "sequences"):
        wanted = "sequences" if task.kind == "sequence" else "items or pairs; for sequences use kind: sequence"
        raise ConfigurationError(f"{key}.kind={task.kind}: data set '{task.dataset}' is of kind {dataset.kind}; expected {wanted}")
    for side, view in (("query", task.query), ("target", task.target)):
        if (view or side == "query" or task.kind != "clustering") and view not in dataset.views:
            raise ConfigurationError(f"{key}.{side}={view}: data set '{task.dataset}' has the views {', '.join(dataset.views)}")
    unknown = [metric for metric in task.metrics if metric not in METRICS]
    if unknown:
        raise ConfigurationError(f"{key}.metrics: found {', '.join(unknown)}; expected some of {', '.join(METRICS)}")
    _one_of(f"{key}.candidates", task.candidates, ("split", "all"))
    if task.kind == "clustering" and task.label is None:
        raise ConfigurationError(f"{key}.label is empty: expected the key of the records that holds the label, such as subgroup")


def _check_catalogue(config: Config, name: str, dataset: DatasetConfig) -> None:
    key = f"data.sets.{name}.catalogue"
    if dataset.kind == "items":
        return
    if not dataset.catalogue:
        raise ConfigurationError(f"{key} is missing: a data set of kind '{dataset.kind}' refers to the items of another data set by id")
    if dataset.catalogue not in config.data.sets:
        raise ConfigurationError(f"{key}={dataset.catalogue}: no such data set; data.sets has: {', '.join(config.data.sets)}")
    if config.data.sets[dataset.catalogue].kind != "items":
        raise ConfigurationError(f"{key}={dataset.catalogue}: is of kind '{config.data.sets[dataset.catalogue].kind}', expected 'items'")


def _check_stage(config: Config, name: str, stage: StageConfig) -> None:
    key = f"stages.{name}"
    if not stage.data:
        raise ConfigurationError(f"{key}.data is empty: name at least one data set and its weight")
    for dataset in stage.data:
        _one_of(f"{key}.data", dataset, list(config.data.sets))
    for objective in stage.objectives:
        _one_of(f"{key}.objectives", objective, list(config.objectives))
    if not stage.objectives:
        raise ConfigurationError(f"{key}.objectives is empty: name at least one of {', '.join(config.objectives)} and its weight")
    if not stage.trainable:
        raise ConfigurationError(f"{key}.trainable is empty: expected all, or some of {', '.join(PARTS[1:])}; a stage that trains nothing is none")
    for part in stage.trainable:
        _one_of(f"{key}.trainable", part, PARTS)
        if part == "lora" and not config.model.lora.rank:
            raise ConfigurationError(f"{key}.trainable names lora, but model.lora.rank is 0: set a rank, 8 to 32 are usual")
    if set(stage.trainable) == {"perceiver"} and config.model.vision.backbone == "qwen3_vl":
        raise ConfigurationError(
            f"{key}.trainable names the perceiver alone, which model.vision.backbone=qwen3_vl does not have: nothing would be trained; "
            "expected a part with parameters, such as vision or tower"
        )
    for artifact in stage.artifacts:
        _one_of(f"{key}.artifacts", artifact, ARTIFACTS)
    named = {**stage.patterns, **(stage.hard_negatives.patterns if stage.hard_negatives else {})}
    for dataset, patterns in named.items():
        _one_of(f"{key}.patterns", dataset, list(stage.data))
        for pattern in patterns:
            _one_of(f"{key}.patterns.{dataset}", pattern, list(config.data.sets[dataset].patterns))
    if (stage.balance or (stage.subset and stage.subset.nearest)) and not config.evaluation.benchmark:
        raise ConfigurationError(f"{key} measures similarity to the benchmark: list its tasks in evaluation.benchmark")
