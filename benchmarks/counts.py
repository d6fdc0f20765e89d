"""What a call of the loss and a training step ask of the device, counted at fixed shapes without
a GPU.

    python benchmarks/counts.py count --out benchmarks/results/counts.json
    python benchmarks/counts.py check --results benchmarks/results/counts.json
    python benchmarks/counts.py table --document docs/performance.md

Device operations, host waits, uploads in bytes, collectives (number, bytes) and FLOP are those of
rank 0 of two gloo ranks whose tensors lie on the stand-in device (tests/device); counting.py says
how. The shapes are tiny: the numbers of operations, waits and collectives do not depend on them, as
long as a call's scores fit into one chunk, and bytes are for comparison.

`check` counts again and ends with 1 where anything grew over the committed file; another release of
torch composes some operations otherwise, so it only compares under the release that the file names.
`table` writes the document's tables from counts_before.json (commit 3e849ec), counts.json and the
arithmetic of cluster_arithmetic.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from counting import ROOT, Counting, device  # noqa: E402
from torch import Tensor  # noqa: E402

from sailplan.config.schema import Config  # noqa: E402
from sailplan.data.packing import SequenceLayout, pack  # noqa: E402
from sailplan.data.record import StepBatch  # noqa: E402
from sailplan.model.parallelize import shard  # noqa: E402
from sailplan.model.testing import join_layout  # noqa: E402
from sailplan.parity import testing as steps  # noqa: E402
from sailplan.runtime.process import Parallel  # noqa: E402
from sailplan.step.training_step import TrainingStep  # noqa: E402
from sailplan_kernels import infonce  # noqa: E402
from sailplan_kernels.arguments import grouped  # noqa: E402
from sailplan_kernels.exchange import AllGather, RowSplit  # noqa: E402
from sailplan_kernels.testing import run_ranks  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
RANKS = 2
LOSS_ROWS = (64, 512)
DIMENSION, PREFIXES, HARD = 192, (48, 96, 192), 4
MICRO_BATCHES = 8
KEPT = (0, 1, 4, 8)
GROWS = (
    "operations",
    "waits",
    "uploads",
    "uploaded_bytes",
    "collectives",
    "collective_bytes",
    "flop",
    "flop_per_forward",
)


# ------------------------------------------------------------------------------------------------
# the loss
def loss_call(kind: str, rows: int, dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """Arguments of one infonce call: "rows" is the row-only loss without an option, "recipe"
    what a training step asks for.
    """
    g = torch.Generator().manual_seed(rank)
    ids = lambda: torch.randint(0, 2 * rows, (rows,), generator=g)  # noqa: E731
    flags = lambda *shape: torch.rand(*shape, generator=g) < 0.9  # noqa: E731
    vectors = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    call = {
        "queries": vectors(rows, DIMENSION),
        "keys": vectors(rows, DIMENSION),
        "temperature": torch.tensor(0.05),
    }
    if kind == "recipe":
        query_ids = ids()
        call |= {
            "query_ids": query_ids,
            "key_query_ids": query_ids,
            "key_ids": ids(),
            "query_valid": flags(rows),
            "key_valid": flags(rows),
        }
        call |= {
            "hard_negatives": vectors(rows, HARD, DIMENSION),
            "hard_negative_valid": flags(rows, HARD),
            "symmetric": True,
            "prefixes": PREFIXES,
        }
    return call


def count_losses(rank: int, world_size: int) -> dict[str, Any]:
    """Forward and backward, of the torch engine: the second call of its kind, as in a run; ids
    and masks lie where the loader has them.
    """
    device.serve(dist.distributed_c10d._get_default_group())
    found, exchange = {}, AllGather(None)
    for kind in ("rows", "recipe"):
        for rows in LOSS_ROWS:
            for dtype in (torch.float32, torch.bfloat16):
                with device.stand_in_device() as there:
                    call = loss_call(kind, rows, dtype, rank)
                    call |= {
                        key: x.to(there).requires_grad_()
                        for key, x in call.items()
                        if isinstance(x, Tensor) and x.is_floating_point()
                    }
                    call |= {
                        "exchange": exchange,
                        "backend": "chunked",
                        "sizes": [(rows, rows)] * world_size,
                    }
                    infonce(**grouped(call)).loss.backward()
                    with Counting() as counting:
                        infonce(**grouped(call)).loss.backward()
                found[f"{kind}, {rows} rows, {str(dtype)[6:]}"] = counting.counts.table()
    return found


# ------------------------------------------------------------------------------------------------ a
# step
def serve_all(parallel: Parallel) -> None:
    for group in {
        dist.distributed_c10d._get_default_group(),
        parallel.data_parallel_group,
        parallel.tensor_parallel_group,
    }:
        device.serve(group)


def build(config: Config, parallel: Parallel, compute_dtype: torch.dtype | None) -> TrainingStep:
    modules = steps.build_modules(config, torch.float32)
    shard(modules[0], parallel, shard=True, compute_dtype=compute_dtype)
    for module in modules[1:]:
        module.to(parallel.device)
    optimizer = torch.optim.AdamW([p for module in modules for p in module.parameters()], lr=1e-3)
    exchange = RowSplit(
        AllGather(parallel.data_parallel_group), AllGather(parallel.tensor_parallel_group)
    )
    return TrainingStep(*modules, optimizer, config, parallel, exchange)


def packed(batch: StepBatch, layout: SequenceLayout) -> StepBatch:
    """With the packing of every micro-batch, which the loader makes on the CPU."""
    views = {
        name: dataclasses.replace(
            view,
            micro_batches=[
                dataclasses.replace(inputs, packing=pack(inputs, layout))
                for inputs in view.micro_batches
            ],
        )
        for name, view in batch.views.items()
    }
    return dataclasses.replace(batch, views=views)


def batches_of(
    config: Config, datasets: tuple[str, ...], micro_batches: int, parallel: Parallel
) -> list[StepBatch]:
    whole = [batch for batch in steps.global_batches(config, 1) if batch.dataset in datasets]
    place = parallel.data_parallel_rank, parallel.data_parallel_size
    return [steps.share(batch, *place, micro_batches, dtype=torch.float32) for batch in whole]


def forward_flop(step: TrainingStep, batches: list[StepBatch]) -> int:
    """F: one encoding of everything that the step encodes, without graphs."""
    inputs = [
        each for batch in batches for view in batch.views.values() for each in view.micro_batches
    ]
    with torch.no_grad(), Counting() as counting:
        for each in inputs:
            step.encoder(each.to(step.parallel.device), per_modality=False)
    for module in step.encoder.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return counting.counts.flop


def count_step(
    datasets: tuple[str, ...],
    weights: dict[str, float],
    micro_batches: int,
    kept: int,
    dtype: torch.dtype | None,
) -> Callable[..., Any]:
    """The second step of a run: parameters and optimizer are in their lasting state."""

    def work(rank: int, world_size: int) -> dict[str, Any]:
        here = join_layout(1)
        serve_all(here)
        parallel = Parallel(**{**vars(here), "device": device.DEVICE})
        config = steps.step_config(kept_graphs=kept)
        batches = batches_of(config, datasets, micro_batches, parallel)
        with device.stand_in_device():
            step = build(config, parallel, dtype)
            batches = [packed(batch, step.encoder.layout) for batch in batches]
            options: dict[str, Any] = {"stage": "one", "thresholds": steps.THRESHOLDS}
            step.run(batches, weights, step=1, **options)
            forward = forward_flop(step, batches)
            with Counting() as counting:
                step.run(batches, weights, step=2, **options)
        found: dict[str, Any] = counting.counts.table()
        found["flop_per_forward"] = round(found["flop"] / forward, 3)
        return found

    return work


MIXED = ("items", "pairs", "sequences")
RECIPE = {
    name: steps.WEIGHTS[name]
    for name in ("infonce", "cosent", "micl", "late_fusion", "seq2item", "id2item")
}
STEPS: dict[str, Callable[..., Any]] = {
    "items, infonce": count_step(("items",), {"infonce": 1.0}, 2, 0, None),
    "items, infonce, bfloat16": count_step(("items",), {"infonce": 1.0}, 2, 0, torch.bfloat16),
    "pairs without sound, infonce, bfloat16": count_step(
        ("pairs",), {"infonce": 1.0}, 2, 0, torch.bfloat16
    ),
    "three sets, all objectives": count_step(MIXED, RECIPE, 1, 1, None),
    "three sets, all objectives, bfloat16": count_step(MIXED, RECIPE, 1, 1, torch.bfloat16),
    "three sets, losses beside the recipe's too, bfloat16": count_step(
        MIXED, steps.WEIGHTS, 1, 1, torch.bfloat16
    ),
}
KEPT_STEPS = {
    str(kept): count_step(("pairs",), {"infonce": 1.0}, MICRO_BATCHES // 2, kept, None)
    for kept in KEPT
}  # two views


CHECKED = ("losses", "three sets, all objectives, bfloat16", "4")  # of the tests: one of each kind


def counted(work: Callable[..., Any]) -> dict[str, Any]:
    """Rank 0's counts; a step that fails is a row that says how."""
    try:
        return run_ranks(work, RANKS, timeout=500)[0]
    except Exception as error:
        cause = error.__cause__ or error
        return {
            "error": f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"[
                :200
            ]
        }


