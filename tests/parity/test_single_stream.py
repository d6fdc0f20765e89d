"""Published models that read pictures or sound within their text, over layouts: the full batch's
gradients.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sailplan.parity.layouts import compare, reference
from sailplan_kernels.testing import run_ranks

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "unit" / "encoders")]
from collated import prove  # noqa: E402
from single_stream import configured, rows  # noqa: E402
from test_published_encoders import _apart, _bfloat16  # noqa: E402

WEIGHTS = {"infonce": 1.0, "seq2item": 0.5}


@pytest.fixture
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    chosen: str = request.param
    prove(
        monkeypatch,
        chosen,
        configured(tmp_path, chosen),
        lambda _processor, _view, count, seed: rows(chosen, count, seed),
    )
    return chosen


@pytest.mark.parametrize("kind", ["qwen2_vl", "llava", "qwen2_audio"], indirect=True)
def test_gradients_are_the_full_batchs(kind: str) -> None:
    """Two ranks, three micro-batches each, some replayed: some have no picture, or no row."""
    for row in compare(2, 1, ((3, 1),), weights=WEIGHTS, encoder=kind):
        assert row.error <= 1e-10, row


@pytest.mark.parametrize("kind", ["qwen2_vl"], indirect=True)
def test_bfloat16_is_as_near_as_its_rounding(kind: str) -> None:
    _, exact = reference({"infonce": 1.0}, ("items",), encoder=kind)
    plain, found = (
        run_ranks(_bfloat16, world, kind, world == 1, timeout=120)[0] for world in (1, 2)
    )
    assert found.keys() == exact.keys() == plain.keys()
    assert 0 < _apart(plain, exact) < 0.15
    assert _apart(found, exact) <= 1.25 * _apart(plain, exact) + 5e-3
