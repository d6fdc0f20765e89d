"""Risks: a step asks more of the device than it did, the document tells other numbers than the
files, the arithmetic counts another model.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sailplan.config.schema import ModelConfig, TransformerShape, VisionConfig
from sailplan.data.packing import OmniInputs
from sailplan.model.testing import join_layout
from sailplan.model.tower import OmniEncoder
from sailplan_kernels.testing import run_ranks

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: object) -> str:
    path = os.pathsep.join(str(ROOT / name) for name in ("benchmarks", "framework", "kernels"))
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


def test_nothing_grew() -> None:
    """In a process of its own, as the stand-in device is registered for a whole process."""
    assert (
        python(ROOT / "benchmarks/counts.py", "check")
        .strip()
        .endswith(("nothing grew", torch.__version__))
    )


def test_growth_is_told(tmp_path: Path) -> None:
    script = """
import json, counts
record = json.loads((counts.RESULTS / "counts.json").read_text())
less = json.loads(json.dumps(record))
name = next(iter(less["losses"]))
less["losses"][name]["waits"] -= 1
assert not counts.grown(record, record, counts.CHECKED)
(told,) = counts.grown(record, less, counts.CHECKED)
assert name in told and "waits" in told
record["losses"] = {"error": "a crash"}
assert counts.grown(record, less, counts.CHECKED)
"""
    python("-c", script)


def test_the_document_is_made_from_the_files(tmp_path: Path) -> None:
    copy = tmp_path / "performance.md"
    shutil.copy(ROOT / "docs/performance.md", copy)
    python(ROOT / "benchmarks/counts.py", "table", "--document", copy)
    assert copy.read_text() == (ROOT / "docs/performance.md").read_text(), (
        "run python benchmarks/counts.py table"
    )


def attention_flop(query: torch.Size, key: torch.Size, *_: object, **__: object) -> int:
    rows, heads, positions, size = query
    return 4 * rows * heads * positions * key[2] * size


@pytest.mark.parametrize("modalities", [("text",), ("vision", "text")], ids="+".join)
def test_the_flop_formula_is_near_torchs_counter(
    modalities: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without gaps; the stem, which the formula leaves out, is one product more."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from cluster_arithmetic import row_flop

    def shape(layers: int) -> TransformerShape:
        return TransformerShape(layers, 32, 4, 2, 64)

    vision = VisionConfig(patch=8, stem="patch", encoder=shape(2), perceiver=shape(1), latents=4)
    config = ModelConfig(vocabulary=40, embedding=32, prefixes=[32], tower=shape(3), vision=vision)
    rows, tokens = 3, 12
    ids = torch.ones(rows, tokens, dtype=torch.int64)
    inputs = OmniInputs(modalities, ids, ids.bool(), ids.bool())
    stem = 0
    if "vision" in modalities:
        inputs.images, inputs.image_mask = (
            torch.zeros(rows, 1, 3, 32, 32),
            torch.ones(rows, 1, dtype=torch.bool),
        )
        stem = 2 * 16 * 3 * 8 * 8 * 32

    def work(rank: int, world_size: int) -> int:
        join_layout(1)
        encoder = OmniEncoder(config)
        attention = {
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop
        }  # a CPU's is not in torch's list
        with FlopCounterMode(display=False, custom_mapping=attention) as counter, torch.no_grad():
            encoder(inputs)
        return counter.get_total_flops()

    (found,) = run_ranks(work, 1)
    assert found == pytest.approx(
        rows * (row_flop(config, modalities, tokens, 32) + stem), rel=0.02
    )
