"""Reading an exported folder (sailplan.export.weights writes it): whole tensors, or a rank's own
blocks of them into a model at any layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

if TYPE_CHECKING:  # what it imports is not needed to read a folder
    from sailplan.checkpoint.state import ModelState

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
Shapes = dict[str, tuple[int, ...]]  # tensor name -> shape
Entries = dict[str, tuple[tuple[int, ...], torch.dtype]]  # tensor name -> (shape, dtype)
TYPES = {
    **{
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "BOOL": torch.bool,
    },
    **{
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
    },
}


def is_exported(path: Path) -> bool:
    """Whether the folder is a completed export; its description is written last."""
    return (path / DESCRIPTION).is_file()


class ExportedFolder:
    """The whole tensors of an export. Opening it reads the header alone."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path / WEIGHTS, framework="pt")
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118  not a dictionary
        self.entries: Entries = {
            name: (tuple(part.get_shape()), TYPES[part.get_dtype()])
            for name, part in slices.items()
        }

    def shapes(self) -> Shapes:
        return {name: shape for name, (shape, _) in self.entries.items()}

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def fill(self, tensors: ModelState) -> None:
        """Fill the views "model.NAME" in place, in their own dtype."""
        for key, view in tensors.items():
            name = key.removeprefix("model.")
            for chunk, held in view.blocks():
                if not chunk.sizes:
                    held.copy_(self.read(name))
                    continue
                place = tuple(
                    slice(start, start + size)
                    for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
                )
                held.copy_(self._file.get_slice(name)[place])
