"""The made-up shards of sailplan.data.testing, written once per session, and configurations over
them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sailplan.config.schema import Config
from sailplan.data.testing import made_up_config, write_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    write_shards(root)
    return root


@pytest.fixture
def make_config(shards: Path) -> Callable[..., Config]:
    """made_up_config over the session's shards."""
    return partial(made_up_config, shards)
