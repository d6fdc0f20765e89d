"""bfloat16 on a device that is not the CPU: it trains whatever runs, and its losses reach the
Triton engine, in half the bytes.

Triton compiles for no such device, so its engine is a stub that counts what arrives at its door and
goes on in torch. Not collected by name: test_stand_in_device.py runs this file in a process of its
own. Forked ranks come
first: a backward here would start threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from stand_in_device import DEVICE, There, serve, stand_in_device
from torch import Tensor

from sailplan.cli.main import main
from sailplan.model.parallelize import shard
from sailplan.model.testing import join_layout
from sailplan.objective.backends import planned_backends
from sailplan.parity import testing as steps
from sailplan.parity.bfloat16 import (
    CHOICES,
    apart,
    case_gradients,
    pairwise,
    plain_gradients,
    trained,
)
from sailplan.runtime.process import Parallel
from sailplan.step.training_step import TrainingStep
from sailplan.train import plan, run
from sailplan.train.callbacks.checkpoint import Checkpoint
from sailplan.train.testing import SMALL
from sailplan_kernels.exchange import AllGather, RowSplit
from sailplan_kernels.testing import run_ranks
from sailplan_kernels.tiling import engines, fallback, triton_engine
from sailplan_kernels.tiling.tile import MaskConfig, Tile, TileOperand
from sailplan_kernels.tiling.torch_engine import TorchEngine

torch.set_num_threads(1)

# Of the matrix, what has a checkpoint is left out (see stand_in_device.py); every fourth of the
# rest.
CASES = [case for case in pairwise() if case.before != "a checkpoint"][::4]


def there(parallel: Parallel) -> Parallel:
    for group in {
        dist.distributed_c10d._get_default_group(),
        parallel.data_parallel_group,
        parallel.tensor_parallel_group,
    }:
        serve(group)
    return dataclasses.replace(parallel, device=DEVICE)


@pytest.mark.parametrize(
    "layout", CHOICES["layout"], ids=["one rank", "two ranks", "tensor parallel"]
)
def test_no_gradient_is_lost(layout, tmp_path):
    """Those that plain bfloat16 has on a CPU, and as far from the exact ones, but for products
    that round their results there.
    """
    cases = [case for case in CASES if case.layout == layout]
    assert len(cases) > 1

    def plain(rank: int, world_size: int) -> list[Any]:
        kinds = [(case.modalities, case.views) for case in cases]
        made = [
            [plain_gradients(*kind, dtype)[1] for dtype in (torch.float64, torch.bfloat16)]
            for kind in kinds
        ]
        return [
            [{name: gradient.numpy() for name, gradient in gradients.items()} for gradients in pair]
            for pair in made
        ]

    def work(rank: int, world_size: int) -> list[Any]:
        place = there(join_layout(layout[1]))
        with stand_in_device():
            found = [case_gradients(case, place, tmp_path)[1] for case in cases]
        return [
            {name: (str(gradient.dtype), gradient.numpy()) for name, gradient in gradients.items()}
            for gradients in found
        ]

    for case, found, pair in zip(
        cases, run_ranks(work, layout[0], timeout=400)[0], run_ranks(plain, 1)[0], strict=True
    ):
        exact, rounded = (
            {name: torch.from_numpy(array) for name, array in arrays.items()} for arrays in pair
        )
        names = {name for name in exact if trained(name, case.trainable)}
        assert {name: kind for name, (kind, _) in found.items()} == dict.fromkeys(
            names, "torch.float32"
        ), case
        measured = apart(
            {name: torch.from_numpy(array) for name, (_, array) in found.items()}, exact
        )
        rounding = apart({name: rounded[name] for name in names}, exact)
        for part, (_, error) in measured.items():
            assert error <= 1.5 * rounding[part][1] + 1e-2, (case, part, error, rounding[part])


class Door(TorchEngine):
    """In the Triton engine's place: notes the operands of each tile."""

    name = "triton"
    seen: ClassVar[list[tuple[torch.dtype, torch.dtype]]] = []

    def __init__(self, schedule: str = "auto") -> None: ...

    def tile(self, rows: TileOperand, columns: TileOperand, rule: MaskConfig, cached: bool) -> Tile:
        assert isinstance(rows.vectors, There) and isinstance(columns.vectors, There)
        self.seen.append((rows.vectors.dtype, columns.vectors.dtype))
        return super().tile(rows, columns, rule, cached)


