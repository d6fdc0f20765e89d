"""Published models that hear, each beside a text model, over layouts and in bfloat16: a forward and a
step's gradients of Whisper, wav2vec2 and AST.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sailplan.config.schema import Config, DataConfig, ViewConfig
from sailplan.data.processor import Processor, ViewRow
from sailplan.model.encoders.transformers import TransformersConfig
from sailplan.model.encoders.two_towers import TwoTowersConfig
from sailplan.parity.layouts import compare, reference
from sailplan_kernels.testing import run_ranks

HERE = Path(__file__).resolve().parent
UNIT = HERE.parent / "unit"
sys.path[:0] = [str(HERE), str(UNIT / "encoders"), str(UNIT / "export")]
from collated import prove  # noqa: E402
from folders import WORDS  # noqa: E402
from test_published_encoders import _apart, _bfloat16  # noqa: E402
from test_published_folder import source  # noqa: E402
from test_published_sound import MODELS, sound  # noqa: E402


def heard(processor: Processor, view: ViewConfig, count: int, seed: int) -> list[ViewRow]:
    """Texts of several lengths and recordings of one to two chunks; some rows lack one of them."""
    draw, found = np.random.default_rng(seed), []
    for number in range(count):
        row = ViewRow(number)
        if "text" in view.modalities:
            row.text = " ".join(draw.choice(WORDS, draw.integers(1, 5)))
        if "audio" in view.modalities and (number % 5 or "text" not in view.modalities):
            rate = processor.audio_rate
            _, content = sound(0.1 + 0.1 * (number % 4), rate, seed + number)
            row.audio = processor.sound(str(number), content, None, 0.0)
        found.append(row)
    return found


@pytest.fixture(params=["whisper", "wav2vec2", "ast"])
def towers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    kind: str = request.param
    (tmp_path / "audio").mkdir()
    MODELS[kind](tmp_path / "audio")
    text = TransformersConfig(
        source=str(source("bert", tmp_path / "text")),
        options={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        weights="drawn",
    )
    options = {} if kind == "whisper" else {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    options |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dropout": 0.0}
    audio = TransformersConfig(
        source=str(tmp_path / "audio"),
        options=options | {"activation_dropout": 0.0, "feat_proj_dropout": 0.0},
        weights="drawn",
    )
    model = TwoTowersConfig(text=text, audio=audio, embedding=16, prefixes=[4, 8, 16])
    data = DataConfig(max_tokens=9, audio_chunk_seconds=0.2, audio_chunks=2)
    prove(monkeypatch, kind, Config(name=kind, model=model, data=data), heard)
    return kind


def test_gradients_are_the_full_batchs_and_bfloat16_is_as_near_as_its_rounding(towers: str) -> None:
    weights = {"infonce": 1.0}
    expected = reference(weights, ("items",), encoder=towers)
    for row in compare(
        2, 1, ((3, 1),), weights=weights, expected=expected, datasets=("items",), encoder=towers
    ):
        assert row.error <= 1e-10, row
    exact = expected[1]
    hears = [name for name in exact if ".audio." in name]
    assert hears and sum(float(exact[name].abs().max()) > 0 for name in hears) > len(hears) / 2
    plain, found = (
        run_ranks(_bfloat16, world, towers, world == 1, timeout=120)[0] for world in (1, 2)
    )
    assert found.keys() == exact.keys() == plain.keys()
    assert 0 < _apart(plain, exact) < 0.15
    assert _apart(found, exact) <= 1.25 * _apart(plain, exact) + 5e-3
    assert all(bool(torch.as_tensor(found[name]).isfinite().all()) for name in found)
