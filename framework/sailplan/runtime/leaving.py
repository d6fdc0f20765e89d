"""How a rank leaves: what it says, and the exit code, which all ranks of a job agree on.

The codes are decided, not raced: 70 before 65, 64, 75 and 1; 75 only where every rank stopped or
was done. A rank that fails notes it on the board before its connections close; the others, which
then lose a peer, find the note and leave with the job's code. What several ranks say in the same
words is said once. The launcher gets each rank's code in a file, too.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from sailplan.errors import EXIT_DONE, EXIT_FAILURE, EXIT_HANG, EXIT_STOPPED, SailplanError
from sailplan.runtime.environment import host_name, world_size_from_environment
from sailplan.runtime.files import write_whole

if TYPE_CHECKING:
    from sailplan.runtime.board import Board

NOTES = "SAILPLAN_LAUNCH_NOTES"  # the launcher's folder for what its ranks leave behind
JOB_NOTES = "SAILPLAN_JOB_NOTES"  # a folder of all nodes, for whoever started their launchers
OTHERS_SECONDS = 5.0  # for the other ranks to fail, too
STORE_SECONDS = 3.0  # for the other ranks to read the job's store, where rank 0 has it
STOP_SECONDS = 60.0  # for the other ranks to stop, too: one may still close its loggers
LOST = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|timed out|timeout|socket|unhandled system error|remote process exited|"
    r"connect failed|connection refused|NCCL|gloo|wait timeout|clients joined",
    re.IGNORECASE,
)
_said: set[str] = set()


def say(line: str) -> None:
    """Write one line to stderr, at once."""
    print(f"sailplan: {line}", file=sys.stderr, flush=True)


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error is that of a collective, or of a start, which lost a peer or
    waited too long for one.
    """
    import torch

    kinds: tuple[type[BaseException], ...] = (
        (torch.distributed.DistError,) if hasattr(torch.distributed, "DistError") else ()
    )
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError | ConnectionError) and LOST.search(str(error)) is not None
    )


def code_of(error: BaseException) -> int:
    """Return the exit code of an error that this rank met by itself."""
    return error.exit_code if isinstance(error, SailplanError) else EXIT_FAILURE


def first_to_say(line: str, board: Board | None) -> bool:
    """Return whether no other rank of the job has said the line: of the node, where there is no
    board.
    """
    name = hashlib.sha256(line.encode()).hexdigest()[:16]
    folder = os.environ.get(NOTES)
    if world_size_from_environment() == 1:
        return True
    try:
        if board is not None:
            return board.count(f"said/{name}") == 1
        if folder is not None:
            os.close(os.open(Path(folder) / f"said-{name}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except Exception:  # better twice than never
        return True
    return True


def decide(code: int | None, board: Board | None) -> int:
    """Return the code that the job ends with, once this rank's is on the board; waits a little
    for the other ranks'.

    code: this rank's; None: it has none of its own. Nothing goes before 70, which therefore waits
    for nobody.
    """
    from sailplan.runtime.board import decided

    own = EXIT_HANG if code is None else code
    if board is None or code in (EXIT_DONE, EXIT_HANG):
        if (
            board is not None
            and code == EXIT_HANG
            and board.rank == 0
            and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        ):
            time.sleep(STORE_SECONDS)
        return own
    deadline = time.monotonic() + (STOP_SECONDS if code == EXIT_STOPPED else OTHERS_SECONDS)
    try:
        while time.monotonic() < deadline and board.counted("left") < board.world_size:
            if code == EXIT_STOPPED and board.failed():
                deadline = min(deadline, time.monotonic() + OTHERS_SECONDS)
            time.sleep(0.05)
        codes = board.codes()
        if code != EXIT_STOPPED:  # those that have not said a word yet follow
            codes[EXIT_DONE] += board.world_size - sum(codes.values())
        return decided(codes, board.world_size) or own
    except Exception:  # the store has gone: with the ranks that had it
        return own


def note_code(code: int) -> None:
    """Leave the rank's code to the launcher."""
    folder, rank = os.environ.get(NOTES), os.environ.get("RANK")
    if folder is not None and rank is not None:
        try:
            temporary = Path(folder) / f".code-{rank}-{os.getpid()}"
            temporary.write_text(str(code))
            temporary.replace(Path(folder) / f"code-{rank}")
        except OSError:
            pass


def note_launcher(code: int) -> None:
    """Leave this node's exit code to whoever started the launchers of all nodes."""
    _note_for_job(f"code-{host_name()}", str(code))


def note_lost(hosts: Iterable[str]) -> None:
    """Name hosts whose ranks did not answer, so that the next start can leave them out."""
    for host in hosts:
        _note_for_job(f"lost-{host}", "")


def _note_for_job(name: str, text: str) -> None:
    folder = os.environ.get(JOB_NOTES)
    if folder is not None:
        with suppress(OSError):
            write_whole(Path(folder) / name, text)


def end_now(code: int | None, line: str, board: Board | None) -> None:
    """Leave the process from any thread, with the job's code; None: this rank has none of its
    own. Ends its loader's workers.
    """
    try:
        if board is not None and code is not None:
            board.leave(code, line)
        elif board is not None:
            board.count("left")
    except Exception:
        board = None
    final = decide(code, board)
    note_code(final)
    end_children()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            continue
    os._exit(final)


def end_children() -> None:
    """Kill the processes that this one forked: a worker that was stopped would stay behind for
    ever.
    """
    for child in multiprocessing.active_children():
        child.kill()


class NamedLines:
    """A text stream that begins each line with the rank and the host."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self._fresh = stream, name, True

    def write(self, text: str) -> int:
        lines = text.splitlines(keepends=True)
        named = ""
        for line in lines:
            named += (self._name if self._fresh else "") + line
            self._fresh = line.endswith(("\n", "\r"))
        self._stream.write(named)
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def name_lines() -> None:
    """Begin every line that this rank writes to stderr with its rank and host, where there is
    more than one rank.
    """
    if world_size_from_environment() > 1 and not isinstance(sys.stderr, NamedLines):
        os.environ.setdefault(
            "TORCH_CPP_LOG_LEVEL", "ERROR"
        )  # torch's C++ writes past Python, and says what is said here anyway
        sys.stderr = NamedLines(sys.stderr, f"[rank {os.environ.get('RANK', '?')} {host_name()}] ")  # type: ignore[assignment]
