"""What ranks do together in a checkpoint: a failure of one is raised on all, so that none waits for
ever.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from sailplan.errors import ConfigurationError, SailplanError, UnavailableError

Value = TypeVar("Value")
AS_THEY_ARE: dict[str, type[SailplanError]] = {
    kind.__name__: kind for kind in (ConfigurationError, UnavailableError)
}


def together(
    action: Callable[[], Value], what: str, group: dist.ProcessGroup | None = None
) -> Value:
    """Run `action` on every rank; if it fails on any, raises on all: ConfigurationError and
    UnavailableError as they are, else SailplanError in one line.
    """
    failure: Exception | CheckpointException | None = None
    value: Value
    try:
        value = action()
    except (
        Exception,
        CheckpointException,
    ) as error:  # torch derives its exception from BaseException
        failure = error
    reports: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, None if failure is None else _report(failure), group=group)
    report = next((report for report in reports if report is not None), None)
    if report is not None:
        kind, text = report
        if kind:
            raise AS_THEY_ARE[kind](text) from failure
        raise SailplanError(f"{what}: {text}") from failure
    return value


def _report(error: BaseException) -> tuple[str, str]:
    """The kind of an error that is raised as it is, else "", and one line that names the rank;
    torch's exception has the failing ranks in it.
    """
    rank = dist.get_rank()
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = next(iter(error.failures.items()))
    if type(error).__name__ in AS_THEY_ARE:
        return type(error).__name__, str(error)
    return "", f"rank {rank}: {type(error).__name__}: {error}".replace("\n", " ")


def everywhere(question: Callable[[], Value], folder: Path) -> list[Value]:
    """Return every rank's answer; raise on all where one of them has none."""
    answers: list[Value] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(answers, together(question, f"checkpoint {folder} could not be read"))
    return answers
