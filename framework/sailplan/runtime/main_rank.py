"""Work that one process does for all: its value, or its failure, reaches every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sailplan.errors import SailplanError
from sailplan.runtime.process import Parallel


def on_main(parallel: Parallel, what: str, work: Callable[[], Any]) -> Any:
    """`work()` done on rank 0; its JSON-able value on every rank. If it fails, every rank raises, so that none waits for ever."""
    answer, cause = "", None
    if parallel.is_main:
        try:
            answer = json.dumps({"value": work()})
        except Exception as error:  # told to the other ranks, then raised again
            answer, cause = json.dumps({"problem": f"{type(error).__name__}: {error}"}), error
    found = json.loads(parallel.broadcast_text(answer))
    if cause is not None:
        raise cause
    if "problem" in found:
        raise SailplanError(f"{what} failed on rank 0: {found['problem']}")
    return found["value"]
