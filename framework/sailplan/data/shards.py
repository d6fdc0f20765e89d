"""From the `shards` key of a data set to its shards: local tar files, and URLs that are read where
they lie (`data.stream`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import braceexpand

from sailplan.config.schema import ARTIFACT
from sailplan.data.config import StreamConfig
from sailplan.data.names import is_sidecar
from sailplan.data.shard_files import Shard
from sailplan.data.stream.address import ENDINGS, compression, has_ranges, is_remote, scheme
from sailplan.data.stream.client import open_streams
from sailplan.data.stream.shard import RemoteShard
from sailplan.errors import ConfigurationError

MOST_ASKED = 1000  # shards of which each is asked for


def resolve(
    dataset: str,
    shards: str,
    cache: Path | None = None,
    progress: Callable[[], None] = lambda: None,
    stream: StreamConfig | None = None,
) -> list[Shard]:
    """The data set's shards, in reading order (as listed, a folder's sorted by name). progress:
    called for each.

    shards: a folder (its *.tar, also compressed), one tar, or a brace pattern of paths or URLs
    such as `s3://bucket/train-{000..009}.tar`; `s3://bucket/folder/` is a folder of a store.
    Raises ConfigurationError naming `data.sets.DATASET.shards` when nothing is there.
    """
    key = f"data.sets.{dataset}.shards"
    if not shards:
        raise ConfigurationError(
            f"{key} is empty: expected a folder of .tar shards, a brace pattern or URLs"
        )
    if shards.startswith(ARTIFACT):
        raise ConfigurationError(
            f"{key}={shards}: this data set is made by a stage's `artifacts`; it exists only "
            "within a run"
        )
    if not is_remote(shards) and os.path.isdir(shards):
        names = [str(path) for path in _listed(key, Path(shards))]
    elif has_ranges(shards) and shards.endswith("/"):
        names = _listed_there(key, shards, cache, stream)
    else:
        names = list(braceexpand.braceexpand(shards))
    result: list[Shard] = []
    for name in names:
        local = name.removeprefix("file:")
        if is_remote(name):
            result.append(RemoteShard(name, open_streams(cache, stream)))
        elif compression(name):  # its members have no place of their own until it is unpacked
            url = f"file:{os.path.abspath(local)}"
            result.append(RemoteShard(url, open_streams(cache, stream)))
        else:
            result.append(Path(local))
        progress()
    missing = _absent(
        [
            shard if isinstance(shard, Path) else Path(shard.url.removeprefix("file:"))
            for shard in result
            if isinstance(shard, Path) or scheme(shard.url) == "file"
        ]
    )
    if missing:
        raise ConfigurationError(
            f"{key}={shards}: {len(missing)} of {len(result)} shards do not exist, first "
            f"{missing[0]}; expected a folder of .tar shards or existing files; "
            "data.root=FOLDER says where the sets of conf/data lie"
        )
    return result


def _absent(paths: list[Path]) -> list[str]:
    """Return the paths that are no files; of many, those that no listing of their folders has:
    one request a folder, not one a shard.
    """
    if len(paths) <= MOST_ASKED:
        return [str(path) for path in paths if not os.path.isfile(path)]
    listed: dict[str, set[str]] = {}
    result = []
    for path in map(str, paths):
        folder, _, name = path.rpartition(os.sep)
        if folder not in listed:
            try:
                listed[folder] = set(
                    os.listdir(folder or (os.sep if path.startswith(os.sep) else os.curdir))
                )
            except OSError:
                listed[folder] = set()
        if name not in listed[folder]:
            result.append(path)
    return result


def _listed(key: str, folder: Path) -> list[Path]:
    """The folder's shards, without what a file system put beside them."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ConfigurationError(
            f"{key}={folder}: the folder cannot be read ({error.strerror or error}); check its "
            "permissions"
        ) from error
    found = [folder / name for name in names if name.endswith(ENDINGS) and not is_sidecar(name)]
    if not found:
        raise ConfigurationError(
            f"{key}={folder}: the folder holds no .tar file; expected webdataset shards"
        )
    return found


def _listed_there(
    key: str, folder: str, cache: Path | None, stream: StreamConfig | None
) -> list[str]:
    """The shards of a folder of an object store."""
    if scheme(folder) in ("http", "https"):
        raise ConfigurationError(
            f"{key}={folder}: found a folder of a web server, which cannot be listed; expected a "
            "pattern such as https://host/train-{000..099}.tar"
        )
    found = [
        url
        for url in sorted(open_streams(cache, stream).names(folder))
        if url.endswith(ENDINGS) and not is_sidecar(url.rpartition("/")[2])
    ]
    if not found:
        raise ConfigurationError(f"{key}={folder}: there is no .tar; expected webdataset shards")
    return found
