"""Order of the tests: what starts threads that do not survive a fork runs last.

Weights & Biases leaves a service thread in the process; a rank that is forked afterwards can wait for ever for a lock
that the thread held.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "unit/observe" in item.path.as_posix())
