"""Run the command in a forked process, for tests that ask it many things."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from sailplan.cli.main import main


def command(folder: Path, *arguments: str, timeout: float = 120) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of `sailplan ARGUMENTS` in `folder`: a user's, without the seconds of its imports. timeout: seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def forked() -> None:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = main(list(arguments))
        sender.send((code, out.getvalue(), err.getvalue()))

    child = context.Process(target=forked)  # no daemon: `data import` and `data validate` have processes of their own
    child.start()
    sender.close()
    try:
        assert receiver.poll(timeout), f"{arguments} did not end within {timeout} s"
        found: tuple[int, str, str] = receiver.recv()
        return found
    finally:
        child.kill()
        child.join()
