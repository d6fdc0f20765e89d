"""One record of the pack before it is written: its JSON body and, if it has them, its image and its sound."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from sailplan.errors import SailplanError

KEY_LIMIT = 90  # a USTAR member name holds 100 bytes; the extension needs a few of them


class BuildError(SailplanError):
    """Something a person can mend (a missing tool, a changed source); printed as one line."""


@dataclass
class Record:
    """`body` becomes KEY.json, `webp` KEY.webp (64x64 RGB), `ogg` KEY.ogg (mono Opus)."""

    body: dict[str, Any]
    webp: bytes | None = None
    ogg: bytes | None = None

    @property
    def id(self) -> str:
        return self.body["id"]

    @property
    def key(self) -> str:
        """The tar key: the id without its set, with neither dots nor slashes, short enough for USTAR."""
        key = self.id.split("/", 1)[1].replace("/", "__").replace(".", "_")
        if len(key.encode()) > KEY_LIMIT:
            key = key[: KEY_LIMIT - 9] + "-" + hashlib.sha256(key.encode()).hexdigest()[:8]
        return key
