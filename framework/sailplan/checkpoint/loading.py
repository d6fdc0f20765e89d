"""Reading checkpoints: into a sharded model at any layout, or whole tensors for one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sailplan.checkpoint.exported import Entries, ExportedFolder, Shapes, is_exported
from sailplan.checkpoint.index import IndexReader
from sailplan.checkpoint.seal import COMPLETE, INDEX, first_damage, has_sizes
from sailplan.checkpoint.state import ModelState, fresh_optimizer_state, model_state
from sailplan.checkpoint.store import SMALL
from sailplan.checkpoint.together import together
from sailplan.config.fields import JsonObject
from sailplan.errors import ConfigurationError
from sailplan.runtime.process import Parallel
from sailplan.runtime.progress import progress

TOGETHER = 256  # tensors that are read between two words on how far it is


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
        wanted = list(self.entries if names is None else names)
        state: JsonObject = {
            f"model.{name}": torch.empty(self.entries[name][0], dtype=self.entries[name][1])
            for name in wanted
        }
        keys = list(state)
        with progress("reading the checkpoint", len(keys), "tensors") as advance:
            for start in range(0, len(keys), TOGETHER):
                some = {key: state[key] for key in keys[start : start + TOGETHER]}
                dcp.load(some, storage_reader=self._reader, no_dist=True)
                advance(len(some))
        return {key.removeprefix("model."): value for key, value in state.items()}


def load(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    parallel: Parallel,
    verified: bool = False,
) -> JsonObject:
    """Load model and optimizer, at any layout and in any dtype, and returns the saved `extra`.

    verified: its files were compared with their checksums just before, by `newest_whole`. All ranks
    call it, after sharding. The model's tensors must be exactly the checkpoint's. Raises
    ConfigurationError on all ranks where they are not, or where the checkpoint is missing or
    incomplete.
    """
    path = Path(path)
    reader, small = _opened(path, parallel, verified)
    metadata = reader.read_metadata()

    def target() -> ModelState:
        tensors = model_state(model, parallel)
        _check_fit(path, tensors, _shapes(metadata), exact=True)
        if optimizer is not None:
            tensors |= fresh_optimizer_state(
                model, optimizer, parallel, small["scalars"], metadata.state_dict_metadata
            )
        return tensors

    _read(path, target, reader)
    return small["extra"]


def load_model_only(
    path: Path,
    *,
    model: nn.Module,
    parallel: Parallel,
    prefix: str = "",
    exact: bool = False,
    may_lack: Callable[[str], bool] = lambda name: False,
) -> JsonObject:
    """Load the tensors of `model` from a checkpoint or an exported folder; returns the saved
    `extra` ({} of an export).

    prefix: where `model` was within the saved module, for example "encoder.". exact: tensors below
    the prefix that the model lacks are refused; otherwise they are ignored, as all that lies
    elsewhere. may_lack: whether the model's tensor of that name keeps its numbers where the
    checkpoint has none. Raises as `load`.
    """
    path = Path(path)
    what = f"checkpoint {path} could not be read"
    exported = together(lambda: ExportedFolder(path) if is_exported(path) else None, what)

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
        together(lambda: exported.fill(target()), what)
        return {}
    reader, small = _opened(path, parallel)
    metadata = reader.read_metadata()
    _read(path, target, reader)
    return small["extra"]


def _opened(
    path: Path, parallel: Parallel, verified: bool = False
) -> tuple[IndexReader, JsonObject]:
    """A reader and the small data of a checkpoint of which the ranks have read every file and
    found it whole.
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
        together(check, what)
    small = together(lambda: _open(path), what)
    return together(lambda: IndexReader(path, _sent_index(path, parallel, what)), what), small


def _open(path: Path) -> JsonObject:
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
    small: JsonObject = torch.load(path / SMALL, weights_only=True, map_location="cpu")
    return small


def _sent_index(path: Path, parallel: Parallel, what: str) -> bytes:
    """Return the bytes of the index, which rank 0 alone reads: it grows with the ranks that saved
    it, and so would the load of the file system.
    """
    content = together(lambda: (path / INDEX).read_bytes() if parallel.is_main else b"", what)
    size = torch.tensor([len(content)], device=parallel.device)
    dist.broadcast(size, src=0)
    sent = torch.empty(int(size), dtype=torch.uint8, device=parallel.device)
    if parallel.is_main:
        sent.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(sent, src=0)
    return sent.cpu().numpy().tobytes()


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
        if saved[name] != tuple(view.shape_of_whole):
            raise ConfigurationError(
                f"checkpoint {path}: {name} has the shape {saved[name]}, the model expects "
                f"{tuple(view.shape_of_whole)}; {remedy}"
            )
    if exact and (unknown := sorted(name for name in saved if f"model.{name}" not in tensors)):
        raise ConfigurationError(
            f"checkpoint {path} has the tensor {unknown[0]}, which the model lacks: {remedy}"
        )


def _read(path: Path, target: Callable[[], ModelState], reader: IndexReader) -> None:
    what = f"checkpoint {path} could not be read"
    tensors = together(target, what)
    together(lambda: dcp.load(dict(tensors), storage_reader=reader), what)
