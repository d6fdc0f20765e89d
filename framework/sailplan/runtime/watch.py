"""Nothing hangs: a thread that ends this rank with exit code 70 when no rank of the job makes
progress for too long.

Whoever works says so with `beat()`, once a batch, a shard or a tile; a phase (`phase("mining")`)
gives that work a name. A rank that waits for a rank that works is no hang, however long that takes:
the limit counts from the latest beat of the whole job.
A collective that waits for a lost peer cannot be interrupted from Python, so the thread reports and
leaves the process.

The same thread carries a stop signal that reached one rank to all of them, and leaves when another
rank has failed and this one is caught in a collective. Without other ranks there is no board, and
the limit counts from the rank's own beats.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sailplan.errors import EXIT_HANG, StopRequested
from sailplan.runtime.board import Board, RankNote
from sailplan.runtime.environment import host_name
from sailplan.runtime.hang_report import report_hang, stacks
from sailplan.runtime.leaving import end_now, say
from sailplan.runtime.signals import StopFlag

FOLLOW_SECONDS = (
    3.0  # after another rank's failure, before this one leaves a collective that will not end
)
_current: Watch | None = None


class Watch:
    """This rank's progress, and its view of the job's."""

    def __init__(self, seconds: float, flag: StopFlag, rank: int = 0) -> None:
        self.seconds, self.flag = seconds, flag
        self.board: Board | None = None
        self.folder: Path | None = None
        self.note = RankNote(rank, host_name(), os.getpid())
        self._last = self._job_last = time.monotonic()
        self._progress = self._shown_beats = 0
        self._meetings = 0
        self._stop_told = False
        self._failed_at: float | None = None
        self._done = threading.Event()
        self.gate = threading.Lock()  # for the one thread that says why and leaves the process
        self.leaving = False  # this rank is about to leave by itself: the thread must not

    @property
    def tick(self) -> float:
        """Seconds between two looks: more among many ranks, so that the first node's store has
        some 1,000 requests a second.
        """
        ranks = 1 if self.board is None else self.board.world_size
        return min(max(1.0, ranks / 200), max(0.1, self.seconds / 10))

    def beat(self, step: int | None = None) -> None:
        """Say that work is going on."""
        self._last = time.monotonic()
        self.note.beats += 1
        if step is not None:
            self.note.step = step

    def silent(self) -> float:
        """Return the seconds since the latest beat that this rank knows of, its own or the job's."""
        return time.monotonic() - max(self._last, self._job_last)

    @contextmanager
    def phase(self, name: str, local: bool = False) -> Iterator[None]:
        """Name what is done in the block; `local`: by this rank alone. Beats at its edges."""
        former = self.note.phase, self.note.local
        self.note.phase, self.note.local = name, local
        self.beat()
        yield  # an error leaves the name as it is: that is where it came from
        self.note.phase, self.note.local = former
        self.beat()

    def meet(self, what: str) -> None:
        """Wait until all ranks have come here; as long as any of them makes progress."""
        if self.board is None:
            return
        self._meetings += 1
        name = f"meeting/{self._meetings}"
        self.board.count(name)
        with self.phase(f"waiting: {what}"):
            # Among many ranks less often: the first node's store then has some 5,000 requests a
            # second.
            pause, longest = 0.002, max(0.05, self.board.world_size / 5000)
            while self.board.counted(name) < self.board.world_size:
                time.sleep(pause)
                pause = min(longest, pause * 1.5)

    # ---------------------------------------------------------------- the thread
    def run(self) -> None:
        while not self._done.wait(self.tick):
            try:
                self._look()
            except Exception as error:  # the store is gone, and with it the first node
                if not self._done.is_set() and not self.leaving:
                    self._failed_at = self._failed_at or time.monotonic()
                    late = time.monotonic() - self._failed_at > FOLLOW_SECONDS
                    if late and self.gate.acquire(blocking=False):
                        say(
                            "lost the job's store, and the first node with it "
                            f"({type(error).__name__})"
                        )
                        end_now(EXIT_HANG, "lost the job's store", None)

    def _look(self) -> None:
        now = time.monotonic()
        if self.leaving:  # it goes on to show that this rank is there
            if self.board is not None:
                self._show(self.board, now)
            return
        if self.board is not None:
            self._exchange(self.board, now)
        silent = now - max(self._last, self._job_last)
        if silent > self.seconds and not self.leaving and self.gate.acquire(blocking=False):
            self.note.stack, text = stacks()
            report_hang(self.note, text, silent, self.seconds, self.folder, self.board, self.tick)
            end_now(EXIT_HANG, f"no progress for {silent:.0f} s in {self.note.phase}", self.board)

    def _exchange(self, board: Board, now: float) -> None:
        self._show(board, now)
        if self.note.beats != self._shown_beats:
            self._shown_beats = self.note.beats
            board.count("progress")
        progress = board.counted("progress")
        if progress != self._progress:
            self._progress, self._job_last = progress, now
        if self.flag.name is not None and not self._stop_told:
            self._stop_told = True
            board.write("stop", self.flag.name)
        elif self.flag.name is None and (asked := board.read("stop")):
            self.flag.name = asked
        if self._failed_at is None and board.failed():
            self._failed_at = now
        if (
            self._failed_at is not None
            and now - self._failed_at > FOLLOW_SECONDS
            and not self.leaving
            and self.gate.acquire(blocking=False)
        ):
            say(f"left with {board.cause()}")
            end_now(None, "", board)

    def _show(self, board: Board, now: float) -> None:
        self.note.silent, self.note.seen = round(now - self._last, 1), time.time()
        board.show(self.note)

    def finish(self) -> None:
        """End the thread."""
        self._done.set()


