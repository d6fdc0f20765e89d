"""Threads of the tests' process: ranks and commands are forked from it, and threads do not survive
a fork.

A rank forked after a process group of gloo was made here (unit/model), or after Weights & Biases
started its service (unit/observe), can wait for ever: these tests run last. A process forked after
OpenMP made its pool here waits for the pool's threads: torch keeps to one thread, whatever a
command that is called in this process asks for.
"""

from __future__ import annotations

import pytest
import torch

LAST = ("unit/model", "unit/observe")

torch.set_num_threads(1)
torch.set_num_threads = lambda threads: None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: any(place in item.path.as_posix() for place in LAST))
