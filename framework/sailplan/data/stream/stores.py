"""Byte ranges and names from object stores and HTTP servers, through obstore.

Credentials, regions and endpoints come from the environment, under the names of each store's own
tools (AWS_*, GOOGLE_*, AZURE_*). What was read is bound to a version, a hash of the entity tag (or
of the time of the last change) and the size: a shard that is another than the one that was indexed
is noticed by the first byte that is read of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import obstore
from fsspec import AbstractFileSystem
from obstore.exceptions import (
    BaseError,
    GenericError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.fsspec import FsspecStore
from obstore.store import from_url

from sailplan.config.fields import Options
from sailplan.data.stream.address import scheme, split

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore


FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between attempts
RETRIES = 2  # of obstore's own for one attempt of ours: ours also repeat bodies that break off
# Variables that name a store's server; http: is allowed where one of them says so
ENDPOINTS = (
    *("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    "GOOGLE_BASE_URL",
    *("AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT"),
)
Result = TypeVar("Result")


class Gone(Exception):
    """What a URL names cannot be had, and another attempt would not help."""


class Changed(Exception):
    """What lies at a URL is another version than the one that was asked for."""


class NoRanges(Exception):
    """The server answers no requests for a part."""


class OutOfTime(Exception):
    """No attempt succeeded before the deadline."""


class Stores:
    """One client a bucket or host. `counts`: requests, retries and bytes so far."""

    def __init__(self, deadline: float, timeout: float) -> None:
        """deadline: seconds for all attempts of a request. timeout: without a byte, of one."""
        self.deadline, self.timeout = deadline, timeout
        self.counts: Counter[str] = Counter()
        self._stores: dict[str, ObjectStore] = {}

    async def head(self, url: str) -> tuple[int, int]:
        """Return size in bytes and version of what lies at a URL."""
        store, key = self._at(url)
        meta = await self._insist(url, lambda: obstore.head_async(store, key))
        return int(meta["size"]), version_of(meta)

    async def get(self, url: str, start: int, stop: int, version: int) -> bytes:
        """Return bytes start .. stop - 1. Raises Changed where another version lies there."""
        store, key = self._at(url)

        async def attempt() -> bytes:
            found = await obstore.get_async(store, key, options={"range": (start, stop)})
            if version_of(found.meta) != version:
                raise Changed(url)
            content = bytes(await found.bytes_async())
            if len(content) != stop - start:
                raise Changed(f"{url}: {len(content)} bytes from byte {start}")
            self.counts["bytes"] += len(content)
            return content

        return await self._insist(url, attempt)

    async def names(self, folder: str) -> list[str]:
        """Return the URLs right below a folder."""
        store, prefix = self._at(folder.rstrip("/"))

        async def attempt() -> list[str]:
            found = await obstore.list_with_delimiter_async(store, prefix or None)
            return [meta["path"] for meta in found["objects"]]

        return [f"{split(folder)[0]}/{path}" for path in await self._insist(folder, attempt)]

    async def _insist(self, url: str, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """Return what an attempt gives; repeated with growing pauses until the deadline."""
        end, pause = time.monotonic() + self.deadline, FIRST_PAUSE
        while True:
            self.counts["requests"] += 1
            try:
                return await asyncio.wait_for(attempt(), max(0.01, end - time.monotonic()))
            except (NotFoundError, FileNotFoundError) as error:
                raise Gone(f"{url}: there is nothing") from error
            except (PermissionDeniedError, UnauthenticatedError) as error:
                raise Gone(f"{url}: access was refused ({short(error)})") from error
            except NotSupportedError as error:
                raise NoRanges(url) from error
            except (GenericError, TimeoutError, OSError) as error:
                # Other errors of the same class: a server that sends the whole in place of a range
                if "partial" in str(error).lower() and "200" in str(error):
                    raise NoRanges(url) from error
                if time.monotonic() + pause >= end:
                    raise OutOfTime(
                        f"{url}: no answer within {self.deadline:g} s ({short(error)})"
                    ) from error
            except BaseError as error:
                raise Gone(f"{url}: {short(error)}") from error
            self.counts["retries"] += 1
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _at(self, url: str) -> tuple[ObjectStore, str]:
        place, key = split(url)
        if place not in self._stores:
            self._stores[place] = from_url(
                place, **client_settings(url, self.deadline, self.timeout, RETRIES)
            )
        return self._stores[place], key


def client_settings(url: str, deadline: float, timeout: float, retries: int) -> Options:
    """Return obstore's settings for a URL's store: seconds for a request with its `retries`, and
    without a byte.
    """
    plain = scheme(url) == "http" or any(
        os.environ.get(name, "").startswith("http:") for name in ENDPOINTS
    )
    options = {
        "timeout": timedelta(seconds=deadline),
        "read_timeout": timedelta(seconds=timeout),
        "connect_timeout": timedelta(seconds=timeout),
        "allow_http": plain,
    }
    retry = {"max_retries": retries, "retry_timeout": timedelta(seconds=deadline)}
    return {"client_options": options, "retry_config": retry}


def file_system(url: str, deadline: float, timeout: float, retries: int) -> AbstractFileSystem:
    """Return obstore's file system for a URL's scheme; settings as `client_settings`."""
    opened: Callable[..., AbstractFileSystem] = FsspecStore
    return opened(scheme(url), **client_settings(url, deadline, timeout, retries))


def version_of(meta: ObjectMeta) -> int:
    """Return a number below 0, as no time is, that differs where the content may differ."""
    tag = meta["e_tag"] or str(meta["last_modified"])
    digest = hashlib.sha256(f"{tag} {meta['size']}".encode()).digest()
    return -(int.from_bytes(digest[:8], "little") >> 2 | 1)


def short(error: BaseException) -> str:
    """Return obstore's reason in one line, without the insides of its client."""
    text = " ".join(str(error).partition("Debug source:")[0].split()).rstrip(": ")
    return text[:300] or type(error).__name__
