"""Which model shapes can be built, said before anything is built and in terms of configuration
keys.
"""

from __future__ import annotations

import math

from sailplan.config.components import validate
from sailplan.config.schema import AudioConfig, ModelConfig, TransformerShape
from sailplan.errors import ConfigurationError
from sailplan.model.blocks import head_size
from sailplan.model.config import CLAP

REDUCTION = 4  # how much narrower what fuses clap_fusion's spectrograms is inside


def _fail(key: str, found: object, expected: str, remedy: str) -> None:
    raise ConfigurationError(f"{key} is {found}: expected {expected}; {remedy}")


def _check_shape(key: str, shape: TransformerShape, tensor_parallel: int, *, rotary: bool) -> None:
    key_value_heads = shape.heads if shape.key_value_heads is None else shape.key_value_heads
    if shape.head_size is None and shape.hidden % shape.heads:
        _fail(
            f"{key}.hidden",
            shape.hidden,
            f"a multiple of {key}.heads={shape.heads}",
            "change one of the two, or set head_size",
        )
    if rotary and head_size(shape) % 2:
        _fail(
            f"{key}.hidden",
            shape.hidden,
            f"an even size of each of the {shape.heads} heads (rotary positions)",
            "change hidden or heads",
        )
    if shape.heads % key_value_heads:
        _fail(
            f"{key}.key_value_heads",
            key_value_heads,
            f"a divisor of {key}.heads={shape.heads}",
            "change one of the two",
        )
    if not shape.layers:
        return  # nothing of such a stack is spread over ranks
    common = math.gcd(shape.heads, key_value_heads, shape.feed_forward)
    sizes = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
    for name, value in (
        ("heads", shape.heads),
        ("key_value_heads", key_value_heads),
        ("feed_forward", shape.feed_forward),
    ):
        if value % tensor_parallel:
            _fail(
                f"{key}.{name}",
                value,
                f"a multiple of parallel.tensor={tensor_parallel}",
                f"this stack allows parallel.tensor {sizes}",
            )


def _check_halvings(key: str, value: int, what: str) -> None:
    if value < 1 or value & (value - 1):
        _fail(key, value, f"a power of two ({what})", "choose 1, 2, 4, 8, 16, ...")


def _check_swin(audio: AudioConfig) -> None:
    swin, key = audio.swin, "model.audio.swin"
    if not swin.layers or len(swin.layers) != len(swin.heads):
        _fail(
            f"{key}.heads",
            list(swin.heads),
            f"as many numbers as {key}.layers={list(swin.layers)}",
            "give one of each for every stage",
        )
    for stage, (layers, heads) in enumerate(zip(swin.layers, swin.heads, strict=True)):
        if layers < 1 or heads < 1 or swin.hidden * 2**stage % heads:
            _fail(
                f"{key}.heads",
                list(swin.heads),
                f"divisors of the stages' widths, here {swin.hidden * 2**stage}, and of layers at "
                "least 1",
                "change heads, layers or hidden",
            )
    if audio.backbone == "clap_fusion" and swin.hidden % REDUCTION:
        _fail(
            f"{key}.hidden",
            swin.hidden,
            f"a multiple of {REDUCTION} (what fuses the spectrograms is so much narrower)",
            "96 is usual",
        )
    smallest = swin.patch * 2 ** (len(swin.layers) - 1) * swin.window
    if swin.image % smallest or swin.image % audio.mel_bins:
        _fail(
            f"{key}.image",
            swin.image,
            f"a multiple of {smallest} (patch x window x 2 for every stage but the first) and of "
            f"model.audio.mel_bins={audio.mel_bins}",
            "256 is usual",
        )


