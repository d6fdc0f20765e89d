"""Risks: pictures or sound that reach a published model otherwise than within its text, a vector that
depends on the rows beside it, media that a long text cuts off, a rank that leaves out the part that
sees.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor

from sailplan.config.schema import Config, ViewConfig
from sailplan.data.processor import ViewRow
from sailplan.errors import ConfigurationError
from sailplan.model.encoders.transformers.config import PromptTemplate
from sailplan.model.encoders.transformers.files import open_processor

sys.path.insert(0, str(Path(__file__).parent))
from single_stream import MODELS, configured, rows

# What a person writes for row 0 of the view.
WRITTEN = {
    "qwen2_vl": "find <|vision_start|><|image_pad|><|vision_end|>{}",
    "llava": "find <image>{}",
    "qwen2_audio": "find <|audio_bos|><|AUDIO|><|audio_eos|>{}",
}


def opened(config: Config, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, ViewConfig]:
    """Return the processor, the encoder with weights of seed 0, and a view of all modalities."""
    component = config.model.component()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = component.module(dtype)
    view = ViewConfig(modalities=list(config.model.modalities), prompt="find")
    return component.processor(config), encoder, view


def inputs(processor: Any, some: list[ViewRow], view: ViewConfig) -> Any:
    return processor.batch(some, processor.tokens(some, view), view)


@pytest.mark.parametrize("kind", MODELS)
def test_vectors_are_the_models_own_and_depend_on_no_other_row(tmp_path: Path, kind: str) -> None:
    config = configured(tmp_path, kind)
    processor, encoder, view = opened(config)
    every = rows(kind)
    batch = inputs(processor, every, view)
    with torch.no_grad():
        found = encoder.eval()(batch).fused
        alone = torch.cat([encoder(inputs(processor, [row], view)).fused for row in every])
    torch.testing.assert_close(found, alone, rtol=0, atol=2e-5)
    assert F.cosine_similarity(found[0], found[2], dim=0) < 0.999, "rows are to be told apart"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path)
        ).eval()
    media: dict[str, Any] = {
        "images": [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in every[0].images]
    }
    if kind == "qwen2_audio":
        media = {"audio": [every[0].audio[0].numpy()], "sampling_rate": 16000}
    given = open_processor(config.model)(
        text=[WRITTEN[kind].format(every[0].text)], **media, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**given).last_hidden_state[0]
    wanted = hidden.mean(0) if config.model.pooling == "mean" else hidden[-1]
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_costs_are_the_positions_that_a_row_takes(tmp_path: Path, kind: str) -> None:
    processor, _, view = opened(configured(tmp_path, kind))
    every = rows(kind)
    tokens = processor.tokens(every, view)
    mask: Tensor = processor.batch(every, tokens, view).named["attention_mask"]
    assert [len(ids) for ids in tokens] == mask[: len(every)].sum(1).tolist()


@pytest.mark.parametrize("kind", MODELS)
def test_every_rank_runs_the_part_that_sees(tmp_path: Path, kind: str) -> None:
    """Where no row has media, or there is no row, as where one has; a row that shows nothing is 0."""
    processor, encoder, view = opened(configured(tmp_path, kind))
    ran: list[bool] = []
    tower = next(
        module for name, module in encoder.model.named_children() if name.startswith(("vis", "aud"))
    )
    tower.register_forward_hook(lambda *_: ran.append(True))
    for some, wanted in (
        ([], (0, 16)),
        ([ViewRow(1, text="a red boot"), ViewRow()], (2, 16)),
        (rows(kind, 2), (2, 16)),
    ):
        ran.clear()
        vectors = encoder(inputs(processor, some, view)).fused
        assert tuple(vectors.shape) == wanted and ran
        (vectors.sum() + 0.0).backward()
    nothing = encoder(inputs(processor, [ViewRow(1, text="a"), ViewRow()], view)).fused
    assert nothing[1].abs().max() == 0 and nothing[0].abs().max() > 0
    largest = processor.largest(view.modalities, 2).named
    assert largest["input_ids"].shape == largest["attention_mask"].shape


def test_a_long_text_is_cut_and_not_its_media_or_its_template(tmp_path: Path) -> None:
    config = configured(tmp_path, "llava")
    config.model = replace(
        config.model, prompts={"find": PromptTemplate("find ", " \n ", " green")}
    )
    processor, _, view = opened(config)
    row = rows("llava", 1)[0]
    row.text = " ".join(["boot"] * 30)
    ids = inputs(processor, [row], view).named["input_ids"][0].tolist()
    named = [processor.tokenizer._published.convert_ids_to_tokens(number) for number in ids]
    assert named == ["find", *["<image>"] * 4, "\n", *["boot"] * 9, "green"]


def test_a_chat_template_places_the_media(tmp_path: Path) -> None:
    config = configured(tmp_path, "llava", chat_template=True)
    processor, _, view = opened(config)
    row = rows("llava", 2)[1]
    assert len(row.images) == 2
    row.text = "a boot"
    assert processor._written(row, "find") == "system find</s>user <image><image>a boot</s>"
    assert processor._written(ViewRow(1, text="a boot"), "find") == "system find</s>user a boot</s>"
    assert inputs(processor, [row], view).named["pixel_values"].shape[0] == 2


@pytest.mark.parametrize("kind", MODELS)
def test_bfloat16_trains_every_part(tmp_path: Path, kind: str) -> None:
    processor, encoder, view = opened(configured(tmp_path, kind))
    _, rounded, _ = opened(configured(tmp_path, kind), torch.bfloat16)
    batch = inputs(processor, rows(kind), view)
    exact, near = encoder.train()(batch).fused, rounded.train()(batch).fused
    assert near.dtype == torch.float32
    assert F.cosine_similarity(exact, near).min() > 0.99
    near.square().sum().backward()
    for name, part in rounded.parts().items():
        assert part and any(
            one.grad is not None and bool(one.grad.isfinite().all() and one.grad.abs().max() > 0)
            for one in part
        ), name


def test_what_such_a_model_cannot_do_is_said(tmp_path: Path) -> None:
    config = configured(tmp_path, "qwen2_vl")
    processor, encoder, view = opened(config)
    assert not encoder(inputs(processor, rows("qwen2_vl", 1), view), per_modality=True).by_modality
    config.model = replace(config.model, modalities=["vision"])
    with pytest.raises(ConfigurationError, match=r"model\.modalities=\['vision'\].*add text"):
        opened(config)
    with pytest.raises(ConfigurationError, match=r"model\.media_marks\.audio: has no effect"):
        replace(config.model, media_marks={"audio": "x"}).check_effects("model")


def test_pictures_may_be_made_smaller(tmp_path: Path) -> None:
    """The positions of a picture follow from its processor's settings."""
    found = [
        len(processor.tokens(rows("qwen2_vl", 1), view)[0])
        for options in ({}, {"max_pixels": 256})
        for processor, _, view in [
            opened(configured(tmp_path, "qwen2_vl", image_processor_options=options))
        ]
    ]
    assert found[0] > found[1] and np.all(np.array(found) > 0)
