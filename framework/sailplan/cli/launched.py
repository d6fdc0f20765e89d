"""Whole commands on forked ranks, as a launcher starts them: for tests of what happens when a
rank fails.

The ranks inherit every import, so a job takes the seconds that its work takes. The parent holds the
store, as torchrun's agent does.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.distributed import TCPStore

from sailplan.cli.main import run_safely
from sailplan.runtime.leaving import NOTES


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    codes: list[int]  # of each rank; negative: killed by that signal
    lines: list[list[str]]  # of each rank's stderr
    seconds: float

    @property
    def said(self) -> list[str]:
        """All ranks' lines."""
        return [line for lines in self.lines for line in lines]


def launch(
    work: Callable[[int], int | None],
    ranks: int,
    *,
    timeout: float = 60.0,
    killed: Sequence[int] = (),
    during: Callable[[list[int]], None] | None = None,
) -> Ended:
    """Run `work(rank)` as the command of each of so many forked ranks; wait until all have left,
    but for those in `killed`.

    during: called with the ranks' process ids while they run. killed: ranks that cannot leave by
    themselves; they are killed when all others have left. A rank that is not through after
    `timeout` seconds fails the test.
    """
    context = multiprocessing.get_context("fork")
    receivers, senders = zip(*(context.Pipe(duplex=False) for _ in range(ranks)), strict=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        children = [
            context.Process(target=_child, args=(work, rank, ranks, receivers[rank], folder))
            for rank in range(ranks)
        ]
        for child in children:
            child.start()
        store = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )  # now: its thread would not survive a fork
        for sender in senders:
            sender.send(store.port)
        try:
            if during is not None:
                during([int(child.pid or 0) for child in children])
            for rank, child in enumerate(children):
                if rank not in killed:
                    child.join(max(0.0, began + timeout - time.monotonic()))
            late = [
                rank
                for rank, child in enumerate(children)
                if child.is_alive() and rank not in killed
            ]
            seconds = time.monotonic() - began
            for rank in late:
                os.kill(int(children[rank].pid or 0), signal.SIGABRT)
        finally:
            for child in children:
                if child.is_alive():
                    child.kill()
                child.join()
        lines = [Path(folder, f"stderr-{rank}").read_text().splitlines() for rank in range(ranks)]
        assert not late, f"ranks {late} had not left after {timeout} s: {lines}"
        return Ended([int(child.exitcode or 0) for child in children], lines, seconds)


def _child(
    work: Callable[[int], int | None], rank: int, ranks: int, port: Connection, folder: str
) -> None:
    torch.set_num_threads(1)
    file = open(Path(folder, f"stderr-{rank}"), "w", buffering=1)  # noqa: SIM115  the process's own, to its end
    os.dup2(file.fileno(), 2)
    sys.stderr, sys.stdout = file, io.StringIO()
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port.recv()),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        NOTES: folder,
    }
    code = run_safely(lambda: work(rank) or 0)
    sys.stderr.flush()
    os._exit(code)
