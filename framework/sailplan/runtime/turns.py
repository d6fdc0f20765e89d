"""Long work that is cut into units and shared by all ranks, which meet after every unit.

A collective at the end of hours of work would time out on the ranks that finish first. Here no rank
is more than one unit ahead of another and waits through the launcher's store, where no time-out of
a group counts; a failure, or a stop that was asked for, reaches all ranks after the unit in which
it happened. Units should take seconds, not hours, and those that take longer call
`runtime.watch.alone` on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from sailplan.errors import (
    EXIT_BAD_DATA,
    EXIT_STOPPED,
    BadDataError,
    ConfigurationError,
    SailplanError,
    StopRequested,
)
from sailplan.runtime.agreement import named_ranks
from sailplan.runtime.arrays import Array
from sailplan.runtime.environment import host_name
from sailplan.runtime.process import Parallel
from sailplan.runtime.progress import progress
from sailplan.runtime.watch import alone, phase
from sailplan.runtime.watch import meet as wait_for_all

Unit = TypeVar("Unit")
Value = TypeVar("Value")


def in_turns(
    parallel: Parallel, what: str, units: Sequence[Unit], work: Callable[[Unit], None]
) -> None:
    """Do `work` on this rank's share of the units: number rank, rank + world size, ... Collective.

    units: the same on all ranks. If a unit fails, every rank raises: the failed one its own error,
    the others a SailplanError (BadDataError for bad data) that quotes it.
    """
    turns = -(-len(units) // parallel.world_size)
    with progress(what, turns, "turns") as advance:
        for turn in range(turns):
            number, problem = turn * parallel.world_size + parallel.rank, None
            try:
                if number < len(units):
                    with phase(what, local=True):
                        alone()
                        work(units[number])
            except Exception as error:  # raised below, once the other ranks know
                problem = error
            meet(parallel, what, problem)
            advance(1)


def apart(parallel: Parallel, what: str, work: Callable[[], None]) -> None:
    """Do `work` on every rank, each at its own pace; it calls `runtime.watch.alone` on its way.

    Collective. Raises as `in_turns`, once all ranks are done.
    """
    problem = None
    try:
        with phase(what, local=True):
            work()
    except Exception as error:  # raised below, once the other ranks know
        problem = error
    meet(parallel, what, problem)


def meet(parallel: Parallel, what: str, problem: Exception | None = None) -> None:
    """Wait for all ranks as long as any makes progress; raise on all where one has a problem.

    A stop signal that one rank obeyed is obeyed by all. Collective.
    """
    wait_for_all(what)
    if not parallel.agree(problem is not None):
        return
    own = (
        None
        if problem is None
        else (getattr(problem, "exit_code", 1), f"{type(problem).__name__}: {problem}")
    )
    answers = from_all_ranks(parallel, own)
    failures = [
        (rank, found)
        for rank, found in enumerate(answers)
        if found is not None and found[0] != EXIT_STOPPED
    ]
    if problem is not None and not (isinstance(problem, StopRequested) and failures):
        raise problem
    if not failures:
        stopped = next(found for found in answers if found is not None)
        raise StopRequested(stopped[1].partition(": ")[2])
    rank, (code, text) = failures[0]
    raise (BadDataError if code == EXIT_BAD_DATA else SailplanError)(
        f"{what} failed on rank {rank}: {text}"
    )


def everywhere(parallel: Parallel, what: str, work: Callable[[], Value]) -> Value:
    """Return what `work`, which is no collective, returns on this rank.

    Where it refuses on any rank, raise one error on all, which names the ranks where they do not
    all say the same: ConfigurationError or BadDataError, as the first one. Collective.
    """
    value, refused = None, None  # type: Value | None, SailplanError | None
    try:
        value = work()
    except (ConfigurationError, BadDataError) as error:
        refused = error
    own = None if refused is None else (refused.exit_code, str(refused))
    wait_for_all(what)
    answers = from_all_ranks(parallel, (own, host_name()))
    problems = [problem for problem, _ in answers if problem is not None]
    if not problems:
        return cast(Value, value)
    lines = [problem[1] if problem else "" for problem, _ in answers]
    text = lines[0] if len(set(lines)) == 1 else named_ranks(lines, [host for _, host in answers])
    kind = BadDataError if problems[0][0] == EXIT_BAD_DATA else ConfigurationError
    raise kind(text) from refused


def sum_over_ranks(values: Array) -> Array:
    """Return the element-wise sum of an array of numbers over all ranks.

    Collective; the shape is the same on all ranks.
    """
    total = torch.from_numpy(np.array(values))
    dist.all_reduce(total)
    return total.numpy()


def any_over_ranks(flags: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return 1 where any rank has 1, else 0: uint8, the shape is the same on all ranks.

    Collective.
    """
    found = torch.from_numpy(np.array(flags))
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.numpy()


def from_all_ranks(parallel: Parallel, value: Value) -> list[Value]:
    """Return every rank's value, in rank order; values are small and can be pickled. Collective."""
    found = [value] * parallel.world_size
    dist.all_gather_object(found, value)
    return found
