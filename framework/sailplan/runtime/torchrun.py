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
import time
from pathlib import Path

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from sailplan.errors import EXIT_FAILURE, EXIT_STOPPED
from sailplan.runtime.board import decided
from sailplan.runtime.leaving import NOTES

KILL_SECONDS = 7.0  # after the first failure: what ranks take to notice, to report and to leave


def codes(folder: Path) -> list[int]:
    """Return the exit codes that ranks of this node have left so far."""
    return [int(path.read_text()) for path in sorted(folder.glob("code-*"))]


def _end_the_rest(folder: Path, done: threading.Event) -> None:
    """Kill this node's ranks that are still there some seconds after one of them has failed."""
    failed_at = None
    while not done.wait(0.3):
        if failed_at is None and any(code not in (0, EXIT_STOPPED) for code in codes(folder)):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > KILL_SECONDS:
            for child in psutil.Process().children():
                for process in [*child.children(recursive=True), child]:
                    process.kill()
            return


def main() -> int:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # torchrun's own default, without its warning; ranks set torch's threads themselves
    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # the ranks have said it already, in one line
    with tempfile.TemporaryDirectory(prefix="sailplan-launch-") as name:
        folder, done = Path(name), threading.Event()
        os.environ[NOTES] = name
        watcher = threading.Thread(target=_end_the_rest, args=(folder, done), daemon=True)
        watcher.start()
        try:
            torchrun()
            return 0
        except ChildFailedError as failure:
            left = codes(folder)
            if left:
                return _of_node(
                    left, any(not (folder / f"code-{rank}").is_file() for rank in failure.failures)
                )
            return _of_node(
                [error.exitcode for error in failure.failures.values() if error.exitcode > 0], False
            )  # some other program
        except SignalException:
            left = codes(folder)
            return _of_node(left, False) if left else EXIT_STOPPED
        finally:
            done.set()
            watcher.join()  # it reads the folder, which goes next


def _of_node(left: list[int], silent: bool) -> int:
    """Return a node's exit code from its ranks'; silent: some left none."""
    if not left:
        return EXIT_FAILURE
    found = {code: left.count(code) for code in left}
    return decided(found, len(left) + silent)


if __name__ == "__main__":
    sys.exit(main())
