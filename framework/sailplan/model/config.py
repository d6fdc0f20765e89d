"""Configuration of encoders: what all have, and the omni tower's shapes, encoders of pictures
and sound, and published weights.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from sailplan.config.fields import (
    Count,
    Options,
    Positive,
    Range,
    ShareBelowOne,
    Size,
    When,
)
from sailplan.config.whole import WholeConfig
from sailplan.data.config import RATES, DataConfig
from sailplan.errors import ConfigurationError


@dataclass
class EncoderConfig:
    """What every encoder's settings have; `config` in methods is the run's whole
    `config.schema.Config`.

    A subclass may be frozen. It names its component's class (`model.component.EncoderComponent`),
    or overrides `component`.
    """

    # The name of one that comes with the package, or the path of your own dataclass below this one
    encoder: str = "omni"
    embedding: Size = 192  # D of the fused vector
    prefixes: list[int] = field(
        default_factory=lambda: [48, 96, 192]
    )  # Matryoshka; the objectives are summed over these sizes

    component_path: ClassVar[str] = ""

    def component(self) -> Any:
        """Return the encoder's component.

        It is looked up when it is asked for: reading a configuration needs no torch.
        """
        return pkgutil.resolve_name(self.component_path)(self)

    def part_names(self) -> tuple[str, ...]:
        """Return the names of the encoder's parts that a stage's `trainable` may list."""
        return ("text",)

    def pretrained(self) -> bool:
        """Return whether whole encoders come as they were published, which know no prompts but
        their own.
        """
        return False

    def validate(self, path: str) -> None:
        """Raise ConfigurationError for Matryoshka sizes that the vector does not have."""
        if (
            not self.prefixes
            or sorted(set(self.prefixes)) != list(self.prefixes)
            or self.prefixes[0] < 1
        ):
            raise ConfigurationError(
                f"{path}.prefixes is {list(self.prefixes)}: expected sizes in increasing order; "
                "for example [64, 128, 256]"
            )
        if self.prefixes[-1] > self.embedding:
            raise ConfigurationError(
                f"{path}.prefixes is {list(self.prefixes)}: expected sizes up to "
                f"{path}.embedding={self.embedding}; end the list with the full size"
            )

    def check_run(self, config: WholeConfig) -> None:
        """Raise ConfigurationError for what the rest of a run's configuration asks for and this
        encoder cannot do.
        """
        parallel = config.parallel
        if parallel.tensor > 1:
            raise ConfigurationError(
                f"parallel.tensor={parallel.tensor}: expected 1 with model.encoder={self.encoder}; "
                "the omni tower is tensor parallel"
            )
        for key, found, without in (
            ("compile", parallel.compile, ("none",)),
            ("fused", parallel.fused, ("none", "auto")),
            ("sequence", parallel.sequence, (False,)),
            ("encoders", parallel.encoders, ("share",)),
        ):
            if found not in without:
                raise ConfigurationError(
                    f"parallel.{key}={found}: expected {without[0]} with "
                    f"model.encoder={self.encoder}; leave it off"
                )

    @staticmethod
    def check_lora(config: WholeConfig, key: str, rank: int) -> None:
        """Raise ConfigurationError for low-rank updates that stay what they are at the start:
        nothing.
        """
        trained = {part for name in config.order for part in config.stages[name].trainable}
        if rank and config.initialise_from is None and not trained & {"all", "lora"}:
            raise ConfigurationError(
                f"{key}={rank}: no stage trains lora (trainable: {', '.join(sorted(trained))}), so "
                f"it would have no effect; add lora to a stage's trainable, or set {key}=0"
            )


GRIDS, QWEN = ("siglip2", "qwen3_vl"), ("qwen3_vl",)
CLAP = ("clap", "clap_fusion")  # the sound encoders of the shape model.audio.swin
LATENT = ("latent_attention",)
Part = Literal["tower", "vision", "perceiver", "audio"]


@dataclass
class TransformerShape:
    """Shape of one stack of megatron-core blocks."""

    layers: Count = 2
    hidden: Size = 192
    heads: Size = 4
    key_value_heads: Size | None = None  # None: as many as heads
    feed_forward: Size = 512
    dropout: ShareBelowOne = 0.0
    query_key_norm: bool = False  # RMSNorm on each head's queries and keys
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: Positive = 1e-6
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    # feed-forward of two halves, activation(gate) * up; False: one matrix and the activation
    gated: bool = True
    bias: bool = False  # of every linear layer
    query_key_value_bias: bool = False  # of the query, key and value projections alone (Qwen2)
    head_size: Size | None = None  # None: hidden / heads
    causal: bool = False  # a position attends to itself and those before it


@dataclass
class VisionConfig:
    """Frame encoder and the perceiver that condenses its tokens."""

    patch: Size = 8  # pixels; of a convolutional encoder, side of what becomes one token
    # convolutional: strided 3x3 convolutions down to the patch grid; patch: one linear patch
    # embedding
    stem: Literal["convolutional", "patch"] = "convolutional"
    stem_width: Size = 64
    encoder: TransformerShape = field(default_factory=TransformerShape)
    perceiver: TransformerShape = field(default_factory=TransformerShape)
    latents: Size = 16
    # published: any picture encoder of transformers' AutoModel (docs/encoders.md); siglip2: SigLIP2
    # naflex, whose pictures keep their sides' ratio (needs data.image_patches); qwen3_vl: Qwen3-VL's
    # image tower, which has no perceiver: its tokens are the tower's
    backbone: Literal["own", "published", "siglip2", "qwen3_vl"] = "own"
    # What stands in the encoder's config.json, in the place of `encoder`; {}: it is taken from the
    # folder model.weights.vision. Read with backbone=published alone
    published: Options = field(default_factory=dict)
    # What stands in its preprocessor_config.json, or of it image_mean and image_std alone, for
    # pictures squeezed to squares; {}: the folder's, and without one squares in [-1, 1]
    processor: Options = field(default_factory=dict)
    # Side of the square grid of learned positions
    position_grid: Annotated[Size, When("backbone", GRIDS)] = 16
    # Side of the square of patches that become one token
    merge: Annotated[Size, When("backbone", QWEN)] = 2
    # Tokens that stand before and behind each picture; empty: none
    marks: Annotated[list[int], When("backbone", QWEN)] = field(default_factory=list)
    # Layers whose output is also added behind the tower's first layers
    deepstack: Annotated[list[int], When("backbone", QWEN)] = field(default_factory=list)


@dataclass
class SwinShape:
    """Shape of CLAP's audio encoder; a stage halves the grid's sides and doubles the width.

    The defaults are laion/clap-htsat-unfused's.
    """

    layers: list[int] = field(default_factory=lambda: [2, 2, 6, 2])  # of each stage
    heads: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    hidden: Size = 96  # of the first stage
    feed_forward: Size = 4  # times a stage's width
    window: Size = 8  # side of the square of positions that attend to each other
    patch: Size = 4
    image: Size = 256  # side of the square that a chunk's spectrogram is folded into


@dataclass
class AudioConfig:
    """Log-mel encoder (one vector per chunk, mean over chunks) whose vector an adapter turns
    into one token.
    """

    encoder: TransformerShape = field(default_factory=TransformerShape)
    stem_width: Size = 64
    time_stride: Size = 8  # log-mel frames per encoder position
    mel_bins: Size = 64  # equals data.mel_bins
    output: Size = 512
    # whisper: its encoder; clap: its audio encoder, of the shape `swin`; clap_fusion: the same,
    # with feature fusion of long recordings; each needs its own data.spectrogram
    backbone: Literal["own", "whisper", "clap", "clap_fusion"] = "own"
    # Instead of `encoder`
    swin: Annotated[SwinShape, When("backbone", CLAP)] = field(default_factory=SwinShape)


@dataclass
class WeightsConfig:
    """Where parts start from: a folder in Hugging Face's safetensors format, or a model id of
    its hub. None: drawn from the seed.
    """

    tower: str | None = (
        None  # text embedding and blocks: Qwen2, Qwen2.5, Qwen3 (dense) or Qwen3-VL (dense)
    )
    vision: str | None = (
        None  # model.vision.backbone=published, siglip2 or qwen3_vl: the image tower
    )
    audio: str | None = (
        # model.audio.backbone=whisper: the encoder; clap, clap_fusion: the audio encoder and, where
        # the files have it, its projection
        None
    )


@dataclass
class LoraConfig:
    """Low-rank updates beside matrices that may stay frozen; stages train them as the part
    `lora`.
    """

    rank: Count = 0  # 0: none
    # The update is alpha / rank times the product of the two factors
    alpha: Annotated[float, When("rank")] = 16.0
    targets: Annotated[list[Literal["attention", "mlp", "all"]], When("rank")] = field(
        default_factory=lambda: ["all"]  # type: ignore[arg-type]
    )
    parts: Annotated[list[Part], When("rank")] = field(
        default_factory=lambda: ["tower"]  # type: ignore[arg-type]
    )


@dataclass
class ModelConfig(EncoderConfig):
    """The omni tower; embedding equals tower.hidden."""

    vocabulary: Size = 8192
    tower: TransformerShape = field(default_factory=TransformerShape)
    vision: VisionConfig = field(default_factory=VisionConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    # latent_attention: NV-Embed's
    pooling: Literal["tanh_mean", "mean", "last_token", "latent_attention"] = "tanh_mean"
    # Entries of the learned dictionary
    pooling_latents: Annotated[Size, When("pooling", LATENT)] = 512
    pooling_heads: Annotated[Size, When("pooling", LATENT)] = 8
    rope_base: Annotated[float, Range("above 1", lambda value: value > 1)] = 10000.0
    # Qwen3-VL: of a head's rotary frequencies, how many follow frame, row and column of a visual
    # token, interleaved; empty: one number tells the place
    rope_sections: list[int] = field(default_factory=list)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    component_path: ClassVar[str] = "sailplan.model.encoders.omni.component.Omni"

    def validate(self, path: str) -> None:
        if self.embedding != self.tower.hidden:
            raise ConfigurationError(
                f"{path}.embedding is {self.embedding}: expected "
                f"{path}.tower.hidden={self.tower.hidden} (there is no output projection); make "
                "them equal"
            )
        super().validate(path)

    def part_names(self) -> tuple[str, ...]:
        return ("text", "vision", "perceiver", "audio", "tower", "lora")

    def check_run(self, config: WholeConfig) -> None:
        if config.parallel.sequence:
            self._check_sequence(config)
        self.check_lora(config, "model.lora.rank", self.lora.rank)
        for name in config.order:
            self._check_trainable(f"stages.{name}", config.stages[name].trainable)
        if self.audio.mel_bins != config.data.mel_bins:
            raise ConfigurationError(
                f"model.audio.mel_bins={self.audio.mel_bins}: expected "
                f"data.mel_bins={config.data.mel_bins}, what the decoder makes"
            )
        self._check_sound(config.data)
        self._check_pictures(config.data)

    def _check_trainable(self, key: str, trainable: list[str]) -> None:
        if "lora" in trainable and not self.lora.rank:
            raise ConfigurationError(
                f"{key}.trainable names lora, but model.lora.rank is 0: set a rank, 8 to 32 are "
                "usual"
            )
        if set(trainable) == {"perceiver"} and self.vision.backbone == "qwen3_vl":
            raise ConfigurationError(
                f"{key}.trainable names the perceiver alone, which model.vision.backbone=qwen3_vl "
                "does not have: nothing would be trained; "
                "expected a part with parameters, such as vision or tower"
            )

    def _check_sequence(self, config: WholeConfig) -> None:
        lora = self.lora
        for key, found, expected, fits in (
            ("parallel.tensor", config.parallel.tensor, "2 or more", config.parallel.tensor > 1),
            (
                "parallel.compile",
                config.parallel.compile,
                "none",
                config.parallel.compile == "none",
            ),
            ("model.tower.dropout", self.tower.dropout, "0", self.tower.dropout == 0),
            (
                "model.lora.rank",
                lora.rank,
                "0, or model.lora.parts without tower",
                not lora.rank or "tower" not in lora.parts,
            ),
            (
                "model.vision.deepstack",
                list(self.vision.deepstack),
                "[]: its features are added to whole sequences",
                not self.vision.deepstack,
            ),
        ):
            if not fits:
                raise ConfigurationError(
                    f"parallel.sequence is on, but {key} is {found}: expected {expected}; leave "
                    "parallel.sequence off"
                )

    def _check_pictures(self, data: DataConfig) -> None:
        vision = self.vision
        pixels = vision.patch * (vision.merge if vision.backbone == "qwen3_vl" else 1)
        if vision.backbone == "siglip2":
            if data.image_patches is None or data.image_patches < 1:
                raise ConfigurationError(
                    f"data.image_patches={data.image_patches}: expected a number of patches with "
                    "model.vision.backbone=siglip2; 256 is what its files know"
                )
            if data.image_patch != vision.patch:
                raise ConfigurationError(
                    f"data.image_patch={data.image_patch}: expected "
                    f"model.vision.patch={vision.patch}"
                )
        elif data.image_patches is not None or data.image_patch is not None:
            name = "image_patch" if data.image_patches is None else "image_patches"
            raise ConfigurationError(
                f"data.{name}={getattr(data, name)}: expected null with "
                f"model.vision.backbone={vision.backbone}, which sees squares of data.image_size"
            )
        elif pixels > 0 and data.image_size % pixels:
            raise ConfigurationError(
                f"data.image_size={data.image_size}: expected a multiple of {pixels}, the side of "
                "model.vision's tokens in pixels"
            )

    def _check_sound(self, data: DataConfig) -> None:
        audio = self.audio
        if audio.backbone in RATES and data.spectrogram != audio.backbone:
            raise ConfigurationError(
                f"data.spectrogram={data.spectrogram}: expected {audio.backbone}, what "
                f"model.audio.backbone={audio.backbone} was made for; "
                f"data.audio_rate is then {RATES[audio.backbone]}"
            )
        if (
            audio.backbone in ("clap", "clap_fusion")
            and data.audio_chunk_seconds * 100 + 1 > audio.swin.image**2 // audio.mel_bins
        ):
            longest = (audio.swin.image**2 // audio.mel_bins - 1) / 100
            raise ConfigurationError(
                f"data.audio_chunk_seconds={data.audio_chunk_seconds}: expected at most "
                f"{longest:g} with model.audio.backbone={audio.backbone}, "
                "whose files know chunks of 10 s"
            )
