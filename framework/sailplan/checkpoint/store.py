"""Saving: a folder is a checkpoint only when its last file says so.

All ranks write their blocks into `step-XXXXXXXX.tmp`; rank 0 adds the small data, renames the
folder and then writes `COMPLETE`, which lists every file with its size and SHA-256. A job that dies
on the way leaves a folder that nobody will load, and a file that changed afterwards is noticed when
it is read: ranks share the work of hashing. The index is a pickle by torch's format; it is read by
an unpickler that makes an index and nothing else. The folder must be on a file system that all
ranks share; or each node has one of its own, with its ranks' parts, and whole is what they are
copied to (`copies`).

Every phase ends in an agreement: what fails on one rank raises on all, so that none waits for ever.

Layout of a checkpoint: `.metadata` and `*.distcp` (torch's distributed checkpoint: "model.NAME" and
"optimizer.KIND.NAME", whole tensors), `small.pt` (the caller's extra data, the optimizer's step
counts), `COMPLETE`.
Learning rates and other optimizer options are not saved: they are functions of the configuration
and the step.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil  # noqa: F401  torch's writer needs it and fails in a way that leaves ranks waiting; fail at import instead
import torch
import torch.distributed as dist
from torch import nn

from sailplan.checkpoint.plans import SavePlans
from sailplan.checkpoint.seal import (
    COMPLETE,
    Entry,
    entry_of,
    first_damage,
    flush,
    has_sizes,
    is_complete,
    is_step,
    seal,
    was_sealed,
)
from sailplan.checkpoint.state import ModelState, model_state, optimizer_state
from sailplan.checkpoint.together import everywhere, together
from sailplan.config.fields import JsonObject
from sailplan.errors import SailplanError
from sailplan.runtime.leaving import say
from sailplan.runtime.process import Parallel

SMALL = "small.pt"


def folder_of(checkpoints: Path, step: int) -> Path:
    """checkpoints/step-00000042"""
    return checkpoints / f"step-{step:08d}"


@dataclass(frozen=True)
class Snapshot:
    """What this rank puts into a checkpoint, apart from the model: views of tensors in the CPU's
    memory, and the small data.
    """

    tensors: ModelState
    small: JsonObject


def save(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    extra: dict[str, object],
    parallel: Parallel,
) -> Path:
    """Write a checkpoint to `folder` (see `folder_of`; an older one of the same name is
    replaced) and returns it.

    All ranks call it. model: the module that holds everything to be kept, sharded parts and plain
    ones.
    extra: what rank 0 passes is kept; JSON-like values and tensors. Raises SailplanError on all
    ranks when any failed.
    """
    what = f"checkpoint {folder} could not be written"
    return write(
        folder, together(lambda: state_of(model, optimizer, extra, parallel), what), parallel
    )


def state_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    extra: dict[str, object],
    parallel: Parallel,
) -> Snapshot:
    """Views of the live model and optimizer; they change with the next step."""
    tensors = model_state(model, parallel)
    scalars: dict[str, dict[str, float]] = {}
    if optimizer is not None:
        moments, scalars = optimizer_state(model, optimizer, parallel)
        tensors |= moments
    return Snapshot(tensors, {"extra": extra, "scalars": scalars})


def write(
    folder: Path,
    snapshot: Snapshot,
    parallel: Parallel,
    group: dist.ProcessGroup | None = None,
    plans: SavePlans | None = None,
    *,
    makes: bool | None = None,
) -> Path:
    """The part of `save` after the snapshot; touches neither model nor optimizer, so a thread of
    its own may run it.

    group: all ranks, for the messages between the writers (None: the default group, which the
    calling thread then must have for itself). plans: of the saves before. makes: whether this rank
    makes the folder; of several folders, rank 0's gets the seal of all files (None: one rank does,
    for all). Raises as `save`.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    what = f"checkpoint {folder} could not be written"
    makes = parallel.is_main if makes is None else makes

    def prepare() -> None:
        if makes:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    entries: dict[str, Entry] = {}

    def hash_tensors() -> None:
        own = {file.name: entry_of(file) for file in temporary.glob(f"__{dist.get_rank()}_*")}
        everyone: list[dict[str, Entry]] | None = (
            [{}] * dist.get_world_size() if parallel.is_main else None
        )
        dist.gather_object(own, everyone, dst=0, group=group)
        for one in everyone or []:
            entries.update(one)

    def publish() -> None:
        if not makes:
            return
        if parallel.is_main:
            with open(temporary / SMALL, "wb") as file:
                torch.save(snapshot.small, file)
                flush(file)
        replaced = folder.with_name(folder.name + ".old")
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        if parallel.is_main:
            seal(folder, entries)
        shutil.rmtree(replaced, ignore_errors=True)

    try:
        together(prepare, what, group)
        (plans or SavePlans()).save(temporary, snapshot.tensors, what, group)
        together(hash_tensors, what, group)
        together(publish, what, group)
    except SailplanError:
        if makes:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk gets its space back
        raise
    return folder


