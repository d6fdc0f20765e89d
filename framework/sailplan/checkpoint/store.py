"""Saving and loading: a folder is a checkpoint only when its last file says so.

All ranks write their blocks into `step-XXXXXXXX.tmp`; rank 0 adds the small data, renames the
folder and then writes `COMPLETE`, which lists every file with its size and SHA-256. A job that dies
on the way leaves a folder that nobody will load, and a file that changed afterwards is noticed when
it is read: ranks share the work of hashing. The index is a pickle by torch's format; it is read by
an unpickler that makes an index and nothing else. The folder must be on a file system that all
ranks share.

Every phase ends in an agreement: what fails on one rank raises on all, so that none waits for ever.

Layout of a checkpoint: `.metadata` and `*.distcp` (torch's distributed checkpoint: "model.NAME" and
"optimizer.KIND.NAME", whole tensors), `small.pt` (the caller's extra data, the optimizer's step
counts), `COMPLETE`.
Learning rates and other optimizer options are not saved: they are functions of the configuration
and the step.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil  # noqa: F401  torch's writer needs it and fails in a way that leaves ranks waiting; fail at import instead
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sailplan.checkpoint.exported import Entries, ExportedFolder, Shapes, is_exported
from sailplan.checkpoint.index import IndexReader
from sailplan.checkpoint.seal import (
    COMPLETE,
    digest_of,
    first_damage,
    flush,
    has_sizes,
    is_complete,
    seal,
    was_sealed,
)
from sailplan.checkpoint.state import (
    ModelState,
    fresh_optimizer_state,
    model_state,
    optimizer_state,
)
from sailplan.errors import ConfigurationError, SailplanError
from sailplan.runtime.leaving import say
from sailplan.runtime.process import Parallel

SMALL = "small.pt"
Value = TypeVar("Value")


def folder_of(checkpoints: Path, step: int) -> Path:
    """checkpoints/step-00000042"""
    return checkpoints / f"step-{step:08d}"


@dataclass(frozen=True)
class Snapshot:
    """What this rank puts into a checkpoint, apart from the model: views of tensors in the CPU's
    memory, and the small data.
    """

    tensors: ModelState
    small: dict[str, Any]


def save(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    extra: dict[str, Any],
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
        folder, _together(lambda: state_of(model, optimizer, extra, parallel), what), parallel
    )


def state_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    extra: dict[str, Any],
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
    folder: Path, snapshot: Snapshot, parallel: Parallel, group: dist.ProcessGroup | None = None
) -> Path:
    """The part of `save` after the snapshot; touches neither model nor optimizer, so a thread of
    its own may run it.

    group: all ranks, for the messages between the writers (None: the default group, which the
    calling thread then must have for itself). Raises as `save`.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    what = f"checkpoint {folder} could not be written"

    def prepare() -> None:
        if parallel.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    digests: dict[str, str] = {}

    def write_tensors() -> None:
        dcp.save(
            dict(snapshot.tensors),
            storage_writer=dcp.FileSystemWriter(temporary),
            process_group=group,
        )
        own = {file.name: digest_of(file) for file in temporary.glob(f"__{dist.get_rank()}_*")}
        everyone: list[dict[str, str]] | None = (
            [{}] * dist.get_world_size() if parallel.is_main else None
        )
        dist.gather_object(own, everyone, dst=0, group=group)
        for one in everyone or []:
            digests.update(one)

    def publish() -> None:
        if not parallel.is_main:
            return
        with open(temporary / SMALL, "wb") as file:
            torch.save(snapshot.small, file)
            flush(file)
        replaced = folder.with_name(folder.name + ".old")
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        seal(folder, digests)
        shutil.rmtree(replaced, ignore_errors=True)

    try:
        for action in (prepare, write_tensors, publish):
            _together(action, what, group)
    except SailplanError:
        if parallel.is_main:
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
        if not all(_everywhere(partial(has_sizes, folder), folder)):
            continue
        damage = next(
            filter(
                None,
                _everywhere(
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


def _everywhere(question: Callable[[], Value], folder: Path) -> list[Value]:
    """Return every rank's answer; raise on all where one of them has none."""
    answers: list[Value] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(answers, _together(question, f"checkpoint {folder} could not be read"))
    return answers


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


def prune(checkpoints: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` newest complete checkpoints and whatever is older than these;
    returns what was deleted.

    To be called on one rank. Folders newer than the newest complete one are left: another job may
    be writing them.
    """
    kept = newest(checkpoints, max(keep, 1))
    doomed = [folder for folder in _steps(checkpoints) if kept and folder < kept[-1]]
    for folder in doomed:
        (folder / COMPLETE).unlink(missing_ok=True)  # never half deleted and still complete
        shutil.rmtree(folder)
    return doomed


class WholeCheckpoint:
    """The model's whole tensors of a complete checkpoint, for one process without any group.

    Opening it reads the index alone.
    """

    def __init__(self, path: Path) -> None:
        damage = first_damage(path)
        if damage:
            raise ConfigurationError(
                f"checkpoint {path}: {damage} is not what was written: restore it, or use an older "
                "one"
            )
        self._reader = IndexReader(path)
        self.entries = _entries(self._reader.read_metadata())

    def read(self, name: str) -> Tensor:
        return self.read_all([name])[name]

    def read_all(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The named tensors (None: all), on the CPU."""
        names = self.entries if names is None else names
        state: dict[str, Any] = {
            f"model.{name}": torch.empty(self.entries[name][0], dtype=self.entries[name][1])
            for name in names
        }
        dcp.load(state, storage_reader=self._reader, no_dist=True)
        return {key.removeprefix("model."): value for key, value in state.items()}


def load(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    parallel: Parallel,
    verified: bool = False,
) -> dict[str, Any]:
    """Load model and optimizer, at any layout and in any dtype, and returns the saved `extra`.

    verified: its files were compared with their checksums just before, by `newest_whole`. All ranks
    call it, after sharding. The model's tensors must be exactly the checkpoint's. Raises
    ConfigurationError on all ranks where they are not, or where the checkpoint is missing or
    incomplete.
    """
    path = Path(path)
    metadata, small = _opened(path, parallel, verified)

    def target() -> ModelState:
        tensors = model_state(model, parallel)
        _check_fit(path, tensors, _shapes(metadata), exact=True)
        if optimizer is not None:
            tensors |= fresh_optimizer_state(
                model, optimizer, parallel, small["scalars"], metadata.state_dict_metadata
            )
        return tensors

    _read(path, target)
    return small["extra"]


def load_model_only(
    path: Path,
    *,
    model: nn.Module,
    parallel: Parallel,
    prefix: str = "",
    exact: bool = False,
    may_lack: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Load the tensors of `model` from a checkpoint or an exported folder; returns the saved
    `extra` ({} of an export).

    prefix: where `model` was within the saved module, for example "encoder.". exact: tensors below
    the prefix that the model lacks are refused; otherwise they are ignored, as all that lies
    elsewhere. may_lack: whether the model's tensor of that name keeps its numbers where the
    checkpoint has none. Raises as `load`.
    """
    path = Path(path)
    what = f"checkpoint {path} could not be read"
    exported = _together(lambda: ExportedFolder(path) if is_exported(path) else None, what)

    def target() -> ModelState:
        tensors = {
            key.replace("model.", f"model.{prefix}", 1): view
            for key, view in model_state(model, parallel).items()
        }
        shapes = exported.shapes() if exported else _shapes(metadata)
        tensors = {
            key: view
            for key, view in tensors.items()
            if (name := key.removeprefix("model.")) in shapes or not may_lack(name)
        }
        _check_fit(
            path,
            tensors,
            {name: shape for name, shape in shapes.items() if name.startswith(prefix)},
            exact=exact,
        )
        return tensors

    if exported:
        _together(lambda: exported.fill(target()), what)
        return {}
    metadata, small = _opened(path, parallel)
    _read(path, target)
    return small["extra"]


def _steps(checkpoints: Path) -> list[Path]:
    return sorted(
        folder
        for folder in Path(checkpoints).glob("step-*")
        if folder.is_dir() and folder.name.removeprefix("step-").isdigit()
    )


def _opened(
    path: Path, parallel: Parallel, verified: bool = False
) -> tuple[Metadata, dict[str, Any]]:
    """Index and small data of a checkpoint of which the ranks have read every file and found it
    whole.
    """

    def check() -> None:
        if (
            path.is_dir()
            and has_sizes(path)
            and (damage := first_damage(path, parallel.rank, parallel.world_size))
        ):
            raise ConfigurationError(
                f"checkpoint {path}: {damage} is damaged, it is not what was written: restore it, "
                "or use an older one"
            )

    what = f"checkpoint {path} could not be read"
    if not verified:
        _together(check, what)
    return _together(lambda: _open(path), what)


def _open(path: Path) -> tuple[Metadata, dict[str, Any]]:
    if not path.is_dir():
        raise ConfigurationError(
            f"checkpoint {path} does not exist: give the folder of a step, such as "
            "runs/NAME/checkpoints/step-00000100"
        )
    if not has_sizes(path):
        raise ConfigurationError(
            f"checkpoint {path} is incomplete or damaged: its files are not those listed in "
            f"{COMPLETE}; use an older one"
        )
    return IndexReader(path).read_metadata(), torch.load(
        path / SMALL, weights_only=True, map_location="cpu"
    )


def _entries(metadata: Metadata) -> Entries:
    return {
        key.removeprefix("model."): (tuple(entry.size), entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }


def _shapes(metadata: Metadata) -> Shapes:
    return {name: shape for name, (shape, _) in _entries(metadata).items()}


def _check_fit(path: Path, tensors: ModelState, saved: Shapes, *, exact: bool) -> None:
    remedy = "use the model and objectives that the checkpoint was made with"
    for key, view in tensors.items():
        name = key.removeprefix("model.")
        if name not in saved:
            raise ConfigurationError(f"checkpoint {path} lacks the tensor {name}: {remedy}")
        if saved[name] != tuple(view.size()):
            raise ConfigurationError(
                f"checkpoint {path}: {name} has the shape {saved[name]}, the model expects "
                f"{tuple(view.size())}; {remedy}"
            )
    if exact and (unknown := sorted(name for name in saved if f"model.{name}" not in tensors)):
        raise ConfigurationError(
            f"checkpoint {path} has the tensor {unknown[0]}, which the model lacks: {remedy}"
        )


def _read(path: Path, target: Callable[[], ModelState]) -> None:
    what = f"checkpoint {path} could not be read"
    tensors = _together(target, what)
    _together(lambda: dcp.load(dict(tensors), storage_reader=IndexReader(path)), what)


def _together(
    action: Callable[[], Value], what: str, group: dist.ProcessGroup | None = None
) -> Value:
    """Run `action` on every rank; if it fails on any, raises on all: ConfigurationError as it
    is, else SailplanError in one line.
    """
    failure: Exception | CheckpointException | None = None
    value: Value
    try:
        value = action()
    except (
        Exception,
        CheckpointException,
    ) as error:  # torch derives its exception from BaseException
        failure = error
    reports: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, None if failure is None else _report(failure), group=group)
    report = next((report for report in reports if report is not None), None)
    if report is not None:
        configuration, text = report
        if configuration:
            raise ConfigurationError(text) from failure
        raise SailplanError(f"{what}: {text}") from failure
    return value


def _report(error: BaseException) -> tuple[bool, str]:
    """Whether it is a ConfigurationError, and one line that names the rank; torch's exception
    has the failing ranks in it.
    """
    rank = dist.get_rank()
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = next(iter(error.failures.items()))
    if isinstance(error, ConfigurationError):
        return True, str(error)
    return False, f"rank {rank}: {type(error).__name__}: {error}".replace("\n", " ")
