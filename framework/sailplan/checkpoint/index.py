"""Reading a checkpoint's index without running what is in it.

torch writes the index of a distributed checkpoint as a pickle, and a pickle may name any function
to call. This reader makes the classes that an index consists of, and refuses every other name.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from sailplan.errors import ConfigurationError

ALLOWED = {
    **{("torch", name): None for name in ("Size", "device", "memory_format")},
    **{("torch.serialization", name): None for name in ("_get_layout",)},
    **{("torch._utils", name): None for name in ("_rebuild_device_mesh",)},
    **{("collections", name): None for name in ("OrderedDict",)},
    **{("pathlib", name): None for name in ("Path", "PosixPath", "PurePosixPath")},
}
ALLOWED_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        import torch

        plain = "." not in name and not name.startswith("__")
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (plain and (module, name) in ALLOWED) or dtype:
            return super().find_class(module, name)
        if plain and module in ALLOWED_MODULES:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"names {module}.{name}, which no index needs")


class IndexReader(dcp.FileSystemReader):
    """torch's reader of checkpoint folders, which unpickles an index and nothing else, once.

    content: of the index, where another rank has read it.
    """

    def __init__(self, path: str | Path, content: bytes | None = None) -> None:
        super().__init__(path)
        self._folder, self._content = Path(path), content
        self._index: Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """Return the index. Raises ConfigurationError for a file that is none."""
        if self._index is not None:
            return self._index
        file = self._folder / ".metadata"
        try:
            content = file.read_bytes() if self._content is None else self._content
            found = _Unpickler(io.BytesIO(content)).load()
        except (
            pickle.UnpicklingError,
            EOFError,
            AttributeError,
            ImportError,
            IndexError,
            TypeError,
            ValueError,
            KeyError,
        ) as error:
            raise ConfigurationError(
                f"{file}: not the index of a checkpoint ({error}); it is not opened any further: "
                "use another checkpoint"
            ) from error
        if not isinstance(found, Metadata):
            raise ConfigurationError(
                f"{file}: found {type(found).__name__}, expected the index of a checkpoint: use "
                "another one"
            )
        storage = getattr(found, "storage_meta", None)
        if storage is not None:
            storage.load_id = self.load_id
        self._index, self._content = found, None
        return found
