"""Work at the parts of a source in several processes, in order, resumable, with a bounded number
of rows alive.

What a part gave is kept in `.import/PHASE/NUMBER.json` once its files are whole. A part whose
outcome is there, with its files, is not worked at again, so the same command goes on after a kill.
At most two parts for each process are in flight.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sailplan.errors import BadDataError, StopRequested
from sailplan.runtime.files import write_whole

IN_FLIGHT = 2  # parts for each process
STATE = ".import"


@dataclass
class Outcome:
    """What became of a part's rows.

    files: those written, below the output folder, with their bytes.
    """

    rows: int = 0
    dropped: int = 0
    repaired: int = 0
    splits: dict[str, int] = field(default_factory=dict)  # split -> records
    notes: dict[str, int] = field(default_factory=dict)  # what else is counted
    files: dict[str, int] = field(default_factory=dict)

    def add(self, other: Outcome) -> None:
        """Take another part's counts in; its files are not kept, they may be many."""
        self.rows, self.dropped, self.repaired = (
            self.rows + other.rows,
            self.dropped + other.dropped,
            self.repaired + other.repaired,
        )
        for mine, theirs in ((self.splits, other.splits), (self.notes, other.notes)):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count

    @property
    def written(self) -> int:
        """Return the number of records."""
        return sum(self.splits.values())


@dataclass(frozen=True)
class Drops:
    """The dropped rows of a part, written line by line: file, line, reason."""

    path: Path

    @contextmanager
    def opened(self, outcome: Outcome) -> Iterator[Callable[[str, int, str], None]]:
        """Yield what notes a dropped row; the file has its name when all are noted, and is not
        there without any.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:

            def note(name: str, line: int, reason: str) -> None:
                outcome.dropped += 1
                file.write(
                    json.dumps({"file": name, "line": line, "reason": reason}, ensure_ascii=False)
                    + "\n"
                )

            yield note
        os.replace(temporary, self.path)


Work = Callable[[int, Any], Outcome]  # number of the part, the part; can be pickled


@dataclass
class Workshop:
    """Processes for the phases of one import into `folder`.

    live_parts: most parts that were alive at a time, for counting.
    """

    folder: Path
    workers: int
    live_parts: int = 0
    worked: int = 0  # parts worked at, not found done
    progress: Callable[[int], None] = lambda rows: None

    def state(self, phase: str, number: int) -> Path:
        """Return the file of a part's outcome."""
        return self.folder / STATE / phase / f"{number:06d}.json"

    def drops(self, phase: str, number: int) -> Drops:
        """Return the dropped rows of a part."""
        return Drops(self.state(phase, number).with_suffix(".dropped"))

    def run(self, phase: str, parts: Iterable[object], work: Work) -> Outcome:
        """Work at all parts; return the sum of their outcomes.

        Raises what a worker raises, StopRequested on SIGTERM and SIGINT.
        """
        total = Outcome()
        (self.folder / STATE / phase).mkdir(parents=True, exist_ok=True)
        for outcome in self._outcomes(phase, parts, work):
            total.add(outcome)
            self.progress(outcome.rows)
        return total

    def _outcomes(self, phase: str, parts: Iterable[object], work: Work) -> Iterator[Outcome]:
        todo = ((number, part, self._done(phase, number)) for number, part in enumerate(parts))
        if self.workers == 1:
            with stoppable():
                for number, part, done in todo:
                    self.live_parts = max(self.live_parts, 1)
                    self.worked += done is None
                    yield done or _worked(work, self.state(phase, number), number, part)
            return
        waiting: deque[Future[Outcome] | Outcome] = deque()
        pool = ProcessPoolExecutor(
            self.workers,
            mp_context=get_context("fork"),
            initializer=_start_worker,
            initargs=(os.getpid(),),
        )
        try:
            with stoppable():
                for number, part, done in todo:
                    self.worked += done is None
                    waiting.append(
                        done or pool.submit(_worked, work, self.state(phase, number), number, part)
                    )
                    self.live_parts = max(
                        self.live_parts, sum(isinstance(one, Future) for one in waiting)
                    )
                    while len(waiting) >= IN_FLIGHT * self.workers:
                        yield _result(waiting.popleft())
                while waiting:
                    yield _result(waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _done(self, phase: str, number: int) -> Outcome | None:
        try:
            outcome = Outcome(**json.loads(self.state(phase, number).read_text(encoding="utf-8")))
            if all(
                (self.folder / name).stat().st_size == size for name, size in outcome.files.items()
            ):
                return outcome
        except (OSError, ValueError, TypeError):
            pass
        return None


def _worked(work: Work, state: Path, number: int, part: object) -> Outcome:
    outcome = work(number, part)
    write_whole(state, json.dumps(asdict(outcome)))
    return outcome


def _result(one: Future[Outcome] | Outcome) -> Outcome:
    if isinstance(one, Outcome):
        return one
    try:
        return one.result()
    except BrokenProcessPool as error:
        raise BadDataError(
            "a worker was killed, probably for its memory; the same command goes on: take fewer "
            "--workers or a smaller --shard-size"
        ) from error


def _start_worker(parent: int) -> None:
    gc.freeze()  # to collect among the parent's objects would write to, and so copy, their pages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:  # a worker must not outlive a parent that was killed
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into StopRequested, which says that the same command goes on."""

    def stop(number: int, frame: object) -> None:
        raise StopRequested("data import: stopped; the same command goes on where it stopped")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
