"""Tiny models of published families with random weights, and random inputs for them: their rows
of the parity matrix.

A folder with a config.json is all that such a model needs here: its inputs are made as tensors, so
there is no tokenizer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from sailplan.config.fields import Options
from sailplan.data.config import Modality
from sailplan.data.record import NamedInputs
from sailplan.model.encoders.transformers import TransformersConfig
from sailplan.model.encoders.transformers.processor import PRESENT, RECORDINGS

VOCABULARY, TOKENS, FRAMES, SIDE = 40, 5, 2, 8
SOUND = (1, 24, 16)  # a chunk as CLAP takes it: one spectrogram, times x bins
_STACK = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT: list[Modality] = ["text"]
BOTH: list[Modality] = ["text", "vision"]
TINY: dict[str, tuple[list[Modality], Options]] = {  # model type -> modalities, its configuration
    "bert": (TEXT, {"vocab_size": VOCABULARY, **_STACK, **_NO_DROPOUT}),
    "clip": (
        BOTH,
        {
            "text_config": {
                "vocab_size": VOCABULARY,
                **_STACK,
                "eos_token_id": 2,
                "max_position_embeddings": 16,
            },
            "vision_config": {**_STACK, "image_size": SIDE, "patch_size": 4},
            "projection_dim": 16,
        },
    ),
}


@cache
def _folder(kind: str) -> str:
    import transformers

    holder = Path(tempfile.mkdtemp(prefix="sailplan-parity-"))
    transformers.AutoConfig.for_model(kind, **TINY[kind][1]).save_pretrained(holder)
    return str(holder)


def tiny_settings(kind: str) -> TransformersConfig:
    """Return the settings of one of TINY, of model.testing.small_config's vector sizes."""
    return TransformersConfig(
        source=_folder(kind),
        embedding=16,
        prefixes=[4, 8, 16],
        weights="drawn",
        modalities=list(TINY[kind][0]),
    )


def tiny_inputs(modalities: Sequence[str], rows: int, seed: int) -> NamedInputs:
    """Return inputs for one of TINY: rows of 1 to 5 tokens, some of them without a picture or
    sound, which are float64.
    """
    generator = torch.Generator().manual_seed(seed)
    named: dict[str, torch.Tensor] = {}
    if "text" in modalities:
        lengths = torch.randint(1, TOKENS + 1, (rows, 1), generator=generator)
        named["input_ids"] = torch.randint(3, VOCABULARY, (rows, TOKENS), generator=generator)
        named["attention_mask"] = (torch.arange(TOKENS) < lengths).to(torch.int64)
        if len(modalities) > 1:
            named[PRESENT["text"]] = torch.rand(rows, generator=generator) < 0.8
    if "vision" in modalities:
        named["pixel_values"] = torch.randn(
            rows, FRAMES, 3, SIDE, SIDE, generator=generator, dtype=torch.float64
        )
        named[PRESENT["vision"]] = torch.rand(rows, FRAMES, generator=generator) < 0.6
    if "audio" in modalities:
        named[RECORDINGS] = torch.randn(
            rows, FRAMES, *SOUND, generator=generator, dtype=torch.float64
        )
        named[PRESENT["audio"]] = torch.rand(rows, FRAMES, generator=generator) < 0.6
    return NamedInputs(tuple(modalities), named)
