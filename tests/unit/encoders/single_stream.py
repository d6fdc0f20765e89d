"""Tiny published models that read pictures or sound within their text, with random weights: what the
tests of them share.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from sailplan.config.schema import Config, DataConfig
from sailplan.data.processor import ViewRow
from sailplan.model.encoders.transformers import TransformersConfig

WORDS = ["[PAD]", "[UNK]", "<s>", "</s>", "a", "red", "green", "boot", "snow", "find", "\n", "user"]
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "vocab_size": 40,
    "head_dim": 4,
}
SIGHT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}MARK{% endif %}"
    "{% endfor %}{% endif %}</s>{% endfor %}"
)


def tokenizer(folder: Path, special: list[str]) -> Any:
    """A tokenizer of words, whose special tokens follow WORDS."""
    words = [*WORDS, *special]
    made = Tokenizer(
        WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = Split(Regex(r" +"), "removed")
    names = {"pad": "[PAD]", "unk": "[UNK]", "bos": "<s>", "eos": "</s>"}
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{f"{name}_token": token for name, token in names.items()},
        additional_special_tokens=special,
        chat_template=CHAT.replace("MARK", special[0]),
    )
    found.save_pretrained(folder)
    return found


def qwen2_vl(folder: Path) -> dict[str, Any]:
    tokenizer(folder, ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    transformers.Qwen2VLImageProcessorPil(
        min_pixels=256, max_pixels=1024, patch_size=8, merge_size=2
    ).save_pretrained(folder)
    first = len(WORDS)
    transformers.Qwen2VLConfig(
        text_config=TEXT
        | {
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 0, 1],
                "rope_theta": 1e4,
            }
        },
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
        },
        image_token_id=first,
        video_token_id=first + 1,
        vision_start_token_id=first + 2,
        vision_end_token_id=first + 3,
    ).save_pretrained(folder)
    marks = {"vision": "<|vision_start|><|image_pad|><|vision_end|>"}
    return {"modalities": ["text", "vision"], "pooling": "last_token", "media_marks": marks}


def llava(folder: Path) -> dict[str, Any]:
    made = tokenizer(folder, ["<image>"])
    pictures = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    transformers.LlavaProcessor(
        image_processor=pictures,
        tokenizer=made,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("MARK", "<image>"),
    ).save_pretrained(folder)
    transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**SIGHT),
        image_token_index=len(WORDS),
        image_seq_length=4,
    ).save_pretrained(folder)
    return {"modalities": ["text", "vision"], "pooling": "mean"}


def qwen2_audio(folder: Path) -> dict[str, Any]:
    tokenizer(folder, ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"])
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    transformers.Qwen2AudioConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        audio_config=transformers.Qwen2AudioEncoderConfig(
            num_mel_bins=8,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=24,
            d_model=16,
            max_source_positions=50,
        ),
        audio_token_index=len(WORDS),
    ).save_pretrained(folder)
    marks = {"audio": "<|audio_bos|><|AUDIO|><|audio_eos|>"}
    return {"modalities": ["text", "audio"], "pooling": "last_token", "media_marks": marks}


MODELS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "qwen2_vl": qwen2_vl,
    "llava": llava,
    "qwen2_audio": qwen2_audio,
}


def configured(folder: Path, kind: str, **options: Any) -> Config:
    """Write a published folder; return a configuration of it."""
    settings: dict[str, Any] = {"embedding": 16, "prefixes": [4, 8, 16], "weights": "drawn"}
    own = MODELS[kind](folder)
    file = folder / "config.json"  # weights so large that media are heard through the noise
    loud = {"initializer_range": 0.2}
    values = json.loads(file.read_text()) | loud
    values |= {name: part | loud for name, part in values.items() if name.endswith("_config")}
    file.write_text(json.dumps(values))
    model = TransformersConfig(source=str(folder), **settings | own | options)
    data = DataConfig(max_tokens=12, frames=2, audio_chunk_seconds=0.5, audio_chunks=2)
    return Config(name=kind, model=model, data=data)


def rows(kind: str, count: int = 6, seed: int = 0) -> list[ViewRow]:
    """Texts of several lengths, one to two pictures of several shapes, sound of several lengths;
    of every fourth row the text or the media are missing.
    """
    draw = np.random.default_rng(seed)
    found = []
    for number in range(count):
        row = ViewRow(number, text=" ".join(draw.choice(WORDS[4:10], draw.integers(1, 7))))
        if kind == "qwen2_audio":
            samples = 0.3 * draw.standard_normal((1, 4000 + 2000 * (number % 4)))
            row.audio = torch.from_numpy(samples.astype(np.float32))
        else:
            shape = (3, 20 + 8 * (number % 3), 24)
            row.images = tuple(
                torch.from_numpy(draw.integers(0, 255, shape, dtype=np.uint8))
                for _ in range(1 + number % 2)
            )
        if number % 4 == 1:
            row.text = ""
        if number % 4 == 3:
            row.images, row.audio = (), None
        found.append(row)
    return found
