"""Where a run's checkpoints are written, where they are whole, and which one a start goes on from.

They are written into the run folder, and copied to `checkpoint.copy_to`; or, with `checkpoint.local`,
into a folder of each node's own, and copied from there to `checkpoint.copy_to`, or else to the run
folder. What is sealed there counts then: a node's own folder only saves reading files again.
"""

from __future__ import annotations

import re
from pathlib import Path

from sailplan.checkpoint.copies import Copies
from sailplan.checkpoint.store import damaged, latest, newest_whole
from sailplan.config.schema import Config
from sailplan.errors import ConfigurationError
from sailplan.runtime.environment import local_rank, local_world_size
from sailplan.runtime.leaving import say
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import everywhere
from sailplan.train.run_folder import RunFolder


class Places:
    """The folders of one run's checkpoints.

    folder: where this rank writes and reads; own: each node has its own; copies: where they go.
    """

    def __init__(self, config: Config, run: RunFolder) -> None:
        options = config.checkpoint
        self.own = options.local is not None
        self.folder = Path(options.local) / config.name if options.local else run.checkpoints
        url = f"{options.copy_to.rstrip('/')}/{config.name}" if options.copy_to else None
        if url is None and self.own:
            url = str(run.checkpoints.absolute())
        self.copies = (
            None if url is None else Copies(url, keep=options.keep, keep_every=options.keep_every)
        )

    def newest(self, parallel: Parallel, *, fetch: bool) -> Path | None:
        """Return the newest whole checkpoint, whose checksums were compared; None where there is
        none. A collective.

        fetch: look at copies that are newer than what is here, too. Raises ConfigurationError on all
        ranks where all are damaged: a lost run is not begun again.
        """
        if self.own:
            return self._newest_copy(parallel, fetch)
        copies, found = self.copies if fetch else None, None
        known = str(on_main(parallel, "looking for checkpoints", self._known))
        if copies is not None:
            share = parallel.rank, parallel.world_size
            found = copies.fetch_newer(self.folder, known, parallel, share)
        found = found or newest_whole(self.folder, parallel)
        on_main(parallel, "looking for damage", lambda: self._look_for_damage(found, copies))
        return found

    def steps(self) -> set[int] | None:
        """Return the steps of all checkpoints that a start could go on from, unfinished ones too;
        None where the copies cannot be listed. To be called on one rank.
        """
        names = [path.name for path in self.folder.glob("*step-*")]
        try:
            names += self.copies.steps() if self.copies is not None else []
        except OSError:
            return None
        return {int(found[1]) for one in names if (found := re.search(r"step-(\d+)", one))}

    # ---------------------------------------------------------------- parts
    def _newest_copy(self, parallel: Parallel, fetch: bool) -> Path | None:
        copies = self.copies
        assert copies is not None
        everywhere(parallel, "making checkpoint.local", self._make)
        steps = list(on_main(parallel, "looking for copies", copies.listed))
        if not steps or not fetch:
            return self.folder / steps[-1] if steps else None
        share = local_rank(), local_world_size(parallel.world_size)
        found = copies.fetch_newer(self.folder, "", parallel, share)
        if found is None:
            raise ConfigurationError(_lost(f"{copies.url}/{steps[-1]}", copies.url))
        return found

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"checkpoint.local: {self.folder} cannot be made ({error.strerror}), expected a "
                "folder on a disk of each node that can be written: choose another"
            ) from error

    def _known(self) -> str:
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigurationError(
                f"{self.folder}: found a file, expected a folder of checkpoints or nothing: remove it"
            )
        known = latest(self.folder)
        return known.name if known is not None else ""

    def _look_for_damage(self, newest: Path | None, copies: Copies | None) -> None:
        broken = damaged(self.folder)
        if newest is None:
            sealed = sorted(path.parent for path in self.folder.glob("step-*/COMPLETE"))
            if broken or sealed:
                raise ConfigurationError(
                    _lost(str([*sealed, *broken][-1]), str(self.folder.parent))
                )
            if copies is not None and (steps := copies.listed()):
                raise ConfigurationError(_lost(f"{copies.url}/{steps[-1]}", copies.url))
        for path in broken:
            if newest is not None and path > newest:
                say(f"checkpoint {path} is damaged, going on from {newest}")


def _lost(newest: str, where: str) -> str:
    return (
        f"{newest} is damaged and {where} has no whole checkpoint: restore its files, choose "
        "another name=, or delete the folder to start afresh"
    )
