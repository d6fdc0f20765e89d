"""Servers on loopback: one of the tests' own that misbehaves as told, and an S3-compatible one."""

from __future__ import annotations

import hashlib
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NEXT_PAGE = "NextContinuationToken"
MODIFIED = "Mon, 30 Nov 2026 12:00:00 GMT"


@dataclass
class WebServer:
    """Files by path, served by ranges. `counts`: requests by method, and bytes of bodies; `asked`:
    requests for each range of a path.
    """

    files: Mapping[str, bytes]
    fail_every: int = 0  # so many requests for a range are answered 500
    drop_every: int = 0  # so many end in the middle of their body
    pause: float = 0.0  # seconds before each answer
    ranges: bool = True
    counts: Counter[str] = field(default_factory=Counter)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    url: str = ""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[WebServer]:
        """Serve on a free port."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def do_HEAD(self) -> None:
                owner.answer(self, body=False)

            def do_GET(self) -> None:
                owner.answer(self, body=True)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        """Answer one request, or misbehave."""
        with self._lock:
            self.counts["GET" if body else "HEAD"] += 1
            number = self.counts["GET"]
            if body:
                self.asked[handler.path, handler.headers.get("Range", "")] += 1
        time.sleep(self.pause)
        content = self.files.get(urllib.parse.unquote(handler.path.lstrip("/")))
        if content is None or (body and self.fail_every and number % self.fail_every == 0):
            handler.send_response(404 if content is None else 500)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        part, asked = content, handler.headers.get("Range")
        if body and asked and self.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1]
            handler.send_response(206)
            handler.send_header(
                "Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            )
        else:
            handler.send_response(200)
        handler.send_header("Last-Modified", MODIFIED)
        handler.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        handler.send_header("Content-Length", str(len(part)))
        handler.end_headers()
        if not body:
            return
        if self.drop_every and number % self.drop_every == 0:
            part = part[: len(part) // 2]
            handler.close_connection = True
        handler.wfile.write(part)
        with self._lock:
            self.counts["bytes"] += len(part)


@dataclass
class ObjectServer(WebServer):
    """What a client of Google's or Azure's store asks for to read: objects and listings, a page
    at a time; who shows no credentials is refused. Files by BUCKET/KEY.
    """

    azure: bool = False
    page: int = 7  # objects of a page
    credentials: str = "Bearer test"  # how the header begins

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        """Answer one request."""
        if not handler.headers.get("Authorization", "").startswith(self.credentials):
            return self._send(handler, 403, b"")
        path, _, query = handler.path.partition("?")
        if not query:
            return super().answer(handler, body=body)
        asked = {key: values[0] for key, values in urllib.parse.parse_qs(query).items()}
        self.counts["LIST"] += 1
        start, marker = f"{path.strip('/')}/", "marker" if self.azure else "continuation-token"
        keys = sorted(name.removeprefix(start) for name in self.files if name.startswith(start))
        below = [key for key in keys if key.startswith(asked.get("prefix", ""))]
        first = int(asked.get(marker, "0"))
        page, more = below[first : first + self.page], first + self.page < len(below)
        one, following = (self._blob, "NextMarker") if self.azure else (self._item, NEXT_PAGE)
        listed = "".join(one(key, self.files[start + key]) for key in page)
        listed = f"<Blobs>{listed}</Blobs>" if self.azure else listed
        if more:
            listed += f"<{following}>{first + self.page}</{following}>"
        name = "EnumerationResults" if self.azure else "ListBucketResult"
        self._send(handler, 200, f"<?xml version='1.0'?><{name}>{listed}</{name}>".encode())

    @staticmethod
    def _item(key: str, content: bytes) -> str:
        return (
            f"<Contents><Key>{key}</Key><LastModified>2026-11-30T12:00:00.000Z</LastModified>"
            f"<ETag>x</ETag><Size>{len(content)}</Size></Contents>"
        )

    @staticmethod
    def _blob(key: str, content: bytes) -> str:
        return (
            f"<Blob><Name>{key}</Name><Properties><Last-Modified>{MODIFIED}</Last-Modified>"
            f"<Content-Length>{len(content)}</Content-Length><Etag>x</Etag>"
            "<Content-Type>application/x-tar</Content-Type></Properties></Blob>"
        )

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, status: int, content: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/xml")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content)


def files_of(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Return the files right in a folder, as a server's."""
    return {prefix + path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}