class Counted(AllGather):
    """Notes the vectors, and their norms, that this rank shows to others: dtype -> bytes."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.bytes: dict[torch.dtype, int] = {}

    def _note(self, parts: Sequence[Tensor]) -> None:
        for x in parts:
            if x.is_floating_point() and x.dim() == 2:
                self.bytes[x.dtype] = self.bytes.get(x.dtype, 0) + x.nbytes

    def stream(self, x: Tensor, sizes: list[int], accumulate: torch.dtype) -> Any:
        self._note([x])
        return super().stream(x, sizes, accumulate)

    def gather_parts(self, parts: Sequence[Tensor]) -> Any:
        self._note(parts)
        return super().gather_parts(parts)  # type: ignore[misc]


@pytest.fixture
def triton_here(monkeypatch) -> None:
    """Triton "compiles" for the device."""
    monkeypatch.setattr(engines, "TRITON_DEVICES", ("cuda", DEVICE.type))
    monkeypatch.setattr(triton_engine, "TritonEngine", Door)


KERNELS = ("infonce", "late_fusion", "micl", "multi_positive", "seq2item", "sigmoid")


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_every_loss_of_a_step_reaches_the_triton_engine(triton_here, tensor_parallel):
    """`auto`: half precision there, float32 on chunked; what was foretold is what ran; the
    vectors of a step in half of the bytes.
    """

    def one(
        parallel: Parallel, dtype: torch.dtype, names: Sequence[str]
    ) -> tuple[dict[str, str], set[Any], int, dict[torch.dtype, int]]:
        config = steps.step_config(kept_graphs=1, backend="auto")
        config.parallel.dtype = str(dtype).removeprefix("torch.")
        modules = steps.build_modules(config, torch.float32)
        shard(
            modules[0],
            parallel,
            shard=True,
            compute_dtype=dtype if dtype is torch.bfloat16 else None,
        )
        for module in modules[1:]:
            module.to(parallel.device)
        exchange = Counted(parallel.data_parallel_group)
        optimizer = torch.optim.AdamW(
            [p for module in modules for p in module.parameters()], lr=1e-3
        )
        step = TrainingStep(
            *modules,
            optimizer,
            config,
            parallel,
            RowSplit(exchange, AllGather(parallel.tensor_parallel_group)),
        )
        whole = steps.global_batches(config, 1)
        batches = [
            steps.share(
                batch,
                parallel.data_parallel_rank,
                parallel.data_parallel_size,
                2,
                dtype=torch.float32,
            )
            for batch in whole
        ]
        batches = [
            batch
            for batch in batches
            if any(step.objectives[name].applies(config.data.sets[batch.dataset]) for name in names)
        ]
        Door.seen.clear()
        result = step.run(
            batches, dict.fromkeys(names, 1.0), step=1, stage="one", thresholds=steps.THRESHOLDS
        )
        assert not result.skipped
        planned = planned_backends(
            {name: step.objectives[name] for name in names}, "auto", parallel.device, dtype
        )
        assert result.backends == planned
        return result.backends, set(Door.seen), len(Door.seen), exchange.bytes

    def work(rank: int, world_size: int) -> Any:
        place = there(join_layout(tensor_parallel))
        with stand_in_device():
            alone = (
                {name: one(place, torch.bfloat16, [name]) for name in steps.WEIGHTS}
                if tensor_parallel == 1
                else {}
            )
            return (
                alone,
                one(place, torch.bfloat16, list(steps.WEIGHTS)),
                one(place, torch.float32, list(steps.WEIGHTS)),
            )

    for alone, half, full in run_ranks(work, 2, timeout=400):
        for name, (backends, seen, launches, _) in alone.items():
            called = name in KERNELS
            assert backends == {name: "triton bfloat16" if called else "torch float32"}
            assert (
                seen == ({(torch.bfloat16, torch.bfloat16)} if called else set())
                and (launches > 0) == called
            ), name
        assert half[1] == {(torch.bfloat16, torch.bfloat16)} and half[2] > 0
        assert half[0] == {
            name: "triton bfloat16" if name in KERNELS else "torch float32"
            for name in steps.WEIGHTS
        }
        assert (
            full[0]
            == {
                name: "chunked float32" if name in KERNELS else "torch float32"
                for name in steps.WEIGHTS
            }
            and not full[2]
        )
        vectors = half[3][torch.bfloat16]  # norms are float32 either way
        assert (
            set(full[3]) == {torch.float32}
            and full[3][torch.float32] - half[3][torch.float32] == 2 * vectors > 0
        )


class Refused:
    """A tile whose kernels no compiler takes."""

    def statistics(self) -> None:
        raise RuntimeError("PassManager::run failed")


@pytest.mark.parametrize("refused", [False, True])
def test_a_run_says_what_its_losses_go_through(triton_here, monkeypatch, tmp_path, capsys, refused):
    """`plan` before and the console at a stage's start what is foretold; metrics.jsonl after
    each step and stages.json what ran.
    """
    monkeypatch.setattr(fallback, "_refused", set())
    if refused:
        monkeypatch.setattr(
            Door,
            "tile",
            lambda self, rows, *_: (
                self.seen.append((rows.vectors.dtype, rows.vectors.dtype)) or Refused()
            ),
        )
    started = run.started

    @contextlib.contextmanager
    def started_there(config: Any) -> Iterator[Parallel]:
        with started(config) as parallel:
            yield there(parallel)

    monkeypatch.setattr(run, "started", started_there)
    monkeypatch.setattr(Checkpoint, "save", lambda *_: None)
    monkeypatch.setattr(plan, "device_type", lambda: DEVICE.type)
    words = [
        *SMALL,
        "parallel.threads=1",
        "parallel.dtype=bfloat16",
        "data.workers=0",
        "order=[diverse]",
        "stages.diverse.steps=2",
        "evaluation.tasks={}",
    ]
    words = [
        word
        for word in words
        if not word.startswith(("~evaluation", "evaluation.benchmark", "stages.diverse.balance"))
    ] + ["stages.diverse.balance=null"]
    words += ["name=half", f"runs={tmp_path}"]
    assert main(["plan", *words]) == 0
    (line,) = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(f"losses on {DEVICE.type}: ")
    ]
    planned = line.split(": ", 1)[1]
    assert "infonce triton bfloat16" in planned.split(", ")
    Door.seen.clear()
    with stand_in_device():
        assert main(["train", *words]) == 0
    assert f"losses: {planned}" in capsys.readouterr().out.splitlines()
    assert Door.seen and set(Door.seen) == {(torch.bfloat16, torch.bfloat16)}
    (stage,) = json.loads(Path(tmp_path, "half", "stages.json").read_text())
    foretold = dict(each.split(" ", 1) for each in planned.split(", "))
    ran = (
        {"infonce": "chunked bfloat16"} if refused else {}
    )  # the others were not asked in these steps
    assert stage["backends"] == foretold | ran
    lines = [
        json.loads(line)
        for line in Path(tmp_path, "half", "metrics.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 2 and not any(line.get("skipped") for line in lines)
    said = {f"backend/{name}": backend for name, backend in stage["backends"].items()}
    for found in lines:
        assert found["backend/infonce"] == f"{'chunked' if refused else 'triton'} bfloat16"
        assert {
            name: value for name, value in found.items() if name.startswith("backend/")
        }.items() <= said.items()
