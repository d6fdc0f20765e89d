"""torchrun, with the ranks' own exit code passed through.

Plain torchrun turns every failure into 1; the exit codes of sailplan (64 bad configuration, 65 bad data,
70 hang, 75 stopped, resume me) are what launch scripts and schedulers act on.
Use: python -m sailplan.runtime.torchrun --nproc-per-node 2 -m sailplan train ...
"""

from __future__ import annotations

import logging
import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from sailplan.errors import EXIT_FAILURE, EXIT_STOPPED


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, without its warning; ranks set torch's threads themselves
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks have said it already, in one line
    try:
        torchrun()
    except ChildFailedError as failure:
        codes = [error.exitcode for error in failure.failures.values() if error.exitcode > 0]
        # A rank that leaves with a code of its own makes torchrun end the others by signal (negative codes).
        return codes[0] if codes else EXIT_FAILURE
    except SignalException:
        return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
