"""Records that could not be used, by name and reason, in the run folder's quarantine.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from sailplan.config.fields import JsonObject
from sailplan.data.record import StepBatch
from sailplan.errors import BadDataError
from sailplan.train.callback import Callback, Run, StageRun, StepDone


class Quarantine(Callback):
    """Record bad samples of all ranks, and those of a step whose loss or gradient is not finite."""

    @contextmanager
    def running(self, run: Run) -> Iterator[None]:
        """Record what made the data unusable when it ends the run, too; any rank may be the one
        that meets it.
        """
        try:
            yield
        except BadDataError as error:
            if run.stage is not None and run.parallel.tensor_parallel_rank == 0:
                run.folder.add_quarantined(_records(run.step + 1, run.stage, error.samples))
            raise

    def flags(self, run: Run, stage: StageRun, batches: Sequence[StepBatch]) -> Sequence[bool]:
        return (any(batch.quarantined for batch in batches),)

    def after_step(self, run: Run, done: StepDone, flags: Sequence[bool]) -> None:
        if not (flags[0] or done.result.skipped):
            return
        samples = [sample for batch in done.batches for sample in batch.quarantined]
        samples += [(name, "loss or gradient not finite") for name in done.result.suspects]
        everyone: list[list[JsonObject]] = [[] for _ in range(run.parallel.world_size)]
        first_of_peers = run.parallel.tensor_parallel_rank == 0
        local = _records(run.step, done.stage, samples) if first_of_peers else []
        dist.all_gather_object(everyone, local)
        if run.parallel.is_main:
            run.folder.add_quarantined([record for records in everyone for record in records])


def _records(step: int, stage: StageRun, samples: Sequence[tuple[str, str]]) -> list[JsonObject]:
    return [
        {"step": step, "stage": stage.span.name, "id": name, "reason": reason}
        for name, reason in samples
    ]
