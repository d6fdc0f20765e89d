"""Run each contender in a process of its own, with a time limit: one that hangs or dies costs
its own row and nothing else.

A contender is a generator function. Its process is forked before anything here has touched a GPU,
and goes on by one `yield` for each `ask`, so that several contenders can take turns on one device.
`tell(...)` says where it is; the last word goes into the row of one that is lost. What it prints
goes into a log file.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Contender = Callable[..., Iterator[dict[str, Any]]]
PR_SET_PDEATHSIG = 1


class Lost(Exception):
    """A contender hung, died or raised; the text says which, and where."""

    def __init__(self, text: str, hung: bool = False) -> None:
        super().__init__(text)
        self.hung = hung


class Isolated:
    """One contender's process, from its start to `close`."""

    def __init__(self, contender: Contender, *arguments: Any, log: Path) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self._at = "its start"
        self._process = context.Process(
            target=_serve, args=(contender, arguments, theirs, self.connection, log), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, limit: float) -> dict[str, Any]:
        """What the contender yields next, within `limit` seconds.

        Raises Lost, and the process is gone then.
        """
        self.begin(limit)
        return self.wait()

    def wait(self) -> dict[str, Any]:
        """The answer that was begun."""
        while True:
            self.connection.poll(max(0.0, self.deadline - time.monotonic()))
            answer = self.receive()
            if answer is not None:
                return answer

    def begin(self, limit: float) -> None:
        """Ask, and leave the answer to `receive`."""
        self.deadline = time.monotonic() + limit
        self._limit = limit
        with suppress(OSError):  # it died before: `receive` finds that
            self.connection.send("next")

    def receive(self) -> dict[str, Any] | None:
        """The answer, None where it is still to come; does not wait.

        Raises Lost, and the process is gone then.
        """
        try:
            while self.connection.poll():
                kind, value = self.connection.recv()
                if kind == "answer":
                    return value
                if kind == "failed":
                    self.close()
                    raise Lost(f"{value}, at {self._at}")
                self._at = value
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            raise Lost(f"died: {_ending(code)}, at {self._at}") from None
        if time.monotonic() < self.deadline:
            return None
        self.close()
        raise Lost(f"hung: no answer within {self._limit:g} s, at {self._at}", hung=True)

    def close(self) -> None:
        """End the process and all that it started."""
        if self._process.pid is not None and self._process.exitcode is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (
                ProcessLookupError,
                PermissionError,
            ):  # not yet the leader of a group of its own
                self._process.kill()
        self._process.join()
        self.connection.close()


def _ending(code: int | None) -> str:
    if code is None:
        return "it closed its connection"
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"


def _serve(
    contender: Contender,
    arguments: tuple[Any, ...],
    connection: Connection,
    other_end: Connection,
    log: Path,
) -> None:
    parent = os.getppid()
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(
        PR_SET_PDEATHSIG, signal.SIGKILL
    )  # a driver that is killed leaves none of them
    if os.getppid() != parent:
        os._exit(1)
    other_end.close()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        turns = contender(*arguments, tell=lambda text: connection.send(("at", text)))
        while connection.recv() == "next":
            connection.send(("answer", next(turns)))
    except EOFError:
        pass
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        text = str(error).splitlines()
        connection.send(("failed", f"{type(error).__name__}: {text[0] if text else ''}"[:300]))
    os._exit(0)
