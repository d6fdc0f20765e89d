"""Whether a folder is one folder for all hosts: one rank makes a folder in it, and each host
leaves a file there.

A run folder on each host's own disk does not show before the first checkpoint, whose parts then lie
on several machines.
"""

from __future__ import annotations

import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from sailplan.errors import ConfigurationError
from sailplan.runtime.agreement import named_ranks
from sailplan.runtime.environment import host_name, local_rank
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel
from sailplan.runtime.turns import from_all_ranks
from sailplan.runtime.watch import beat

SECONDS = 15.0  # a network file system shows other hosts' files late


def check_shared(
    parallel: Parallel, folder: Path, key: str, *, own: bool = False, seconds: float = SECONDS
) -> list[str]:
    """Return each rank's host where all hosts write into the one folder; otherwise raise
    ConfigurationError on all ranks. A collective.

    key: the setting that names the folder. own: no other job uses it now. The first rank of each host writes a file of no bytes;
    the others look whether the folder is there. A rank whose file system shows nothing of it
    within `seconds` does not share it.
    """
    place = folder / on_main(
        parallel, "making a file in the run folder", lambda: _make(folder, own)
    )
    problem = _join(place, parallel.rank, seconds)
    answers = from_all_ranks(parallel, (problem, host_name()))
    lines, hosts = [line for line, _ in answers], [host for _, host in answers]
    if parallel.is_main:
        shutil.rmtree(place, ignore_errors=True)
    if any(lines):
        raise ConfigurationError(
            f"{key}: {folder} is not one folder for all hosts: {named_ranks(lines, hosts)} (made by "
            f"rank 0 on {hosts[0]}); put it on a file system that all hosts share and can write to"
        )
    return hosts


def _make(folder: Path, own: bool) -> str:
    for stale in folder.glob(".shared-*"):  # of a job that was killed meanwhile
        with suppress(OSError):
            if time.time() - stale.stat().st_mtime > 4 * SECONDS or own:
                shutil.rmtree(stale)
    name = f".shared-{secrets.token_hex(8)}"  # no host has looked for this name: none is cached
    try:
        (folder / name).mkdir(parents=True)
    except OSError as error:
        raise ConfigurationError(
            f"{folder}: cannot be written ({error.strerror}); choose a folder that can"
        ) from error
    return name


def _join(place: Path, rank: int, seconds: float) -> str:
    """Return why this rank cannot see the folder or write into it; "" where it can."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if local_rank() == 0:
                (place / str(rank)).touch()
            elif not place.is_dir():
                raise FileNotFoundError
            return ""
        except FileNotFoundError:
            if time.monotonic() > deadline:
                return "does not see a file"
        except OSError as error:
            return f"cannot write there ({error.strerror})"
        beat()
        time.sleep(0.2)
