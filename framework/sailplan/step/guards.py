"""What must hold on all ranks before the optimizer moves the weights.

One rank's infinite loss or gradient would poison every replica, and ranks that disagree about
skipping a step would drift apart or hang. So the verdict is one agreement over the world, in the
message that sums the gradient norm anyway: all step, or none does. A skipped step names the records
that look guilty; too many skips in a row end the run, because then it is not the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from sailplan.data.record import StepBatch
from sailplan.errors import SailplanError
from sailplan.objective.protocol import EncodedStep
from sailplan.runtime.process import Parallel


class Suspect(NamedTuple):
    """A record of a skipped step; position: in its data set, -1 where nobody knows."""

    dataset: str
    id: str
    position: int


class FiniteGuard:
    """Skips steps whose loss or gradient norm is not finite on some rank.

    max_skips: skipped steps in a row before SailplanError.
    """

    def __init__(self, parallel: Parallel, max_skips: int = 10) -> None:
        self.parallel = parallel
        self.max_skips = max_skips
        self.skips = 0

    def allows(self, finite: bool) -> bool:
        """Whether the optimizer may step.

        finite: the verdict that all ranks agreed on; counts skips in a row.

        Raises SailplanError at the `max_skips`-th skip in a row.
        """
        if finite:
            self.skips = 0
            return True
        self.skips += 1
        if self.skips >= self.max_skips:
            raise SailplanError(
                f"loss or gradient norm: not finite in {self.skips} steps in a row, expected "
                "finite values; "
                "lower the learning rate, or look at the records in skipped_steps.jsonl"
            )
        return False

    def suspects(
        self, batches: Sequence[StepBatch], encoded: Sequence[EncodedStep]
    ) -> tuple[list[Suspect], bool]:
        """This rank's records that a skipped step names, and whether by their own vectors. A
        collective.

        Records with a vector that is not finite; if there are none on any rank, all records of the
        step.
        """
        guilty = [
            suspect
            for batch, step in zip(batches, encoded, strict=True)
            for suspect in _not_finite(batch, step)
        ]
        if self.parallel.agree(bool(guilty)):
            return guilty, True
        return [one for batch in batches for one in _named(batch, range(len(batch.record_ids)))], (
            False
        )


def _named(batch: StepBatch, rows: Iterable[int]) -> list[Suspect]:
    return [
        Suspect(
            batch.dataset, batch.record_ids[row], batch.positions[row] if batch.positions else -1
        )
        for row in rows
    ]


def _not_finite(batch: StepBatch, encoded: EncodedStep) -> list[Suspect]:
    rows = len(batch.record_ids)
    bad = torch.zeros(
        rows, dtype=torch.bool, device=next(iter(encoded.views.values())).fused.device
    )
    for view in encoded.views.values():
        for vectors in (view.fused, *view.by_modality.values()):
            # Padding may hold anything.
            row_bad = ~vectors.detach().isfinite().all(1) & view.valid
            bad |= row_bad.view(rows, view.group).any(1)
    return _named(batch, bad.nonzero()[:, 0].tolist())
