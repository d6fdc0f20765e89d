"""The same job on one rank, two data-parallel ranks and two tensor-parallel ranks: same samples,
same losses.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sailplan.train.testing import SMALL, metrics, run

# One stage with fixed weights: what its start computes from the model would feel the last bits of a
# float32.
JOB = [
    *SMALL,
    "order=[diverse]",
    "stages.diverse.balance=null",
    "stages.diverse.steps=4",
    "parallel.dtype=float64",
    "~evaluation.tasks.emoji_image_to_name",
]
LAYOUTS = {
    "one": (1, []),
    "data_parallel": (2, []),
    "ring": (2, ["parallel.exchange=ring"]),
    "tensor_parallel": (2, ["parallel=tensor_2", "parallel.dtype=float64"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[dict]]:
    folder: Path = tmp_path_factory.mktemp("layouts")
    found = {}
    for name, (ranks, overrides) in LAYOUTS.items():
        done = run("train", *JOB, *overrides, f"name={name}", f"runs={folder}", ranks=ranks)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        found[name] = metrics(folder / name)
    return found


@pytest.mark.parametrize("layout", ["data_parallel", "ring", "tensor_parallel"])
def test_four_optimizer_steps_stay_together(runs: dict[str, list[dict]], layout: str) -> None:
    assert len(runs["one"]) == 4
    for alone, spread in zip(runs["one"], runs[layout], strict=True):
        assert spread["data/digest"] == alone["data/digest"]
        assert spread["loss/total"] == pytest.approx(alone["loss/total"], rel=1e-9)
        assert spread["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-7)