def _check_qwen_vision(config: ModelConfig, tensor_parallel: int) -> None:
    vision, encoder = config.vision, config.vision.encoder
    if head_size(encoder) % 4:
        _fail(
            "model.vision.encoder.hidden",
            encoder.hidden,
            f"heads of a multiple of 4 (here {encoder.heads} heads): rows and columns",
            "change one",
        )
    if encoder.hidden * vision.merge**2 % tensor_parallel:
        _fail(
            "model.vision.encoder.hidden",
            encoder.hidden,
            f"times merge squared a multiple of parallel.tensor={tensor_parallel}",
            "change one",
        )
    if vision.marks and (
        len(vision.marks) != 2 or not all(0 <= mark < config.vocabulary for mark in vision.marks)
    ):
        _fail(
            "model.vision.marks",
            list(vision.marks),
            f"two tokens below model.vocabulary={config.vocabulary}",
            "or [] for none",
        )
    layers = list(vision.deepstack)
    if layers != sorted(set(layers)) or (
        layers and not 0 <= layers[0] <= layers[-1] < encoder.layers
    ):
        _fail(
            "model.vision.deepstack",
            layers,
            f"rising numbers of layers below model.vision.encoder.layers={encoder.layers}",
            "count from 0",
        )
    if len(layers) > config.tower.layers:
        _fail(
            "model.vision.deepstack",
            layers,
            f"at most model.tower.layers={config.tower.layers} numbers",
            "name fewer layers",
        )


def check_model(config: ModelConfig, tensor_parallel: int, *, share_encoders: bool = True) -> None:
    """Raises ConfigurationError, naming the key, where `config` cannot be built at this
    tensor-parallel size.

    share_encoders: the vision and audio encoders and the perceiver are whole on every rank
    (parallel.encoders=share).
    """
    validate(config, "model")
    vision, audio = config.vision, config.audio
    cut = 1 if share_encoders else tensor_parallel
    _check_shape("model.tower", config.tower, tensor_parallel, rotary=True)
    if vision.backbone != "published":
        _check_shape("model.vision.encoder", vision.encoder, cut, rotary=False)
    if vision.backbone == "qwen3_vl":
        _check_qwen_vision(config, cut)
    else:
        _check_shape("model.vision.perceiver", vision.perceiver, cut, rotary=False)
    if audio.backbone in CLAP:
        _check_swin(audio)
    else:
        _check_shape("model.audio.encoder", audio.encoder, cut, rotary=audio.backbone == "own")
    if config.vocabulary % tensor_parallel:
        _fail(
            "model.vocabulary",
            config.vocabulary,
            f"a multiple of parallel.tensor={tensor_parallel}",
            "round it up; unused entries cost little",
        )
    if config.pooling == "latent_attention" and config.tower.hidden % config.pooling_heads:
        _fail(
            "model.pooling_heads",
            config.pooling_heads,
            f"a divisor of model.tower.hidden={config.tower.hidden}",
            "change one of the two",
        )
    if vision.backbone == "own" and vision.stem == "convolutional":
        _check_halvings(
            "model.vision.patch", vision.patch, "each convolution of the stem halves the image"
        )
    _check_halvings(
        "model.audio.time_stride",
        audio.time_stride,
        "each convolution of the stem halves the time axis",
    )
    if audio.backbone == "whisper":
        if audio.time_stride != 2:
            _fail(
                "model.audio.time_stride",
                audio.time_stride,
                "2 with model.audio.backbone=whisper",
                "set 2",
            )
        if audio.encoder.hidden % 2 or audio.encoder.hidden < 4:
            _fail(
                "model.audio.encoder.hidden",
                audio.encoder.hidden,
                "an even number from 4 on (sine and cosine positions)",
                "change it",
            )
    sections, frequencies = list(config.rope_sections), head_size(config.tower) // 2
    if sections and (
        len(sections) != 3
        or min(sections) < 0
        or sum(sections) != frequencies
        or max(sections[1:]) * 3 > frequencies + 2
    ):
        _fail(
            "model.rope_sections",
            sections,
            f"three numbers that add up to {frequencies}, half of a head of the tower, the last "
            "two at most a third of it",
            "[24, 20, 20] for heads of 128, or [] for none",
        )
    lora = config.lora
    adapted = [part for part in ("vision",) if getattr(config, part).backbone == "published"]
    if lora.rank and set(adapted) & set(lora.parts) and list(lora.targets) != ["all"]:
        _fail(
            "model.lora.targets",
            list(lora.targets),
            f"[all] with {adapted[0]} of transformers among model.lora.parts, whose layers have "
            "other names",
            "leave it out, or set [all]",
        )
    for part, without in (
        ("audio", audio.backbone in CLAP),
        ("perceiver", vision.backbone == "qwen3_vl"),
    ):
        if lora.rank and part in lora.parts and without:
            _fail(
                "model.lora.parts",
                list(lora.parts),
                f"parts with blocks of ours, which {part} has none of here",
                f"leave out {part}",
            )
