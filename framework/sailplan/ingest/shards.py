"""Write a part's records as shards by webdataset's own writer: whole files or none, the same
bytes for the same records.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import webdataset


def write_shard(folder: Path, name: str, records: Iterable[Mapping[str, bytes]]) -> dict[str, int]:
    """Write records (extension -> bytes) into folder/name; return its name and size in bytes.

    The shard has its name only when it is whole. Without a record there is no shard: {}.
    """
    opened: dict[str, IO[bytes]] = {}
    sizes: dict[str, int] = {}

    def temporary(name: str) -> Path:
        return folder / f".{name}.{os.getpid()}.tmp"

    def start(name: str) -> IO[bytes]:
        opened[name] = open(temporary(name), "wb")  # noqa: SIM115 - closed when the writer says that the shard is whole
        return opened[name]

    def finish(name: str) -> None:
        opened.pop(name).close()
        sizes[name] = temporary(name).stat().st_size
        os.replace(temporary(name), folder / name)

    writer = None
    try:
        for number, members in enumerate(records):
            if writer is None:
                writer = webdataset.ShardWriter(
                    name.replace("%", "%%") + "%.0s",  # one shard: its number is not shown
                    maxcount=1 << 62,
                    maxsize=float("inf"),
                    post=finish,
                    opener=start,
                    verbose=0,
                    encoder=False,
                    compress=False,
                    mtime=0,
                    user="",
                    group="",
                    mode=0o644,
                )
            writer.write({"__key__": f"{number:08d}", **members})
        if writer is not None:
            writer.close()
    except BaseException:
        for name, file in opened.items():
            file.close()
            temporary(name).unlink(missing_ok=True)
        raise
    return sizes