@contextmanager
def watching(seconds: float, flag: StopFlag, rank: int = 0) -> Iterator[Watch]:
    """Watch this process while the block runs; `beat`, `phase` and the others then speak of it."""
    global _current
    watch, former = Watch(seconds, flag, rank), _current
    thread = threading.Thread(target=watch.run, name="sailplan-watch", daemon=True)
    thread.start()
    _current = watch
    try:
        yield watch
    finally:
        watch.finish()
        _current = former
        with suppress(RuntimeError):
            thread.join(timeout=2 * watch.tick + 1)


# ---------------------------------------------------------------- for whoever works, in a watched
# process or not
def beat(step: int | None = None) -> None:
    """Say that work is going on: once a batch, a shard, a tile."""
    if _current is not None:
        _current.beat(step)


@contextmanager
def phase(name: str, local: bool = False) -> Iterator[None]:
    """Name the work of the block in the report of a hang.

    local: it is this rank's alone, and no other rank need be there.
    """
    if _current is None:
        yield
        return
    with _current.phase(name, local):
        yield


@contextmanager
def computing(what: str) -> Iterator[None]:
    """Beat during one long call of a library that knows nothing of beats, and of no other rank."""
    done = threading.Event()

    def keep() -> None:
        while not done.wait(1.0):
            beat()

    with phase(what, local=True):
        thread = threading.Thread(target=keep, name="sailplan-computing", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def meet(what: str) -> None:
    """Wait for all ranks before a collective that some may reach much later: no time-out of a
    group counts here.
    """
    if _current is not None:
        _current.meet(what)


def alone() -> None:
    """Between two pieces of work that no other rank waits for in a collective: beat, and obey a
    stop signal.

    Raises StopRequested.
    """
    if _current is not None:
        _current.beat()
        if _current.flag.name is not None:
            raise StopRequested(
                f"stopped by {_current.flag.name} in {_current.note.phase}; start the same command "
                "again"
            )


def together() -> None:
    """Between two batches that all ranks compute alike: beat, and obey a stop signal that
    reached any rank. A collective.

    One number over the CPUs' group; no device waits. Raises StopRequested on all ranks.
    """
    if _current is None:
        return
    _current.beat()
    if _current.board is None:
        alone()
        return
    import torch
    import torch.distributed as dist

    wanted = torch.tensor([float(_current.flag.name is not None)])
    dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
    if wanted.item():
        raise StopRequested(f"stopped in {_current.note.phase}; start the same command again")


def stop_wanted() -> bool:
    """Return whether a stop signal reached this rank, or another one that has said so."""
    return _current is not None and _current.flag.name is not None


def report_to(folder: Path) -> None:
    """Have the report of a hang written below the folder."""
    if _current is not None:
        _current.folder = folder


def current() -> Watch | None:
    """Return the watch of this process, if it is watched."""
    return _current