def count(only: tuple[str, ...] = ()) -> dict[str, Any]:
    wanted = lambda name: not only or name in only  # noqa: E731
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "what": "asked of the device by rank 0 of two, counted on the stand-in device",
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "losses": counted(count_losses) if wanted("losses") else {},
        "steps": {name: counted(work) for name, work in STEPS.items() if wanted(name)},
        "kept_graphs": {name: counted(work) for name, work in KEPT_STEPS.items() if wanted(name)},
    }


# ------------------------------------------------------------------------------------------------
# the committed file
def grown(
    found: dict[str, Any], committed: dict[str, Any], only: tuple[str, ...] = ()
) -> list[str]:
    """What is larger than in the committed record, or is not there, or fails where it did not."""
    told = []
    for part in ("losses", "steps", "kept_graphs"):
        for name, row in committed[part].items():
            if "error" in row or (only and name not in only and part not in only):
                continue
            now = found[part].get(name)
            if now is None or "error" in now:
                told.append(
                    f"{part}: {name}: found {(now or found[part]).get('error', 'nothing')}, "
                    "expected counts"
                )
                continue
            told += [
                f"{part}: {name}: {key}: found {now[key]}, expected at most {row[key]}"
                for key in GROWS
                if key in row and now[key] > row[key]
            ]
    return told


def check(options: argparse.Namespace) -> int:
    committed = json.loads(Path(options.results).read_text())
    if committed["torch"] != torch.__version__:
        print(f"not compared: counted with torch {committed['torch']}, this is {torch.__version__}")
        return 0
    only = () if options.all else CHECKED
    told = grown(count(only), committed, only)
    print("\n".join(told) or "nothing grew")
    if told:
        print(
            "fewer is better; where more is meant, write the file anew: python "
            "benchmarks/counts.py count --out benchmarks/results/counts.json"
        )
    return bool(told)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    counter = commands.add_parser("count")
    counter.add_argument("--out", required=True)
    checker = commands.add_parser("check")
    checker.add_argument("--results", default=str(RESULTS / "counts.json"))
    checker.add_argument("--all", action="store_true", help="every row, not one of each kind")
    writer = commands.add_parser("table")
    writer.add_argument("--document", default=str(ROOT / "docs" / "performance.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "check":
        return check(options)
    if options.command == "count":
        Path(options.out).write_text(json.dumps(count(), indent=1) + "\n")
        return 0
    from counts_document import write

    write(Path(options.document), RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
