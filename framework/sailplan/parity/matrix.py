"""The proof of exactness as a table: `python -m sailplan.parity.matrix [--world N ...]
[--markdown FILE]`.

Four parts. The mixed step of all losses at every layout: worlds of 1, 2 and 4 ranks,
tensor-parallel sizes 1 and 2, every sharding, every exchange, several micro-batch counts and
numbers of kept graphs. The same in float32, whose rounding is larger. Each loss alone, because in
the mixed step one loss's error could hide behind another's larger gradient; late interaction, whose
tokens not every encoder gives, in no other way. And twenty optimizer
steps, whose losses and parameters must stay together.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sailplan.config.fields import Options
from sailplan.parity.layouts import compare, reference, relative_errors, trajectory
from sailplan.parity.published import TINY
from sailplan.parity.testing import OMNI, WEIGHTS
from sailplan_kernels.exchange import EXCHANGES

LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2))  # (world, tensor parallel)
MICRO_BATCHES = ((1, 0), (3, 0), (8, 0))  # (micro-batches a view, kept graphs)
KEPT = ((3, 2), (3, -1))
ALONE = {
    "infonce": "items",
    "cosent": "pairs",
    "micl": "items",
    "late_fusion": "pairs",
    "seq2item": "sequences",
    "id2item": "items",
    "sigmoid": "items",
    "multi_positive": "items",
    "score_distillation": "scored",
    "late_interaction": "items",
}
STEPS = 20
LIMITS = {torch.float64: 1e-10, torch.float32: 2e-5}
COLUMNS = (
    "losses",
    "dtype",
    "world",
    "TP",
    "DP",
    "sharding",
    "exchange",
    "micro-batches",
    "kept graphs",
    "encoder calls",
    "error",
    "where",
)


Line = tuple[Any, ...]  # of the table: a value for each of COLUMNS


@dataclass(frozen=True)
class Group:
    """Comparisons that differ in their micro-batches only."""

    world: int
    tensor_parallel: int
    cases: Sequence[tuple[int, int]]
    sharding: str = "shard"
    exchange: str = "all_gather"
    dtype: torch.dtype = torch.float64
    loss: str | None = None  # None: all
    steps: int = 0  # optimizer steps; 0: gradients of one
    encoder: str = OMNI

    @property
    def data_parallel(self) -> int:
        return self.world // self.tensor_parallel

    @property
    def place(self) -> tuple[object, ...]:
        """The first of COLUMNS, up to the exchange."""
        losses = self.loss or (f"all, {self.steps} steps" if self.steps else "all")
        losses += "" if self.encoder == OMNI else f", {self.encoder}"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            losses,
            dtype,
            self.world,
            self.tensor_parallel,
            self.data_parallel,
            self.sharding,
            self.exchange,
        )


@dataclass(frozen=True)
class References:
    """The full batch's gradients and the one-rank trajectory, computed when first asked for."""

    found: dict[tuple[str | None, str], tuple[float, dict[str, Tensor]]] = field(
        default_factory=dict
    )
    trajectories: dict[int, tuple[list[float], dict[str, Tensor]]] = field(default_factory=dict)

    def gradients(self, loss: str | None, encoder: str = OMNI) -> tuple[float, dict[str, Tensor]]:
        if (loss, encoder) not in self.found:
            self.found[loss, encoder] = (
                reference(encoder=encoder)
                if loss is None
                else reference({loss: 1.0}, (ALONE[loss],))
            )
        return self.found[loss, encoder]

    def trajectory(self, steps: int) -> tuple[list[float], dict[str, Tensor]]:
        if steps not in self.trajectories:
            self.trajectories[steps] = trajectory(1, 1, steps=steps)
        return self.trajectories[steps]


def groups(worlds: Sequence[int] = (1, 2, 4)) -> Iterator[Group]:
    """The whole matrix, at these world sizes."""
    for world, tensor in LAYOUTS:
        if world not in worlds:
            continue
        size = world // tensor
        for exchange in (
            EXCHANGES if size > 1 else ("all_gather",)
        ):  # alone, there is nobody to exchange with
            for sharding in ("shard", "replicate", "hybrid"):
                if (
                    sharding != "hybrid" or size >= 4
                ):  # two copies, each cut over two ranks at least
                    plain = sharding == "shard" and exchange == "all_gather"
                    yield Group(
                        world,
                        tensor,
                        (*MICRO_BATCHES, *KEPT) if plain else MICRO_BATCHES,
                        sharding,
                        exchange,
                    )
    for world, tensor in ((1, 1), (2, 1), (4, 2)):
        if world in worlds:
            yield Group(world, tensor, ((3, 0),), dtype=torch.float32)
    for world, tensor in ((2, 1), (4, 2)):
        if world in worlds:
            yield from (Group(world, tensor, ((2, 0),), loss=loss) for loss in ALONE)
    for group in (
        Group(2, 1, ((1, 0),), steps=STEPS),
        Group(4, 1, ((3, 0),), "hybrid", "ring", steps=STEPS),
        Group(4, 2, ((1, 0),), steps=STEPS),
    ):
        if group.world in worlds:
            yield group
    for encoder in TINY:
        yield from (
            Group(world, 1, MICRO_BATCHES, encoder=encoder)
            for world in (1, 2, 4)
            if world in worlds
        )


