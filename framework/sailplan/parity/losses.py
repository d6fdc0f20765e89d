"""Is a contrastive loss exact across ranks? The test that `sailplan check parity --loss
module:function` runs on a loss it is handed.

Every row of a batch is a parameter of its own here, so that no encoder can hide a wrong gradient.
The loss is called once by a world of one on all rows: that is the reference. Then several forked
gloo ranks call it on their rows each. A data-parallel trainer takes the mean over ranks of the
parameters' gradients; a rank's rows have a gradient on that rank only, so the mean is the
concatenation of the ranks' gradients divided by their number. It must be the reference
(docs/exactness.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sailplan.config.schema import DatasetConfig, PatternConfig, ViewConfig
from sailplan.data.config import Kind, Part
from sailplan.data.record import HardNegatives, ViewKey
from sailplan.errors import ConfigurationError
from sailplan.objective.protocol import EncodedStep, EncodedView, Objective, ObjectiveContext
from sailplan.objective.temperature import Temperatures
from sailplan.runtime.arrays import Array
from sailplan_kernels.exchange import AllGather, Local
from sailplan_kernels.testing import RankFailure, run_ranks

Loss = Callable[[Tensor, Tensor], Tensor]
ROWS, SIZE = 6, 16  # of a rank
TOLERANCE = 1e-10  # of the largest element of the true gradient


@dataclass(frozen=True)
class LossParity:
    """What was found; `problem` says in words why no gradient could be compared."""

    exact: bool
    scale: float = float("nan")  # least-squares factor of the found gradient over the true one
    cosine: float = float("nan")  # between the two
    error: float = float("inf")  # largest difference over the largest true element
    loss: float = float("nan")  # mean of the ranks' losses
    full_batch_loss: float = float("nan")
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        return f"scale factor {self.scale:.6g}, cosine {self.cosine:.6f}, relative error {self.error:.1e}"


def _batch(rows: int) -> list[Tensor]:
    """Queries and keys [rows, SIZE], float64, of length one; a key resembles its query, as after
    some training.
    """
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(rows, SIZE, dtype=torch.float64, generator=generator)
    keys = queries + torch.randn(rows, SIZE, dtype=torch.float64, generator=generator)
    return [torch.nn.functional.normalize(side, dim=1) for side in (queries, keys)]


def _gradients(
    rank: int, world_size: int, function: Loss, rows: int
) -> tuple[float, list[Array | None]]:
    """The loss and the gradients of this rank's rows, as lists of numpy arrays; None where there
    is none.
    """
    sides = [side.chunk(world_size)[rank].clone().requires_grad_() for side in _batch(rows)]
    loss = function(*sides)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = (
            f"a tensor of shape {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else type(loss).__name__
        )
        raise TypeError(f"the loss returned {found}, expected a tensor of one element")
    if loss.requires_grad:
        loss.backward()
    return float(loss), [None if side.grad is None else side.grad.numpy() for side in sides]


def check_loss(function: Loss, world_size: int = 4, timeout: float = 60.0) -> LossParity:
    """Compares `function(queries, keys)` on `world_size` ranks with the same function on one.

    The function gets the rank's rows [6, 16], float64, inside an initialised default group (gloo),
    and returns the rank's loss.
    A rank that raises, returns no finite gradient or does not finish within `timeout` seconds is a
    finding, not an error.
    """
    rows = ROWS * world_size
    try:
        ((full_loss, reference),) = run_ranks(_gradients, 1, function, rows, timeout=timeout)
    except RankFailure as failure:
        return LossParity(False, problem=f"on one rank, with the full batch: {_last_line(failure)}")
    try:
        found = run_ranks(_gradients, world_size, function, rows, timeout=timeout)
    except RankFailure as failure:
        return LossParity(False, problem=_last_line(failure))
    for name, (loss, sides) in [
        ("the full batch on one rank", (full_loss, reference)),
        *((f"rank {rank}", one) for rank, one in enumerate(found)),
    ]:
        for side, gradient in zip(("queries", "keys"), sides, strict=True):
            if gradient is None:
                return LossParity(False, problem=f"{name}: {side} get no gradient")
            if not torch.from_numpy(gradient).isfinite().all() or loss != loss:
                return LossParity(
                    False, problem=f"{name}: the loss or the gradient of {side} is not finite"
                )
    true = torch.cat([torch.from_numpy(side) for side in reference]).flatten()
    mean = (
        torch.cat(
            [torch.from_numpy(sides[side]) for side in (0, 1) for _, sides in found]
        ).flatten()
        / world_size
    )
    if not true.any():
        return LossParity(
            False,
            problem="the full batch on one rank: the gradient is zero everywhere, nothing can be compared",
        )
    error = float((mean - true).abs().max() / true.abs().max())
    return LossParity(
        exact=error <= TOLERANCE,
        scale=float(mean @ true / (true @ true)),
        cosine=float(torch.nn.functional.cosine_similarity(mean, true, dim=0, eps=1e-300)),
        error=error,
        loss=sum(loss for loss, _ in found) / world_size,
        full_batch_loss=full_loss,
    )


def of_objective(objective: type[Objective]) -> Loss:
    """An Objective class, with its options' defaults, as a function of queries and keys: the two
    views of one pattern, in a data set of items with classes or, where the loss does not apply to
    these, of graded pairs with negatives that a teacher scored. Raises ConfigurationError where it applies to neither.
    """
    parts: dict[Kind, tuple[Part, Part]] = {
        "items": ("item", "item"),
        "pairs": ("query", "target"),
    }  # what the two views show of a record of each kind
    sets: dict[str, DatasetConfig] = {
        kind: DatasetConfig(
            kind=kind,
            views={
                name: ViewConfig(part, ["vision", "text"])
                for name, part in zip(("query", "target"), shown, strict=True)
            },
            patterns={"checked": PatternConfig("query", "target")},
            label="class",
            negatives=2 if kind == "pairs" else 0,
            teacher_scores="scores" if kind == "pairs" else None,
        )
        for kind, shown in parts.items()
    }
    built = objective(embedding=SIZE, datasets=sets)
    kind = next((name for name, dataset in sets.items() if built.applies(dataset)), None)
    if kind is None:
        raise ConfigurationError(
            f"{objective.__name__} applies neither to items nor to pairs: check the function of "
            "queries and keys that it calls"
        )

    def loss(queries: Tensor, keys: Tensor) -> Tensor:
        exchange = AllGather() if dist.get_world_size() > 1 else Local()
        first, rows = dist.get_rank() * len(queries), len(queries)
        ids = torch.arange(first, first + rows)
        token_mask = torch.arange(3) <= (ids % 3)[:, None]
        views: dict[ViewKey, EncodedView] = {
            name: EncodedView(
                fused=side,
                valid=torch.ones(rows, dtype=torch.bool),
                ids=ids + offset,
                by_modality={"vision": side, "text": side},
                tokens=tokens_of(side),
                token_mask=token_mask,
            )
            for name, side, offset in (
                ("query", queries, 0),
                ("target", keys, ROWS * dist.get_world_size()),
            )
        }
        scores = ((ids * 7) % 5 + 1) / 5.0 if kind == "pairs" else None
        # Negatives of a row depend on the row alone: its key with other dimensions' values.
        other = torch.stack([keys.roll(1, 1), keys.flip(1)], 1).flatten(0, 1)
        views[HardNegatives("checked")] = EncodedView(
            other,
            torch.ones(2 * rows, dtype=torch.bool),
            torch.arange(2 * rows) - 2 * rows,
            2,
            tokens=tokens_of(other),
            token_mask=torch.ones(2 * rows, 3, dtype=torch.bool),
        )
        teacher_scores = torch.stack([(ids * step) % 4 / 2.0 for step in (3, 5, 7)], 1)
        context = ObjectiveContext(sets, exchange, Temperatures(sets).double(), (SIZE // 2, SIZE))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # an objective's own weights are the same on all ranks
            module = objective(embedding=SIZE, datasets=sets).double()
        step = EncodedStep(
            kind,
            views,
            {"checked": 1.0},
            scores=scores,
            teacher_scores=teacher_scores,
            labels=ids % 4 - 1,
        )
        loss: Tensor = module(step, context).loss
        return loss

    return loss


def tokens_of(rows: Tensor) -> Tensor:
    """Three positions of each row [r, D] that depend on it alone, [r, 3, D]."""
    return torch.stack([rows, rows.roll(1, 1) ** 2, rows.flip(1)], 1)


def _last_line(failure: RankFailure) -> str:
    lines = str(failure).strip().splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1].strip()}"
