"""A folder of vectors, as `sailplan embed` writes it, read in parts.

embeddings.json            what lies there, shard by shard; written last
embeddings-00000.npy       float32 [k, D], rows of length one
ids-00000.txt              k record ids, one a line
labels-00000.txt           k labels, one a line, empty where a record has none; if asked for
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sailplan.embed.residual_k_means import BLOCK
from sailplan.errors import ConfigurationError

MANIFEST, BEGUN = "embeddings.json", "begun.json"


def embeddings_file(shard: int) -> str:
    return f"embeddings-{shard:05d}.npy"


def ids_file(shard: int) -> str:
    return f"ids-{shard:05d}.txt"


def labels_file(shard: int) -> str:
    return f"labels-{shard:05d}.txt"


class VectorFolder:
    """The shards of a folder, and their rows in blocks that lie within a shard."""

    def __init__(self, folder: Path) -> None:
        """Raise ConfigurationError for a folder that `sailplan embed` has not completed."""
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise ConfigurationError(
                f"{folder}: found no {MANIFEST}, expected a folder that `sailplan embed` has completed"
            )
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self.dimension, self.rows = int(about["dimensions"]), int(about["rows"])
        self.labelled = about.get("label") is not None
        self.sizes = np.array([shard["rows"] for shard in about["shards"]], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._blocks = np.concatenate([[0], np.cumsum(-(-self.sizes // BLOCK))])

    @property
    def identity(self) -> str:
        """What differs once the folder has been written again."""
        found = (self.folder / MANIFEST).stat()
        return f"{self.folder.resolve()} {found.st_size} {found.st_mtime_ns}"

    def __len__(self) -> int:
        return int(self._blocks[-1])

    def read(self, block: int) -> NDArray[np.float32]:
        """Return the rows float32 [b, D] of a block."""
        shard = int(np.searchsorted(self._blocks, block, side="right")) - 1
        return self.block_of(shard, block - int(self._blocks[shard]))

    def blocks_of(self, shard: int) -> range:
        """Return the numbers of a shard's blocks, of which the first is 0."""
        return range(-(-int(self.sizes[shard]) // BLOCK))

    def block_of(self, shard: int, number: int) -> NDArray[np.float32]:
        """Return the rows float32 [b, D] of a shard's block."""
        rows, width = int(self.sizes[shard]), self.dimension
        count = min(BLOCK, rows - number * BLOCK)
        with open(self.folder / embeddings_file(shard), "rb") as file:
            # From the end, as parsing a header takes longer than reading a block
            file.seek(4 * width * (number * BLOCK - rows), os.SEEK_END)
            return np.fromfile(file, np.float32, count * width).reshape(count, width)

    def take(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the rows float32 [s, D] of these rising numbers."""
        found = np.empty((len(numbers), self.dimension), dtype=np.float32)
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        for shard in np.unique(shards).tolist():
            here = shards == shard
            mapped = np.load(self.folder / embeddings_file(shard), mmap_mode="r")
            found[here] = mapped[numbers[here] - self._starts[shard]]
        return found

    def ids(self, shard: int) -> list[str]:
        """Return the record ids of a shard's rows."""
        return (self.folder / ids_file(shard)).read_text(encoding="utf-8").splitlines()

    def labels(self, shard: int) -> list[str]:
        """Return the labels of a shard's rows, "" where there is none."""
        return (self.folder / labels_file(shard)).read_text(encoding="utf-8").splitlines()
