"""NVIDIA's extensions are found where they are, never taken for the public package of the same
name, and equal torch where they run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from sailplan.config.schema import TransformerShape
from sailplan.model.blocks import NORMS, Blocks, rotary_angles, transformer_config
from sailplan.model.fused import extensions, fuse, fuse_norms
from sailplan.model.testing import join_layout, packed_rows


def test_the_public_package_called_apex_is_neither_taken_nor_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if extensions()["apex"] is not None:
        pytest.skip("NVIDIA's apex is installed here")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert extensions()["apex"] is None and "apex" not in sys.modules
    norm = torch.nn.Sequential(
        NORMS["rms"](transformer_config(TransformerShape(), torch.float32, 1), 8)
    )
    assert not fuse_norms(norm) and "forward" not in vars(norm[0])


def test_an_extension_that_fails_to_import_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was built for another torch."""
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text(
        "raise OSError('undefined symbol')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert extensions()["TransformerEngine"] is None


@pytest.mark.skipif(
    extensions()["apex"] is None or not torch.cuda.is_available(),
    reason="NVIDIA's apex or a GPU is not here: its norms were not compared",
)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_apexs_norms_equal_torchs(kind: str) -> None:
    config = transformer_config(TransformerShape(), torch.float32, 1)
    plain, fused = (torch.nn.Sequential(NORMS[kind](config, 256)).cuda() for _ in range(2))
    assert fuse_norms(fused)
    found = []
    for norm in (plain, fused):
        hidden = (
            torch.randn(7, 256, generator=torch.Generator().manual_seed(1)).cuda().requires_grad_()
        )
        output = norm(hidden)
        output.square().sum().backward()
        found.append([output, hidden.grad, *(parameter.grad for parameter in norm.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    """A world of one in this process: CUDA does not survive a fork."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    join_layout(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    extensions()["TransformerEngine"] is None or not torch.cuda.is_available(),
    reason="TransformerEngine or a GPU is not here: its kernels were not compared",
)
@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_transformer_engines_kernels_give_what_ours_do(
    world: None, dtype: torch.dtype, tolerance: float, kind: str, gaps: bool
) -> None:
    """Outputs of the kept positions and all gradients, compared by the norm: single elements of
    a bfloat16 gradient are noise.
    """
    weights = torch.randn(6, 50, 256, generator=torch.Generator().manual_seed(4)).cuda()
    for causal in (False, True):
        shape = TransformerShape(2, 256, 4, 2, 512, query_key_norm=True, norm=kind, causal=causal)
        keep = torch.rand(6, 50, generator=torch.Generator().manual_seed(3)) < (0.6 if gaps else 2)
        found = []
        for extension in ("none", "transformer_engine"):
            torch.manual_seed(1)
            blocks = Blocks(shape, dtype, 10000.0).cuda()
            fuse(blocks, extension)
            hidden = (
                torch.randn(6, 50, 256, generator=torch.Generator().manual_seed(2))
                .to("cuda", dtype)
                .requires_grad_()
            )
            numbers, places, rows = packed_rows(keep.cuda())
            output = blocks(hidden.flatten(0, 1)[numbers], rows, rotary_angles(places, 64, 10000.0))
            (output.float() * weights.flatten(0, 1)[numbers]).sum().backward()
            found.append(
                [output, hidden.grad, *(parameter.grad for parameter in blocks.parameters())]
            )
        for one, other in zip(*found, strict=True):
            assert (one - other).float().norm() <= tolerance * one.float().norm()
