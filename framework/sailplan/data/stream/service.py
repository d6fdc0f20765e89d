"""The process that fetches: asked over a socket by all processes of a rank, for ranges of bytes
that it puts into the cache of the machine.

One line of JSON a request and a reply. At most `in_flight` requests to stores run at a time. It
ends with the process that started it, by whatever that ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path

from sailplan.config.fields import JsonObject
from sailplan.data.stream.disk import DiskCache, NoRoom, range_name, whole_name
from sailplan.data.stream.stores import Changed, Gone, NoRanges, OutOfTime, Stores
from sailplan.data.stream.whole import Unreadable, keep_whole
from sailplan.runtime.signals import STOP_SIGNALS

POLL = 0.01  # seconds, while another process writes the same file
PARENT_POLL = 1.0
LONGEST_LINE = 16 << 20  # bytes of a request
ATTEMPTS = 5  # to keep a file whose room is given away while it is written
Answer = JsonObject


class Service:
    """Answers requests: `head`, `names`, `ranges`, `whole`, `counts`."""

    def __init__(
        self, folder: Path, limit: int, in_flight: int, deadline: float, timeout: float
    ) -> None:
        """folder, limit: of the cache, bytes. in_flight: requests at a time. Others: `Stores`."""
        self.disk, self.stores = DiskCache(folder, limit), Stores(deadline, timeout)
        self._folder, self._limit = folder, limit
        self._slots = asyncio.Semaphore(in_flight)
        self._running: dict[str, asyncio.Task[object]] = {}
        self._heads: dict[str, tuple[int, int]] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one process until it hangs up."""
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                request = json.loads(line)
                work = self.answer(request)
                if request.get("wait", True):
                    writer.write(json.dumps(await work).encode() + b"\n")
                    await writer.drain()
                else:  # ahead of need: an error is told to who waits for it later
                    self._start(f"ahead {id(work)}", work)
        writer.close()

    async def answer(self, request: JsonObject) -> Answer:
        """Return the answer to a request; errors as `error` (their kind) and `reason`."""
        try:
            return await getattr(self, f"_{request.pop('what')}")(
                **{key: value for key, value in request.items() if key != "wait"}
            )
        except (Changed, Gone, OutOfTime, Unreadable, NoRanges) as error:
            return {"error": type(error).__name__, "reason": str(error)}
        except NoRoom as error:
            return {"error": "NoRoom", "reason": str(error)}
        except (OSError, sqlite3.Error) as error:
            return {"error": "Disk", "reason": f"{type(error).__name__}: {error}"}
        except Exception as error:  # whatever it is, who waits is told
            return {"error": "Failed", "reason": f"{request.get('url')}: {error!r}"}

    async def _head(self, url: str, fresh: bool = False) -> Answer:
        if fresh or url not in self._heads:
            async with self._slots:
                self._heads[url] = await self.stores.head(url)
        size, version = self._heads[url]
        return {"size": size, "version": version}

    async def _names(self, folder: str) -> Answer:
        return {"names": await self.stores.names(folder)}

    async def _counts(self) -> Answer:
        return dict(self.stores.counts)

    async def _ranges(self, url: str, version: int, ranges: list[tuple[int, int]]) -> Answer:
        """Have these ranges on disk."""
        await asyncio.gather(
            *(
                self._once(
                    range_name(url, version, start, stop),
                    partial(self._range, url, start, stop, version),
                )
                for start, stop in ranges
            )
        )
        return {}

    async def _whole(self, url: str) -> Answer:
        """Have all bytes of a URL on disk."""
        name = whole_name(url)
        await self._once(name, partial(self._all, url))
        return {"size": os.stat(self.disk.path(name)).st_size}

    # ---------------------------------------------------------------- parts
    async def _once(self, name: str, fetch: Callable[[str], Awaitable[bool]]) -> None:
        """Wait until a file is there; however many ask for it, it is fetched once."""
        if self.disk.path(name).exists():
            with contextlib.suppress(OSError):
                os.utime(self.disk.path(name))
            return
        if name not in self._running:
            self._start(name, self._claimed(name, fetch))
        await asyncio.shield(self._running[name])

    def _start(self, name: str, work: Coroutine[object, object, object]) -> None:
        task = asyncio.create_task(work)
        self._running[name] = task

        def done(task: asyncio.Task[object]) -> None:
            del self._running[name]
            if not task.cancelled():
                task.exception()  # is raised where it is waited for; nobody may

        task.add_done_callback(done)

    async def _claimed(self, name: str, fetch: Callable[[str], Awaitable[bool]]) -> None:
        for _ in range(ATTEMPTS):
            kept = None
            while kept is None and not self.disk.path(name).exists():
                with self.disk.claimed(name) as temporary:
                    if temporary is not None and not self.disk.path(name).exists():
                        async with self._slots:
                            kept = await fetch(name)
                if kept is None:
                    await asyncio.sleep(POLL)
            if kept is not False:
                return
        raise NoRoom(f"{name} lost its room {ATTEMPTS} times")

    async def _range(self, url: str, start: int, stop: int, version: int, name: str) -> bool:
        content = await self.stores.get(url, start, stop, version)
        temporary = self.disk.path(f"{name}.part")
        try:
            self.disk.reserve(name, len(content))
            temporary.write_bytes(content)
            return self.disk.finish(name, temporary)
        finally:
            self.disk.give_up(name)

    async def _all(self, url: str, name: str) -> bool:
        def work() -> bool:  # in a thread, which needs a ledger of its own
            disk = DiskCache(self._folder, self._limit)
            return keep_whole(disk, name, url, disk.path(f"{name}.part")) is not None

        self.stores.counts["requests"] += 1
        kept = await asyncio.to_thread(work)
        if kept:
            self.stores.counts["bytes"] += os.stat(self.disk.path(name)).st_size
        return kept


async def _run(options: argparse.Namespace) -> None:
    service = Service(
        Path(options.cache), options.limit, options.in_flight, options.deadline, options.timeout
    )
    server = await asyncio.start_unix_server(service.serve, options.socket, limit=LONGEST_LINE)
    print("ready", flush=True)
    async with server:
        while os.getppid() == options.parent:
            await asyncio.sleep(PARENT_POLL)
    shutil.rmtree(Path(options.socket).parent, ignore_errors=True)
    os._exit(0)  # a transfer that still runs is of no use to anyone


def main() -> None:
    """Serve until the parent has ended."""
    parser = argparse.ArgumentParser()
    for name, kind in (
        ("socket", str),
        ("cache", str),
        ("limit", int),
        ("in-flight", int),
        ("deadline", float),
        ("timeout", float),
        ("parent", int),
    ):
        parser.add_argument(f"--{name}", type=kind, required=True)
    # A stop is the run's to handle: it still reads on while it saves
    for number in (*STOP_SIGNALS, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
