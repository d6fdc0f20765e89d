"""What a path means whose weights are asked for: an exported folder, a checkpoint, or a run."""

from __future__ import annotations

from pathlib import Path

from sailplan.checkpoint.exported import is_exported
from sailplan.checkpoint.seal import is_complete
from sailplan.checkpoint.store import latest
from sailplan.errors import ConfigurationError


def initial_source(given: str, key: str = "initialise_from") -> Path:
    """The checkpoint or exported folder that a setting means: itself, or the newest complete
    checkpoint of a run folder.
    """
    path = Path(given)
    if is_exported(path) or is_complete(path):
        return path
    newest = latest(path / "checkpoints")
    if newest is None:
        raise ConfigurationError(
            f"{key}={given}: found neither, expected a run folder with a complete checkpoint, such a "
            "checkpoint, or an exported folder"
        )
    return newest
