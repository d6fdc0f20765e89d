"""Saving while the training goes on.

At a save the ranks copy what they hold to the CPU's memory and go on with the next step; a thread
of each rank writes the copy and agrees with the other ranks' threads over a gloo group of its own,
because messages of two threads on one group could meet the wrong partner. The seal is written when
all ranks' parts are on the disk, so a job that is killed meanwhile goes on from the checkpoint
before.

At most one save is under way: the next one waits for it, and so do a stop and the end of the run.
There, on all ranks alike, an error of the thread is raised. The copies' memory is kept and used
again.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sailplan.checkpoint.copies import Copies
from sailplan.checkpoint.layout import WholeTensorView
from sailplan.checkpoint.plans import SavePlans
from sailplan.checkpoint.store import Snapshot, keep_newest, prune, state_of, write
from sailplan.errors import SailplanError
from sailplan.runtime.environment import local_rank
from sailplan.runtime.groups import default_timeout
from sailplan.runtime.leaving import is_lost_peer, say
from sailplan.runtime.process import Parallel


class Saver:
    """Saves checkpoints of one model and optimizer, in the background or not; a context manager
    that waits at its end.

    All ranks make one and call its methods alike. keep: newest complete checkpoints that stay in a
    saved one's folder; keep_every: those of steps that it divides stay, too (0: none).
    copies: where each is copied to. own_folders: each node saves into a folder of its own, so that
    a checkpoint is whole when it is copied.
    """

    def __init__(
        self,
        parallel: Parallel,
        *,
        asynchronous: bool,
        keep: int,
        keep_every: int = 0,
        copies: Copies | None = None,
        own_folders: bool = False,
    ) -> None:
        self.parallel, self.asynchronous = parallel, asynchronous
        self.keep, self.keep_every = keep, keep_every
        self._group = (
            dist.new_group(backend="gloo", timeout=default_timeout()) if asynchronous else None
        )
        self._copies: dict[str, Tensor] = {}
        self._plans, self._copies_to, self._own_folders = SavePlans(), copies, own_folders
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        folder: Path,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        extra: dict[str, object],
    ) -> None:
        """Save the state as it is now; returns when it is copied (asynchronous) or written.

        Raises as `wait`.
        """
        self.wait()
        snapshot = state_of(model, optimizer, extra, self.parallel)
        if not self.asynchronous:
            self._write(folder, snapshot)
            return
        snapshot = Snapshot(
            {key: self._copied(key, view) for key, view in snapshot.tensors.items()}, snapshot.small
        )
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize()
        self._thread = threading.Thread(
            target=self._work, args=(folder, snapshot), name="sailplan-checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when nothing is under way.

        Raises SailplanError on all ranks if the save before failed on any.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except SailplanError as failure:
            if error is None:
                raise
            if not is_lost_peer(failure.__cause__ or failure):  # that is no news then
                say(str(failure))  # what ended the run is the error to raise

    def _copied(self, key: str, view: WholeTensorView) -> WholeTensorView:
        kept = self._copies.get(key)
        if kept is None or kept.shape != view.held.shape or kept.dtype != view.held.dtype:
            on_device = view.held.device.type == "cuda"
            kept = self._copies[key] = torch.empty(
                view.held.shape, dtype=view.held.dtype, device="cpu", pin_memory=on_device
            )
        kept.copy_(view.held, non_blocking=True)
        return WholeTensorView(kept, view.layout_of_whole)

    def _work(self, folder: Path, snapshot: Snapshot) -> None:
        try:
            self._write(folder, snapshot)
        except BaseException as error:  # raised by `wait`
            if isinstance(error, SailplanError):
                self._failure = error
            else:
                self._failure = SailplanError(f"checkpoint {folder} could not be written: {error}")
                self._failure.__cause__ = error

    def _write(self, folder: Path, snapshot: Snapshot) -> None:
        makes = local_rank() == 0 if self._own_folders else self.parallel.is_main
        write(folder, snapshot, self.parallel, self._group, self._plans, makes=makes)
        if self._own_folders:
            assert self._copies_to is not None
            self._copies_to.send(folder, self._group)
            if makes:
                keep_newest(folder.parent, self.keep)
            return
        if makes:
            prune(folder.parent, self.keep, self.keep_every)
        if self._copies_to is not None:
            try:
                self._copies_to.send(folder, self._group)
            except SailplanError as error:  # of a copy: the checkpoint is whole
                if is_lost_peer(error.__cause__ or error):
                    raise
                if self.parallel.is_main:
                    say(f"{error}; the run folder has it, the next save is copied again")
