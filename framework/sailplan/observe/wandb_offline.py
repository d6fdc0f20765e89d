"""What W&B's offline files of a run hold, so that a resumed run writes again what a kill cut off.

An offline file is a log in LevelDB's framing: a header of 7 bytes, then blocks of 32 KiB, in which
each record, or part of one, follows 7 bytes of its own (checksum, length, kind). The tracker's
process buffers what it writes, so the last lines before a kill are in no file; metrics.jsonl has
them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.message import Message


HEADER, BLOCK = 7, 2**15
WHOLE, FIRST, LAST = 1, 2, 4  # kinds of a record: whole in its block, or first or last part


def kept_steps(folder: Path) -> set[int]:
    """Return the steps whose values the offline files of the run folder hold."""
    found: set[int] = set()
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for record in _records(file.read_bytes()):
            if record.HasField("history"):
                values = {
                    item.key or "/".join(item.nested_key): item for item in record.history.item
                }
                if "step" in values and any(name.startswith("loss/") for name in values):
                    found.add(int(json.loads(values["step"].value_json)))
    return found


def _records(data: bytes) -> Iterator[Message]:
    """Yield the records of an offline file up to where it was cut."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    place, held = HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        body, place = data[place + HEADER : place + HEADER + length], place + HEADER + length
        if kind == 0 or len(body) < length:
            return
        held = body if kind in (WHOLE, FIRST) else held + body
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            try:
                record.ParseFromString(held)
            except DecodeError:
                return
            yield record