def lines(group: Group, references: References) -> list[Line]:
    """A group's comparisons as lines of the table: one value for each of COLUMNS."""
    options = {
        "sharding": group.sharding,
        "exchange": group.exchange,
        "dtype": group.dtype,
        "encoder": group.encoder,
    }
    if group.steps:
        return [
            (
                *group.place,
                micro_batches,
                kept,
                "",
                *_apart(group, micro_batches, references, options),
            )
            for micro_batches, kept in group.cases
        ]
    weights = WEIGHTS if group.loss is None else {group.loss: 1.0}
    if group.loss is not None:
        options["datasets"] = (ALONE[group.loss],)
    expected = references.gradients(group.loss, group.encoder)
    rows = compare(
        group.world,
        group.tensor_parallel,
        group.cases,
        weights=weights,
        expected=expected,
        **options,
    )
    return [
        (*group.place, row.micro_batches, row.kept_graphs, row.encoder_calls, row.error, row.worst)
        for row in rows
    ]


def _apart(
    group: Group, micro_batches: int, references: References, options: Options
) -> tuple[float, str]:
    """How far losses and final parameters are from those of one rank, and where most."""
    losses, parameters = trajectory(
        group.world, group.tensor_parallel, micro_batches, group.steps, **options
    )
    alone, expected = references.trajectory(group.steps)
    errors = relative_errors(parameters, expected)
    errors |= {
        f"loss of step {number}": abs(loss - true) / abs(true)
        for number, (loss, true) in enumerate(zip(losses, alone, strict=True), 1)
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def markdown(found: Sequence[Line]) -> str:
    """The document: what was compared, on what, and the table."""
    largest = {
        kind: max((line[-2] for line in found if line[1] == kind), default=0.0)
        for kind in ("float64", "float32")
    }
    head = "\n".join(
        [
            "# Parity: every layout against the full batch",
            "",
            "Made by `python -m sailplan.parity.matrix --markdown docs/parity.md`; the words are "
            "in [exactness](exactness.md). Each line is a",
            "step of `sailplan.parity.testing`: one, whose gradients are compared with those of "
            "the full batch by plain autograd in one process;",
            "or, where it says so, twenty optimizer steps, whose losses and final parameters are "
            "compared with those of one rank.",
            "Error: the largest difference of any parameter's gradient, relative to that "
            "gradient's largest element.",
            "Encoder calls: micro-batches that a rank ran backward. Kept graphs: micro-batches "
            "that were not encoded a second time.",
            "",
            f"- Device: CPU ({platform.machine()}), gloo; torch {torch.__version__}, megatron-core "
            f"{version('megatron-core')},"
            f" Python {platform.python_version()}. No GPU was used.",
            f"- Comparisons: {len(found)}. Largest error in float64: {largest['float64']:.1e} "
            f"(limit {LIMITS[torch.float64]:.0e});"
            f" in float32: {largest['float32']:.1e} (limit {LIMITS[torch.float32]:.0e}).",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|{'---|' * len(COLUMNS)}",
        ]
    )
    return head + "\n" + "".join(f"| {' | '.join(written(line))} |\n" for line in found)


def written(line: Line) -> list[str]:
    """A line's values as text."""
    values = dict(zip(COLUMNS, line, strict=True))
    values["kept graphs"] = "all" if values["kept graphs"] == -1 else values["kept graphs"]
    values["error"] = f"{values['error']:.1e}"
    return [str(value) for value in values.values()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table line by line; 1 if an error is above its limit."""
    parser = argparse.ArgumentParser(
        prog="python -m sailplan.parity.matrix",
        description="compare every layout's gradients with the full batch's",
    )
    parser.add_argument(
        "--world",
        type=int,
        action="append",
        choices=(1, 2, 4),
        help="this world size only; may be repeated (default: all)",
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write the table to a file"
    )
    options = parser.parse_args(arguments)
    references, found, exact = References(), [], True
    print(" | ".join(COLUMNS))
    for group in groups(options.world or (1, 2, 4)):
        for line in lines(group, references):
            within = line[-2] <= LIMITS[group.dtype]
            print(" | ".join(written(line)) + ("" if within else "  ABOVE THE LIMIT"), flush=True)
            found.append(line)
            exact = exact and within
    if options.markdown:
        options.markdown.write_text(markdown(found))
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
