"""The typed configuration of a run: what every YAML file below conf/ is converted to, once, at start.

Each component owns one dataclass; nothing below this package sees a DictConfig. Units are in the
field comments. Cross-field rules live in `sailplan.config.checks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MODALITIES = ("text", "vision", "audio")
ARTIFACT = "artifact:"  # shards of a data set that a stage makes at its start


# ---------------------------------------------------------------- data sets
@dataclass
class ViewConfig:
    """One way to show a record's item to the encoder: which item, which modalities, which text, which prompt."""

    of: str = "item"  # item | query | target | history: which item(s) of the record
    modalities: list[str] = field(default_factory=lambda: ["text"])
    fields: list[str] = field(default_factory=list)  # text fields, in order; used when "text" is in modalities
    pick: str = "join"  # join: all fields in one text; one: one random entry of the fields (keyword sampling)
    prompt: str = ""  # task sentence put before the item's fields


@dataclass
class PatternConfig:
    """A query view to be matched with a target view, and its weight in the step's loss."""

    query: str = ""
    target: str = ""
    weight: float = 1.0


@dataclass
class DatasetConfig:
    """A data set: where its shards are, what its records hold, and which patterns it trains."""

    shards: str = ""  # folder or brace pattern of webdataset tars; "artifact:NAME" = made by the curriculum at a stage's start
    kind: str = "items"  # items | pairs | sequences
    catalogue: str | None = None  # pairs/sequences: the items data set that their ids refer to
    views: dict[str, ViewConfig] = field(default_factory=dict)
    patterns: dict[str, PatternConfig] = field(default_factory=dict)
    temperature: float = 0.05  # start value of this data set's learnable temperatures
    language_weights: dict[str, float] = field(default_factory=lambda: {"en": 0.5})  # the rest is shared by the other languages
    field_drop: float = 0.15  # probability that a text field is dropped in training (never all)
    history_length: int = 10  # sequences: items in a history
    negatives: int = 0  # pairs/sequences: how many of a record's own `negatives` join the denominators, beside the other rows' targets
    symmetric: bool = True  # InfoNCE in both directions
    positive_score: float = 0.0  # graded pairs: only pairs above this score are positives of contrastive losses; CoSENT takes all
    image_augmentation: float = 0.0  # strength 0..1 of random crop, flip and colour changes in training


@dataclass
class DataConfig:
    """Reading: the reading order's constants and the limits on broken samples."""

    root: str = "data/quickstart"
    tokenizer: str = "${data.root}/tokenizer.json"
    lanes: int = 8  # canonical sequential streams; a multiple of every data-parallel size in use
    segment: int = 64  # records read in sequence by a lane
    window: int = 512  # records shuffled together within a lane
    workers: int = 0
    prefetch: int = 2  # steps decoded ahead by each worker
    max_tokens: int = 48  # prompt + text, longer texts are cut
    image_size: int = 64
    # Pictures that keep their sides' ratio, for model.vision.backbone=siglip2: at most so many patches of image_patch x image_patch
    # pixels, in the place of a square of image_size. None: squares.
    image_patches: int | None = None
    image_patch: int | None = None  # equals model.vision.patch
    frames: int = 1
    audio_rate: int = 16000  # Hz
    audio_chunk_seconds: float = 10.0
    audio_chunks: int = 1
    mel_bins: int = 64
    # own | whisper: Whisper's front end (16000 Hz; 80 or 128 mel_bins; its files know chunks of 30 s)
    # | clap: CLAP's (48000 Hz; 64 mel_bins; chunks of 10 s) | clap_fusion: CLAP's with fusion, a whole recording as four spectrograms of 10 s
    spectrogram: str = "own"
    bad_sample_limit: float = 0.01  # fraction of samples that may be replaced before the run stops with exit code 65
    cache: str | None = None  # folder for shards that are fetched from a URL
    sets: dict[str, DatasetConfig] = field(default_factory=dict)


