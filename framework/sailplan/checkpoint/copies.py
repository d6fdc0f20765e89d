"""Copies of checkpoints where fsspec reaches: object stores, other file systems, memory.

A copy is made of a checkpoint that is sealed: each rank sends the files that it wrote, rank 0 the
rest, and the seal last, once all others are there. So a copy without a seal is unfinished, whatever
ended it, and nobody takes it. At a start, a copy that is newer than what the run folder holds is
fetched; its checksums are then compared as any other checkpoint's.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import torch.distributed as dist
from fsspec import AbstractFileSystem

from sailplan.checkpoint.seal import COMPLETE
from sailplan.checkpoint.together import together
from sailplan.errors import ConfigurationError
from sailplan.runtime.watch import beat


class Copies:
    """A run's checkpoints below a URL."""

    def __init__(self, url: str, run: str) -> None:
        """Raises ConfigurationError for a URL that fsspec cannot open here."""
        try:
            self._files: AbstractFileSystem
            self._files, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigurationError(
                f"checkpoint.copy_to={url}: {error}; expected a URL of a file system that fsspec "
                "has, such as s3://bucket/folder, and its package"
            ) from error
        self.url, self._root = f"{url.rstrip('/')}/{run}", f"{root.rstrip('/')}/{run}"

    def steps(self) -> list[str]:
        """Return the names of whole copies, the oldest first."""
        if not self._files.exists(self._root):
            return []
        self._files.invalidate_cache()  # others write there, too
        found = [Path(name).name for name in self._files.ls(self._root, detail=False)]
        return sorted(
            name
            for name in found
            if name.startswith("step-") and self._files.exists(f"{self._root}/{name}/{COMPLETE}")
        )

    def send(self, folder: Path, group: dist.ProcessGroup | None = None) -> None:
        """Copy a sealed checkpoint. A collective.

        Raises SailplanError on all ranks where any fails; the checkpoint itself stays whole.
        """
        what = f"checkpoint {folder.name} could not be copied to {self.url}"
        rank, to = dist.get_rank(), f"{self._root}/{folder.name}"

        def begin() -> None:
            if rank == 0 and self._files.exists(f"{to}/{COMPLETE}"):
                self._files.rm_file(f"{to}/{COMPLETE}")
            self._files.makedirs(to, exist_ok=True)

        def files() -> None:
            for file in sorted(folder.iterdir()):
                writer = file.name.split("_")[2] if file.name.startswith("__") else "0"
                if file.name != COMPLETE and writer == str(rank):
                    beat()
                    self._files.put_file(str(file), f"{to}/{file.name}")

        def finish() -> None:
            if rank == 0:
                self._files.put_file(str(folder / COMPLETE), f"{to}/{COMPLETE}")
                here = {one.name for one in folder.parent.glob("step-*")}
                for name in self.steps():
                    if name not in here and name < folder.name:
                        self._remove(name)

        for action in (begin, files, finish):
            together(action, what, group)

    def fetch_newer(self, checkpoints: Path, newest: str) -> Path | None:
        """Fetch the newest whole copy, if it is newer than the checkpoint of that name ("": there
        is none); return its folder. To be called on one rank.
        """
        names = self.steps()
        if not names or names[-1] <= newest:
            return None
        folder = checkpoints / names[-1]
        temporary = folder.with_name(folder.name + ".tmp")
        for old in (temporary, folder):
            shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name in self._files.ls(f"{self._root}/{folder.name}", detail=False):
            beat()
            self._files.get_file(name, str(temporary / Path(name).name))
        temporary.rename(folder)
        return folder

    def _remove(self, name: str) -> None:
        """Delete a copy, its seal first: never half deleted and still whole."""
        self._files.rm_file(f"{self._root}/{name}/{COMPLETE}")
        self._files.rm(f"{self._root}/{name}", recursive=True)
