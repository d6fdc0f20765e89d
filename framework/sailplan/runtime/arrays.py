"""Arrays as .npy files: whole or not at all, or of one shape with ranges that ranks write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # of whichever numbers a file or a caller holds


def save(path: Path, array: Array) -> None:
    """Write an array, whole or not at all."""
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    with open(temporary, "wb") as file:
        np.save(file, array)
    os.replace(temporary, path)


class SharedArray:
    """A .npy file of a known shape, of which each rank writes ranges of rows."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str) -> None:
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)

    def create(self) -> None:
        """Make the file, if it is not there; its numbers are zeros until they are written."""
        if self.path.is_file():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        np.lib.format.open_memmap(temporary, mode="w+", dtype=self.dtype, shape=self.shape)
        os.replace(temporary, self.path)

    def write(self, first: int, rows: Array) -> None:
        """Write rows from number `first` on."""
        if not len(rows):
            return
        offset = int(np.load(self.path, mmap_mode="r").offset)
        file = os.open(self.path, os.O_WRONLY)
        try:
            content = np.ascontiguousarray(rows, dtype=self.dtype)
            at, left = (offset + first * content[0].nbytes, memoryview(content.tobytes()))  # type: ignore[arg-type]
            while left:
                written = os.pwrite(file, left, at)
                at, left = at + written, left[written:]
        finally:
            os.close(file)