def newest_whole(checkpoints: Path, parallel: Parallel) -> Path | None:
    """Return the newest checkpoint of which every file is what was written, None where there is
    none. A collective.

    Damaged ones are named, and passed over.
    """
    for name in parallel.broadcast_text(
        "\n".join(map(str, reversed(_steps(checkpoints))))
    ).splitlines():
        folder = Path(name)
        if not all(everywhere(partial(has_sizes, folder), folder)):
            continue
        damage = next(
            filter(
                None,
                everywhere(
                    partial(first_damage, folder, parallel.rank, parallel.world_size), folder
                ),
            ),
            "",
        )  # type: ignore[misc]
        if not damage:
            return folder
        if parallel.is_main:
            say(
                f"checkpoint {folder}: {damage} is damaged, it is not what was written; looking at "
                "the one before"
            )
    return None


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint below `checkpoints`, or None.

    Broken and unfinished ones are passed over.
    """
    return next((folder for folder in reversed(_steps(checkpoints)) if is_complete(folder)), None)


def damaged(checkpoints: Path) -> list[Path]:
    """Checkpoints that were sealed once and are not whole any more; what a job left unfinished,
    its seal too, is not among them.
    """
    return [
        folder for folder in _steps(checkpoints) if was_sealed(folder) and not is_complete(folder)
    ]


def newest(checkpoints: Path, count: int) -> list[Path]:
    """The `count` newest complete checkpoints below `checkpoints`, the newest first; fewer where
    there are fewer.
    """
    return [folder for folder in reversed(_steps(checkpoints)) if is_complete(folder)][:count]


def prune(checkpoints: Path, keep: int, keep_every: int = 0) -> list[Path]:
    """Delete all but the `keep` newest complete checkpoints, complete ones of steps that
    `keep_every` divides (0: none), and whatever is newer; returns what was deleted.

    To be called on one rank. Folders newer than the newest complete one are left: another job may
    be writing them.
    """
    kept = newest(checkpoints, max(keep, 1))

    def milestone(folder: Path) -> bool:
        step = int(folder.name.removeprefix("step-"))
        return keep_every > 0 and step % keep_every == 0 and is_complete(folder)

    doomed = [
        folder
        for folder in _steps(checkpoints)
        if kept and folder < kept[-1] and not milestone(folder)
    ]
    for folder in doomed:
        (folder / COMPLETE).unlink(missing_ok=True)  # never half deleted and still complete
        shutil.rmtree(folder)
    return doomed


def keep_newest(checkpoints: Path, keep: int) -> None:
    """Delete all but the `keep` newest folders of a node's own, which has parts alone and cannot
    tell whether they are whole. To be called on one rank of the node.
    """
    for folder in _steps(checkpoints)[: -max(keep, 1)]:
        shutil.rmtree(folder)


def _steps(checkpoints: Path) -> list[Path]:
    return sorted(
        folder
        for folder in Path(checkpoints).glob("step-*")
        if folder.is_dir() and is_step(folder.name)
    )