# ---------------------------------------------------------------- model
@dataclass
class TransformerShape:
    """Shape of one stack of megatron-core blocks."""

    layers: int = 2
    hidden: int = 192
    heads: int = 4
    key_value_heads: int | None = None  # None: as many as heads
    feed_forward: int = 512
    dropout: float = 0.0
    query_key_norm: bool = False  # RMSNorm on each head's queries and keys
    norm: str = "rms"  # rms | layer
    norm_epsilon: float = 1e-6
    activation: str = "silu"  # silu | gelu | gelu_tanh
    gated: bool = True  # feed-forward of two halves, activation(gate) * up; False: one matrix and the activation
    bias: bool = False  # of every linear layer
    query_key_value_bias: bool = False  # of the query, key and value projections alone (Qwen2)
    head_size: int | None = None  # None: hidden / heads
    causal: bool = False  # a position attends to itself and those before it


@dataclass
class VisionConfig:
    """Frame encoder and the perceiver that condenses its tokens."""

    patch: int = 8  # pixels
    stem: str = "convolutional"  # convolutional: strided 3x3 convolutions down to the patch grid; patch: one linear patch embedding
    stem_width: int = 64
    encoder: TransformerShape = field(default_factory=TransformerShape)
    perceiver: TransformerShape = field(default_factory=TransformerShape)
    latents: int = 16
    # own | siglip (SigLIP, and SigLIP2 of a fixed image size) | siglip2 (SigLIP2 naflex: pictures keep their sides' ratio, needs
    # data.image_patches) | qwen3_vl (Qwen3-VL's image tower: no perceiver, its tokens are the tower's)
    backbone: str = "own"
    position_grid: int = 16  # siglip, siglip2, qwen3_vl: side of the square grid of learned positions
    merge: int = 2  # qwen3_vl: side of the square of patches that become one token
    marks: list[int] = field(default_factory=list)  # qwen3_vl: tokens that stand before and behind each picture; empty: none
    deepstack: list[int] = field(default_factory=list)  # qwen3_vl: layers whose output is also added behind the tower's first layers


@dataclass
class SwinShape:
    """Shape of CLAP's audio encoder; a stage halves the grid's sides and doubles the width. The defaults are laion/clap-htsat-unfused's."""

    layers: list[int] = field(default_factory=lambda: [2, 2, 6, 2])  # of each stage
    heads: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    hidden: int = 96  # of the first stage
    feed_forward: int = 4  # times a stage's width
    window: int = 8  # side of the square of positions that attend to each other
    patch: int = 4
    image: int = 256  # side of the square that a chunk's spectrogram is folded into


@dataclass
class AudioConfig:
    """Log-mel encoder (one vector per chunk, mean over chunks) whose vector an adapter turns into one token."""

    encoder: TransformerShape = field(default_factory=TransformerShape)
    stem_width: int = 64
    time_stride: int = 8  # log-mel frames per encoder position
    mel_bins: int = 64  # equals data.mel_bins
    output: int = 512
    # own | whisper (its encoder) | clap (its audio encoder, of the shape `swin`) | clap_fusion (the same, with feature fusion of long
    # recordings); each needs its own data.spectrogram
    backbone: str = "own"
    swin: SwinShape = field(default_factory=SwinShape)  # clap and clap_fusion, instead of `encoder`


@dataclass
class WeightsConfig:
    """Where parts start from: a folder in Hugging Face's safetensors format, or a model id of its hub. None: drawn from the seed."""

    tower: str | None = None  # text embedding and blocks: Qwen2, Qwen2.5, Qwen3 (dense) or Qwen3-VL (dense)
    vision: str | None = None  # model.vision.backbone=siglip, siglip2 or qwen3_vl: the image tower
    audio: str | None = None  # model.audio.backbone=whisper: the encoder; clap, clap_fusion: the audio encoder and, where the files have it, its projection


@dataclass
class LoraConfig:
    """Low-rank updates beside matrices that may stay frozen; stages train them as the part `lora`."""

    rank: int = 0  # 0: none
    alpha: float = 16.0  # the update is alpha / rank times the product of the two factors
    targets: list[str] = field(default_factory=lambda: ["all"])  # attention | mlp | all
    parts: list[str] = field(default_factory=lambda: ["tower"])  # tower | vision | perceiver | audio


