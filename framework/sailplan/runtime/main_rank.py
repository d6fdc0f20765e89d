"""Work that one process does for all: its value, or its failure, reaches every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar, cast

from sailplan.errors import (
    BadDataError,
    ConfigurationError,
    SailplanError,
    StopRequested,
    UnavailableError,
)
from sailplan.runtime.process import Parallel
from sailplan.runtime.watch import meet, phase

Value = TypeVar("Value")  # JSON-able
KINDS: dict[str, type[SailplanError]] = {
    kind.__name__: kind
    for kind in (SailplanError, ConfigurationError, BadDataError, StopRequested, UnavailableError)
}


def on_main(parallel: Parallel, what: str, work: Callable[[], Value]) -> Value:
    """Return `work()` done on rank 0, its JSON-able value, on every rank.

    If it fails, every rank raises, so that none waits for ever.

    An error of `sailplan.errors` is the same on all ranks. The others wait as long as rank 0 makes
    progress.
    """
    answer, cause = "", None  # type: str, Exception | None
    if parallel.is_main:
        with phase(what, local=True):
            try:
                answer = json.dumps({"value": work()})
            except SailplanError as error:
                answer, cause = (
                    json.dumps({"kind": type(error).__name__, "problem": str(error)}),
                    error,
                )
            except Exception as error:  # told to the other ranks, then raised again
                problem = f"{what} failed on rank 0: {type(error).__name__}: {error}"
                answer, cause = json.dumps({"kind": "SailplanError", "problem": problem}), error
    meet(what)
    found = json.loads(parallel.broadcast_text(answer))
    if cause is not None:
        raise cause
    if "problem" in found:
        raise KINDS.get(found["kind"], SailplanError)(found["problem"])
    return cast(Value, found["value"])
