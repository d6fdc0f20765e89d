"""torchrun's agent of a node, as a job of sailplan needs it.

Ranks are started again where that can help: after a lost rank or node, but not after a wrong
setting (64) or bad data (65). Ranks that stopped because another node was asked to (75) go on with
the nodes that are left, at no cost of a restart; a launcher that was asked itself ends with 75.
Each start has a store of its own: addresses of ranks that are gone would otherwise be found in it.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from sailplan.errors import (
    EXIT_BAD_CONFIGURATION,
    EXIT_BAD_DATA,
    EXIT_FAILURE,
    EXIT_STOPPED,
)
from sailplan.runtime.board import decided
from sailplan.runtime.environment import START
from sailplan.runtime.leaving import NOTES

KILL_SECONDS = 7.0  # after the first failure: what ranks take to notice, to report and to leave
FINAL = (EXIT_BAD_CONFIGURATION, EXIT_BAD_DATA)  # another start would end in the same way


class Starts:
    """The folder of each start of this node's ranks, in which they leave their exit codes."""

    def __init__(self, root: Path) -> None:
        self.root, self.number = root, -1

    def begin(self) -> None:
        """Make the folder of the next start; ranks find it in the environment."""
        self.number += 1
        self.folder.mkdir()
        os.environ[NOTES] = str(self.folder)

    @property
    def folder(self) -> Path:
        return self.root / str(self.number)

    def codes(self) -> list[int]:
        """Return the exit codes that ranks of the newest start have left so far."""
        return [int(path.read_text()) for path in sorted(self.folder.glob("code-*"))]

    def code(self, failed: list[int]) -> int:
        """Return the node's exit code. failed: ranks that ended with another code than 0; one
        that left none was killed, which is no stop.
        """
        left = self.codes()
        if not left:
            return EXIT_FAILURE
        silent = any(not (self.folder / f"code-{rank}").is_file() for rank in failed)
        return decided({code: left.count(code) for code in left}, len(left) + silent)

    def end_the_rest(self, done: threading.Event) -> None:
        """Kill this node's ranks that are still there some seconds after one of them has failed.

        Returns when `done` is set.
        """
        number, failed_at = -1, None
        while not done.wait(0.3):
            if number != self.number:
                number, failed_at = self.number, None
            if failed_at is None and any(code not in (0, EXIT_STOPPED) for code in self.codes()):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > KILL_SECONDS:
                failed_at = float("inf")
                for child in psutil.Process().children():
                    for process in [*child.children(recursive=True), child]:
                        process.kill()


class Agent(LocalElasticAgent):
    """Starts a node's ranks, and starts them again where that helps."""

    starts: Starts  # of the launcher: torch makes the agent itself

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        handler = worker_group.spec.rdzv_handler
        if isinstance(handler, DynamicRendezvousHandler):
            # Kept from the start before, they name the store of a node that may be gone.
            handler._bootstrap_store_info = handler._shared_tcp_store_server = None
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, object]:
        self.starts.begin()
        spec = worker_group.spec
        # A node that comes later has counted fewer restarts than the others; where nodes may come
        # later, each start has a new store and needs no number.
        dynamic = isinstance(spec.rdzv_handler, DynamicRendezvousHandler)
        os.environ[START] = "0" if dynamic else str(spec.max_restarts - self._remaining_restarts)
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and self._remaining_restarts > 0:
            code = self.starts.code(list(result.failures))
            if code in FINAL:
                self._remaining_restarts = 0
            elif code == EXIT_STOPPED:
                self._remaining_restarts += 1
        return result

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(timeout=self._shutdown_timeout)  # torch's own 30 s cut a save short