@dataclass
class ModelConfig:
    vocabulary: int = 8192
    embedding: int = 192  # D of the fused vector; equals tower.hidden
    prefixes: list[int] = field(default_factory=lambda: [48, 96, 192])  # Matryoshka
    tower: TransformerShape = field(default_factory=TransformerShape)
    vision: VisionConfig = field(default_factory=VisionConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    pooling: str = "tanh_mean"  # tanh_mean | mean | last_token | latent_attention (NV-Embed)
    pooling_latents: int = 512  # latent_attention: entries of the learned dictionary
    pooling_heads: int = 8  # latent_attention
    rope_base: float = 10000.0
    # Qwen3-VL: of a head's rotary frequencies, how many follow frame, row and column of a visual token, interleaved; empty: one number tells the place
    rope_sections: list[int] = field(default_factory=list)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)


# ---------------------------------------------------------------- stages
@dataclass
class OptimizerConfig:
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4  # end of the cosine
    warmup_steps: int = 20
    weight_decay: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    temperature_learning_rate: float = 1e-3


@dataclass
class SubsetConfig:
    """Records that a stage keeps: those nearest to the benchmark sets, and those whose own pair looks clean."""

    nearest: float | None = None  # fraction of each data set's records kept by similarity to the benchmark's centroids
    drop_noisy: float | None = None  # fraction of pairs with the lowest own score that is dropped
    sets: list[str] = field(default_factory=list)  # empty: every set of the stage


@dataclass
class HardNegativeConfig:
    """Dynamic hard negatives (recipe 2.1)."""

    per_query: int = 4
    sample: int = 2048  # N at which lambda* is fitted (F1's optimum depends on N)
    refresh_steps: int = 0  # 0: only at the stage's start
    patterns: dict[str, list[str]] = field(default_factory=dict)  # data set -> pattern names; empty: first pattern of each set
    mask_in_batch: bool = True  # drop in-batch negatives at or above lambda*


@dataclass
class BalanceConfig:
    """Adaptive multi-source balancing (recipe 2.2)."""

    sample: int = 1024  # records per set
    clusters: int = 16
    epsilon: float = 0.05
    iterations: int = 100
    temperature: float = 1.0


@dataclass
class StageConfig:
    steps: int = 100
    global_batch: int | None = None  # rows of a step over all data-parallel ranks; None: the run's
    data: dict[str, float] = field(default_factory=dict)  # data set -> weight (fixed weights, or floor shares under `balance`)
    balance: BalanceConfig | None = None  # weights from the balancing algorithm instead of `data`'s values
    mixed_fraction: float = 0.0  # share of steps whose batch mixes data sets in homogeneous sub-batches
    patterns: dict[str, list[str]] = field(default_factory=dict)  # data set -> patterns used; missing: all
    objectives: dict[str, float] = field(default_factory=dict)  # objective name -> weight
    trainable: list[str] = field(default_factory=lambda: ["all"])  # parts: all | text | vision | perceiver | audio | tower | lora | objectives | temperatures
    subset: SubsetConfig | None = None
    hard_negatives: HardNegativeConfig | None = None
    artifacts: list[str] = field(default_factory=list)  # made at the stage's start: interests | teachers | co_occurrence
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


