"""How a URL is read: by byte ranges, or only as a whole.

By ranges: http, https, s3, gs, az (obstore's names for them), where the server can. As a whole:
`pipe:` commands and everything else that webdataset's gopen opens, URLs with a query (their
signature is part of the request), and compressed tars, whose members have no place of their own.
"""

from __future__ import annotations

import re
from typing import Literal

RANGED = ("http", "https", "s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
COMPRESSED: dict[str, Literal["gzip", "zstd"]] = {
    ".tar.gz": "gzip",
    ".tgz": "gzip",
    ".tar.zst": "zstd",
    ".tar.zstd": "zstd",
}
ENDINGS = (".tar", *COMPRESSED)  # of shards in a folder


def scheme(url: str) -> str:
    """Return the scheme of a URL, "" of a path."""
    found = re.match(r"^([a-z][a-z0-9+]*):", url)
    return found[1] if found else ""


def is_remote(name: str) -> bool:
    """Return whether a shard's name is no path of this machine."""
    return scheme(name) not in ("", "file")


def compression(url: str) -> Literal["gzip", "zstd"] | None:
    """Return how a tar is compressed, by its name."""
    name = url.partition("?")[0].rstrip(" -")
    return next((form for ending, form in COMPRESSED.items() if name.endswith(ending)), None)


def has_ranges(url: str) -> bool:
    """Return whether parts of what lies at the URL may be asked for."""
    return scheme(url) in RANGED and "?" not in url and compression(url) is None


def split(url: str) -> tuple[str, str]:
    """Return the store of a URL, such as s3://bucket, and the key in it."""
    start, _, rest = url.partition("://")
    place, _, key = rest.partition("/")
    if start in ("abfs", "abfss", "azure", "az", "adl") and "@" in place:  # CONTAINER@ACCOUNT...
        return f"{start}://{place}", key
    return f"{start}://{place}", key


def parent(url: str) -> str:
    """Return the folder of a URL, without its last part."""
    return url.partition("?")[0].rstrip(" -").rpartition("/")[0]


def file_name(url: str) -> str:
    """Return the last part of a URL; of a command, of its last argument."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", url.partition("?")[0].rstrip(" -").rpartition("/")[2])
