"""Copies of checkpoints where a URL leads: object stores, other file systems, memory.

A copy is made of a checkpoint that is written: each rank sends the files that it wrote, rank 0 the
rest, and the seal last, once all others are there. So a copy without a seal is unfinished, whatever
ended it, and nobody takes it. At a start the newest copy that is newer than what is here is
fetched, by all ranks together; each file is compared with the seal as it comes, and where one
differs, the copy before is tried, with a message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from sailplan.checkpoint.seal import COMPLETE, UNREADABLE, digest_of, files_of, is_step, write_seal
from sailplan.checkpoint.target import Target
from sailplan.checkpoint.together import everywhere, together
from sailplan.errors import UnavailableError
from sailplan.runtime.leaving import say
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.watch import meet


class Copies:
    """A run's checkpoints below a URL."""

    def __init__(
        self, url: str, *, keep: int = 1, keep_every: int = 0, key: str = "checkpoint.copy_to"
    ) -> None:
        """keep, keep_every: which stay, as `store.prune`. Raises ConfigurationError, which begins
        with `key`, for a URL that nothing opens here.
        """
        self.url, self._target = url.rstrip("/"), Target(url, key)
        self._keep, self._keep_every = max(keep, 1), keep_every
        self._whole: set[str] = set()  # that were seen so: each is looked at once

    def steps(self) -> list[str]:
        """Return the names of whole copies, the oldest first."""
        steps = [name for name in self._target.names() if is_step(name)]
        self._whole &= set(steps)
        self._whole |= {
            name
            for name in steps
            if name not in self._whole and COMPLETE in self._target.names(name)
        }
        return sorted(self._whole)

    def send(self, folder: Path, group: dist.ProcessGroup | None = None) -> None:
        """Copy a written checkpoint, of which this rank's node has at least this rank's files. A
        collective.

        Raises SailplanError on all ranks where any fails; the checkpoint itself stays whole.
        """
        what = f"checkpoint {folder.name} could not be copied to {self.url}"
        rank, name = dist.get_rank(), folder.name

        def begin() -> None:
            if rank == 0:
                self._whole.discard(name)
                self._target.remove(f"{name}/{COMPLETE}")
                self._target.make(name)

        def files() -> None:
            for file in sorted(folder.iterdir()):
                writer = file.name.split("_")[2] if file.name.startswith("__") else "0"
                if file.name != COMPLETE and writer == str(rank):
                    self._target.put(file, f"{name}/{file.name}")

        def finish() -> None:
            if rank == 0:
                self._target.put(folder / COMPLETE, f"{name}/{COMPLETE}")
                self._prune()

        for action in (begin, files, finish):
            together(action, what, group)

    def fetch_newer(
        self, checkpoints: Path, newest: str, parallel: Parallel, share: tuple[int, int]
    ) -> Path | None:
        """Fetch the newest whole copy that is newer than the checkpoint of that name ("": there is
        none) into a folder; return its own. None: there is none, or none whole. A collective.

        share: this rank's number among those that fetch into this folder, and how many they are.
        Files that are there already, with the same content, stay.
        """
        for name in reversed(on_main(parallel, "looking for copies", self.listed)):
            if name <= newest:
                return None
            folder, damage = checkpoints / name, self._fetch(checkpoints / name, parallel, share)
            if not damage:
                if parallel.is_main:
                    say(f"{name} fetched from {self.url}")
                return folder
            if parallel.is_main:
                say(
                    f"copy {self.url}/{name}: {damage} is damaged, it is not what was written; "
                    "looking at the one before"
                )
        return None

    def listed(self) -> list[str]:
        """Return `steps`. Raises UnavailableError where the target does not answer."""
        with self._reading():
            return self.steps()

    # ---------------------------------------------------------------- parts
    def _seal(self, name: str) -> str:
        try:
            with self._reading():
                return self._target.read(f"{name}/{COMPLETE}").decode(errors="replace")
        except FileNotFoundError:  # deleted meanwhile
            return ""

    def _fetch(self, folder: Path, parallel: Parallel, share: tuple[int, int]) -> str:
        """Make a folder the copy of its name; return the name of a file that cannot be, "" where
        there is none. The seal comes last.
        """
        text = str(on_main(parallel, "reading a copy's seal", lambda: self._seal(folder.name)))
        try:
            files = files_of(text)
        except UNREADABLE:
            return COMPLETE
        number, sharers = share

        def begin() -> None:
            if number == 0:
                folder.mkdir(parents=True, exist_ok=True)
                for file in folder.iterdir():
                    if file.name == COMPLETE or file.name not in files:
                        file.unlink()

        def own() -> str:
            try:
                for name, (_, digest) in sorted(files.items())[number::sharers]:
                    if not self._has(folder / name, digest):
                        return name
                return ""
            finally:
                meet("fetching a checkpoint")  # as long as any rank gets bytes

        def finish() -> None:
            if number == 0:
                write_seal(folder, text)

        together(begin, f"checkpoint {folder} could not be fetched")
        damage = next(filter(None, everywhere(own, folder)), "")
        if not damage:
            together(finish, f"checkpoint {folder} could not be fetched")
        return damage

    def _has(self, file: Path, digest: str | None) -> bool:
        """Have a file here, the sealed one; return whether it is."""
        if file.is_file() and digest_of(file) == digest:
            return True
        part = file.with_name(file.name + ".part")
        try:
            with self._reading():
                found = self._target.get(f"{file.parent.name}/{file.name}", part)
        except FileNotFoundError:
            return False
        if digest is not None and found != digest:
            part.unlink()
            return False
        part.rename(file)
        return True

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UnavailableError(
                f"{self.url} cannot be read ({error}); look at the network and the credentials, "
                "start again"
            ) from error

    def _prune(self) -> None:
        """Delete copies as `store.prune` does here, each one's seal first: never half deleted and
        still whole.
        """
        whole = self.steps()
        kept = whole[-self._keep :]
        for name in self._target.names():
            if not is_step(name) or name >= kept[0]:
                continue
            step = int(name.removeprefix("step-"))
            if name in whole and self._keep_every and step % self._keep_every == 0:
                continue
            self._target.remove(f"{name}/{COMPLETE}")
            self._target.remove(name, recursive=True)
