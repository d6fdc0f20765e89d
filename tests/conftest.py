"""Order of the tests: what leaves threads in this process runs last.

Ranks are forked from it, and threads do not survive a fork: a rank forked after a process group of
gloo was made here (unit/model), or after Weights & Biases started its service (unit/observe), can
wait for ever.
"""

from __future__ import annotations

import pytest

LAST = ("unit/model", "unit/observe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: any(place in item.path.as_posix() for place in LAST))
