"""NVIDIA's extensions are found where they are, never taken for the public package of the same name, and equal torch where they run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sailplan.config.schema import TransformerShape
from sailplan.model.blocks import NORMS, transformer_config
from sailplan.model.fused import extensions, fuse_norms


def test_the_public_package_called_apex_is_neither_taken_nor_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if extensions()["apex"] is not None:
        pytest.skip("NVIDIA's apex is installed here")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert extensions()["apex"] is None and "apex" not in sys.modules
    norm = torch.nn.Sequential(NORMS["rms"](transformer_config(TransformerShape(), torch.float32, 1), 8))
    assert not fuse_norms(norm) and "forward" not in vars(norm[0])


def test_an_extension_that_fails_to_import_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was built for another torch."""
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert extensions()["TransformerEngine"] is None


@pytest.mark.skipif(extensions()["apex"] is None or not torch.cuda.is_available(), reason="NVIDIA's apex or a GPU is not here: its norms were not compared")
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_apexs_norms_equal_torchs(kind: str) -> None:
    config = transformer_config(TransformerShape(), torch.float32, 1)
    plain, fused = (torch.nn.Sequential(NORMS[kind](config, 256)).cuda() for _ in range(2))
    assert fuse_norms(fused)
    found = []
    for norm in (plain, fused):
        hidden = torch.randn(7, 256, generator=torch.Generator().manual_seed(1)).cuda().requires_grad_()
        output = norm(hidden)
        output.square().sum().backward()
        found.append([output, hidden.grad, *(parameter.grad for parameter in norm.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
