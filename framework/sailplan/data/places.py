"""Where what is derived from a shard is kept: beside it in `.index`, or in the cache where that
cannot be written, as it cannot where the shard lies elsewhere.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from sailplan.errors import ConfigurationError


class Shard(Protocol):
    """A path, or what lies elsewhere and has the URL of its folder as `parent`."""

    @property
    def parent(self) -> str | Path: ...


def cache_root(cache: Path | None) -> Path:
    """Return the cache's folder: `data.cache`, else ~/.cache/sailplan.

    Raises ConfigurationError where there is no home.
    """
    try:
        return cache or Path("~/.cache/sailplan").expanduser()
    except RuntimeError as error:
        raise ConfigurationError(
            "data.cache is not set, and this user has no home folder; set data.cache to a folder "
            "that can be written"
        ) from error


def cache_folder(shard: Shard, cache: Path | None) -> Path:
    """Return the cache's folder for what is derived from the shards of this one's folder."""
    folder = shard.parent if isinstance(shard.parent, str) else str(shard.parent.resolve())
    digest = hashlib.sha256(folder.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache_root(cache) / "index" / digest


def kept_places(shard: Shard, name: str, cache: Path | None) -> list[Path]:
    """Return where a file derived from the shard may lie, in the order in which it is looked
    for.
    """
    if isinstance(shard.parent, str):
        return [cache_folder(shard, cache) / name]
    try:
        return [shard.parent / ".index" / name, cache_folder(shard, cache) / name]
    except ConfigurationError:  # no home: a container's user
        return [shard.parent / ".index" / name]


def place_to_write(shard: Shard, name: str, cache: Path | None) -> Path:
    """Return where a file derived from the shard is to be written: the first place that can be;
    its folder is there.
    """
    chosen = kept_places(shard, name, cache)[0]
    if not isinstance(shard.parent, str):
        folder = chosen.parent if chosen.parent.exists() else shard.parent
        if not os.access(folder, os.W_OK):
            chosen = cache_folder(shard, cache) / name
    with explained(chosen, cache):
        chosen.parent.mkdir(parents=True, exist_ok=True)
        ignore = chosen.parent / ".gitignore"
        if not ignore.exists():
            ignore.write_text("*\n")  # a by-product: keep it out of the data's own repository
    return chosen


@contextmanager
def explained(place: Path, cache: Path | None) -> Iterator[None]:
    """Turn what a file system refuses into a ConfigurationError that names data.cache."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"data.cache={cache or 'null'}: {place} cannot be written ({error.strerror or error}); "
            "set data.cache to a folder that can be written"
        ) from error