# ---------------------------------------------------------------- the rest
@dataclass
class ParallelConfig:
    tensor: int = 1  # tensor-parallel size; data-parallel size = world size / tensor
    sequence: bool = False  # at tensor > 1, on GPUs: the tower's ranks hold a part of the positions each between its matrices
    encoders: str = "share"  # at tensor > 1: share: whole on every peer, each encodes a part of the rows | tensor: cut like the tower
    # shard: FSDP2 over all data-parallel ranks | hybrid: over a part of them, `replicas` times | replicate: whole copies | auto: hybrid with
    # one copy a node where there are several nodes, else shard
    sharding: str = "auto"
    replicas: int = 2  # hybrid: copies of the parameters; each is cut over data-parallel size / replicas ranks
    # ZeRO-3: parameters are gathered for each layer's forward and backward alone, and gradients reduced after every micro-batch: least
    # memory, most messages. False: gathered once a step, reduced once a step.
    reshard_after_forward: bool = False
    # How ranks show each other their negatives, in training and mining: all_gather | ring (least memory) | grid (many nodes) |
    # symmetric_memory (all-gather by CUDA's copy engines on one node; no GPU has run it).
    exchange: str = "all_gather"
    dtype: str = "float32"  # float32 | bfloat16 | float64: compute dtype
    activation_checkpointing: str = "none"  # none | full: transformer layers keep their inputs alone and run again in the backward pass
    compile: str = "none"  # none | blocks: torch.compile of each transformer layer
    # Kernels of NVIDIA's extensions in the blocks; no GPU has run them: none | apex (norms) | transformer_engine (norms, and core
    # attention in bfloat16) | auto: on a GPU, without `compile`, TransformerEngine's or else apex's where it is installed.
    fused: str = "none"
    cuda_graphs: bool = False  # with compile=blocks, on GPUs: kernels of a layer replayed in one launch; not tried on a GPU yet
    timeout_seconds: float = 600.0  # collective time-out; the watchdog exits with 70
    threads: int = 0  # torch threads per rank on CPU; 0: cores / local ranks


@dataclass
class StepConfig:
    micro_batch: int = 128  # rows encoded at once, at most
    # Positions of the tower's sequence encoded at once, at most: prompt and text tokens, visual tokens, and the encoders' work on pictures
    # and sound in positions that cost as much. A longer row is encoded alone. 0: micro-batches are cut by rows alone.
    token_budget: int = 0
    dealing: str = "length"  # which rank encodes which rows: length: so that their costs balance | lanes: whole lanes, read in long sequences
    # Micro-batches, counted from the last, whose graph is kept instead of replayed: a number, -1 (all), or auto (as many as fit
    # into the memory that the first step of a stage and its data sets leaves free, at least one).
    kept_graphs: int | str = "auto"
    backend: str = "auto"  # sailplan_kernels backend


@dataclass
class CheckpointConfig:
    every_steps: int = 200
    every_minutes: float = 10.0
    keep: int = 2
    asynchronous: bool = True  # training goes on while a checkpoint is written, from a copy in the CPU's memory


@dataclass
class EvaluationTask:
    """One evaluation: queries of a view against targets of a view."""

    dataset: str = ""
    kind: str = "retrieval"  # retrieval | classification | clustering | sequence
    query: str = ""
    target: str = ""
    split: str = "held_out"  # which records are the queries
    candidates: str = "split"  # split: the same records' targets; all: every record of the catalogue
    query_text: str | None = None  # e.g. held_out_tags: take the query's text from here
    metrics: list[str] = field(default_factory=lambda: ["recall"])
    recall_at: list[int] = field(default_factory=lambda: [1, 10, 25, 50, 100])
    limit: int | None = None
    label: str | None = None  # clustering: the record's key that holds the label (e.g. subgroup)


@dataclass
class EvaluationConfig:
    batch: int = 256
    tasks: dict[str, EvaluationTask] = field(default_factory=dict)
    at_stage_end: bool = True
    every_steps: int = 0
    benchmark: list[str] = field(default_factory=list)  # tasks whose data are the balancing's and stage II's targets


@dataclass
class TrackingConfig:
    wandb: str = "offline"  # offline | online | disabled
    project: str = "sailplan"
    log_every: int = 10  # steps between console and W&B lines; metrics.jsonl has every step


@dataclass
class Config:
    name: str = "run"
    runs: str = "runs"  # folder of run directories
    seed: int = 0
    resume: str = "never"  # never | auto (newest complete checkpoint of runs/<name>, else start)
    initialise_from: str | None = None  # a fresh start's weights: run folder, checkpoint or exported folder; a resume does not look at it
    initialise_parts: list[str] = field(default_factory=lambda: ["encoder"])  # what is taken from there: encoder | objectives | temperatures
    global_batch: int = 256  # rows of a step over all data-parallel ranks
    order: list[str] = field(default_factory=list)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # common to all stages; a stage's own values win
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objectives: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {_target_: class, options}
    allowed_targets: list[str] = field(default_factory=lambda: ["sailplan."])  # module prefixes that a _target_ may have; add your own
    step: StepConfig = field(default_factory=StepConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
