"""Who writes what of a checkpoint, decided once.

torch's distributed checkpoint plans each save anew: every rank sends a description of its blocks to
rank 0, which removes what several hold and sends each its part; then every rank sends where its
blocks lie, and rank 0 writes the index and sends it to all. Among 512 ranks that is a minute of
Python on rank 0. Here a later save of the same blocks sends three numbers a rank: whether they are
the same, and whether they came to lie at the same places. Rank 0 then writes the index that it wrote
before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from sailplan.checkpoint.layout import WholeTensorView
from sailplan.checkpoint.seal import INDEX, flush
from sailplan.checkpoint.together import together

State = Mapping[str, WholeTensorView]
Signature = tuple[tuple[object, ...], ...]


def signature(state: State) -> Signature:
    """Return what a plan depends on: names, shapes, dtypes and this rank's blocks."""
    return tuple(
        (name, view.layout_of_whole.shape, view.held.dtype, view.layout_of_whole.blocks)
        for name, view in state.items()
    )


class SavePlans:
    """The plans of one run's saves. For one thread of each rank at a time."""

    def __init__(self) -> None:
        self.made = 0  # plans that were made, for counting
        self._signature: Signature | None = None
        self._plan: SavePlan | None = None
        self._results: list[WriteResult] | None = None
        self._metadata: Metadata | None = None  # of rank 0
        self._index = b""  # of rank 0: the index as it was written

    def save(
        self, folder: Path, state: State, what: str, group: dist.ProcessGroup | None = None
    ) -> None:
        """Write this rank's part of `state` into a folder, and on rank 0 the index. A collective.

        what: begins the error. Raises SailplanError on all ranks where any fails.
        """
        planner, writer = DefaultSavePlanner(), dcp.FileSystemWriter(folder)
        main = dist.get_rank() == 0

        def local() -> SavePlan | None:
            planner.set_up_planner(dict(state), writer.storage_meta(), main)
            writer.set_up_storage_writer(main)
            found = signature(state)
            if found == self._signature and self._plan is not None:
                return None
            self._signature, self._plan = found, None
            return writer.prepare_local_plan(planner.create_local_plan())

        plan = together(local, what, group)
        if not _all(plan is None, group):
            if plan is None:
                plan = writer.prepare_local_plan(planner.create_local_plan())
            self._plan, self._results = self._planned(planner, writer, plan, what, group), None
        assert self._plan is not None
        own = self._plan

        def write() -> list[WriteResult]:
            writes = writer.write_data(planner.finish_plan(own), planner)
            writes.wait()
            return list(writes.value())

        results = together(write, what, group)
        if not _all(results == self._results, group):
            self._results = None
            everyone: list[list[WriteResult]] | None = (
                [[]] * dist.get_world_size() if main else None
            )
            dist.gather_object(results, everyone, dst=0, group=group)
            together(lambda: self._finish(folder, writer, everyone), what, group)
            self._results = results
        else:
            together(lambda: self._write_index(folder) if main else None, what, group)

    # ---------------------------------------------------------------- parts
    def _planned(
        self,
        planner: DefaultSavePlanner,
        writer: dcp.FileSystemWriter,
        plan: SavePlan,
        what: str,
        group: dist.ProcessGroup | None,
    ) -> SavePlan:
        self.made += 1
        main = dist.get_rank() == 0
        everyone: list[SavePlan] | None = [plan] * dist.get_world_size() if main else None
        dist.gather_object(plan, everyone, dst=0, group=group)

        def whole() -> list[SavePlan] | None:
            if everyone is None:
                return None
            plans, self._metadata = planner.create_global_plan(everyone)
            return writer.prepare_global_plan(plans)

        plans = together(whole, what, group)
        own: list[SavePlan] = [plan]
        dist.scatter_object_list(own, plans, src=0, group=group)
        return own[0]

    def _finish(
        self,
        folder: Path,
        writer: dcp.FileSystemWriter,
        results: list[list[WriteResult]] | None,
    ) -> None:
        if results is None:
            return
        assert self._metadata is not None
        writer.finish(metadata=self._metadata, results=results)
        self._index = (folder / INDEX).read_bytes()

    def _write_index(self, folder: Path) -> None:
        with open(folder / INDEX, "wb") as file:
            file.write(self._index)
            flush(file)


def _all(flag: bool, group: dist.ProcessGroup | None) -> bool:
    """Return whether all ranks say so; one number a rank."""
    device = "cpu"
    if dist.get_backend(group) == "nccl":
        device = f"cuda:{torch.cuda.current_device()}"
    value = torch.tensor([float(not flag)], device=device)
    dist.all_reduce(value, group=group)
    return not value.item()
