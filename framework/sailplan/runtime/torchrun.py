"""torchrun, with the ranks' own exit code passed through.

Plain torchrun turns every failure into 1; the exit codes of sailplan (64 bad configuration, 65 bad
data, 70 hang, 75 stopped, resume me) are what launch scripts and schedulers act on. Ranks agree on
the job's code and leave it in a folder of the launcher's; a rank that leaves none, because it was
killed or stopped, does not turn a failure into a stop. Once one rank has failed, those that have
not left within seconds are killed: a stopped process hears no other signal.
Use: python -m sailplan.runtime.torchrun --nproc-per-node 2 -m sailplan train ...
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from pathlib import Path

import torch.distributed.launcher.api as launcher
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import main as torchrun

from sailplan.errors import EXIT_HANG, EXIT_STOPPED
from sailplan.runtime.agent import Agent, Starts
from sailplan.runtime.board import decided
from sailplan.runtime.leaving import note_launcher, say


def main() -> int:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # torchrun's own default, without its warning; ranks set torch's threads themselves
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(
                logging.CRITICAL
            )  # the ranks have said it, in one line
    with tempfile.TemporaryDirectory(prefix="sailplan-launch-") as name:
        starts, done = Starts(Path(name)), threading.Event()
        Agent.starts, launcher.LocalElasticAgent = starts, Agent  # type: ignore[misc]
        watcher = threading.Thread(target=starts.end_the_rest, args=(done,), daemon=True)
        watcher.start()
        try:
            code = _run(starts)
        finally:
            done.set()
            watcher.join()  # it reads the folder, which goes next
    note_launcher(code)
    return code


def _run(starts: Starts) -> int:
    """Return the node's exit code."""
    try:
        torchrun()
        return 0
    except ChildFailedError as failure:
        if starts.codes():
            return starts.code(list(failure.failures))
        found = [error.exitcode for error in failure.failures.values() if error.exitcode > 0]
        # some other program
        return decided({code: found.count(code) for code in found}, len(found)) if found else 1
    except SignalException:
        return starts.code([]) if starts.codes() else EXIT_STOPPED
    except RendezvousError as error:
        say(f"nodes did not come together: {type(error).__name__}: {error}")
        return EXIT_HANG


if __name__ == "__main__":
    sys.exit(main())
