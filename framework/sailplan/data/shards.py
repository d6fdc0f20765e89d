"""From the `shards` key of a data set to local tar files: a folder, a brace pattern, or URLs
fetched into the cache.

Whatever webdataset's gopen opens can be a shard: `http://...`, `pipe:aws s3 cp s3://... -`,
`pipe:gsutil cat ...`.
A remote shard is fetched whole, once per machine (a lock file makes other ranks wait), because the
plan reads records by position; the index and the reader then see a local file.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import braceexpand
import webdataset

from sailplan.config.schema import ARTIFACT
from sailplan.data.names import is_sidecar
from sailplan.data.places import cache_root, explained
from sailplan.errors import BadDataError, ConfigurationError

MOST_ASKED = 1000  # shards of which each is asked for


def is_remote(name: str) -> bool:
    return re.match(r"^[a-z0-9+]+:", name) is not None and not name.startswith("file:")


def resolve(
    dataset: str,
    shards: str,
    cache: Path | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Local paths of the data set's shards, in reading order (as listed, a folder's sorted by
    name). progress: called for each.

    shards: a folder (its *.tar), one tar, or a brace pattern of paths or URLs such as
    `train-{000..009}.tar`.
    Raises ConfigurationError naming `data.sets.DATASET.shards` when nothing is there, BadDataError
    when a fetch fails.
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
        found = _listed(key, Path(shards))
        if not found:
            raise ConfigurationError(
                f"{key}={shards}: the folder holds no .tar file; expected webdataset shards"
            )
        return found
    names = list(braceexpand.braceexpand(shards))
    paths = []
    for name in names:
        paths.append(fetch(name, cache) if is_remote(name) else Path(name.removeprefix("file:")))
        progress()
    missing = _absent(paths)
    if missing:
        raise ConfigurationError(
            f"{key}={shards}: {len(missing)} of {len(paths)} shards do not exist, first "
            f"{missing[0]}; expected a folder of .tar shards or existing files; "
            "data.root=FOLDER says where the sets of conf/data lie"
        )
    return paths


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
        return [
            folder / name
            for name in sorted(os.listdir(folder))
            if name.endswith(".tar") and not is_sidecar(name)
        ]
    except OSError as error:
        raise ConfigurationError(
            f"{key}={folder}: the folder cannot be read ({error.strerror or error}); check its "
            "permissions"
        ) from error


def fetch(url: str, cache: Path | None = None) -> Path:
    """The local copy of a remote shard, fetched through webdataset's gopen if it is not there
    yet.
    """
    folder = cache_root(cache) / "shards"
    base = re.sub(r"[^A-Za-z0-9._-]", "_", url.rstrip(" -").rpartition("/")[2]).removesuffix(
        ".tar"
    )[-60:]
    path = folder / f"{base}-{hashlib.sha256(url.encode()).hexdigest()[:12]}.tar"
    with explained(folder, cache):
        folder.mkdir(parents=True, exist_ok=True)
        opened = open(path.with_suffix(".lock"), "w")  # noqa: SIM115
    with opened as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            temporary = path.with_suffix(".part")
            try:
                with webdataset.gopen(url) as stream, open(temporary, "wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 20)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                raise BadDataError(
                    f"{url}: could not fetch this shard ({error}); check the URL and the network"
                ) from error
            os.replace(temporary, path)
    return path
