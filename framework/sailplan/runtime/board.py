"""What the ranks of a job tell each other beside their collectives: small notes in the
launcher's store.

A collective cannot say who is missing from it. So every rank notes on this board who and where it
is, that it makes progress, that it was asked to stop, and how it leaves. A note is one request to
the store, of a thread that no collective holds up; the costs of a rank do not depend on the number
of ranks (counters), but for the one table of a hang. Nothing here waits for a note.
"""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sailplan.runtime.environment import START, host_name

if TYPE_CHECKING:
    from torch.distributed import Store

CODES = (
    70,
    65,
    64,
    75,
    1,
)  # of the ranks' exit codes, the first that is there is the job's; 75 only where all left with it
REQUEST_SECONDS = 10.0


@dataclass
class RankNote:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    phase: str = "work"
    step: int = 0
    beats: int = 0
    silent: float = 0.0  # seconds since its last beat, when it wrote this
    seen: float = 0.0  # when it wrote this, in seconds since the epoch
    local: bool = False  # works by itself: other ranks may wait for it
    stack: str = ""


def decided(codes: dict[int, int], ranks: int) -> int:
    """Return a job's exit code from how many of its ranks left with which.

    A rank that left without a word was lost. A stop is one only where every rank stopped or was
    done.
    """
    found = {code: count for code, count in codes.items() if count and code}
    if not found:
        return 0 if codes.get(0, 0) == ranks else 70
    if set(found) == {75} and found[75] + codes.get(0, 0) < ranks:
        return 70
    return next(
        (code for code in CODES if found.get(code) and (code != 75 or set(found) == {75})), 1
    )


class Board:
    """A rank's access to the notes of its job."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store, self.rank, self.world_size, self.host = (
            store,
            rank,
            world_size,
            host_name(),
        )

    @classmethod
    def of_launch(cls, seconds: float) -> Board:
        """Return the board of this launch, by torchrun's environment variables.

        Raises torch's DistError where nobody answers in time.
        """
        from torch.distributed import PrefixStore, TCPStore

        timeout = datetime.timedelta(seconds=seconds)
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timeout,
        )
        store.set_timeout(datetime.timedelta(seconds=REQUEST_SECONDS))
        start = os.environ.get(START) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        prefix = f"sailplan/{start}"
        return cls(
            PrefixStore(prefix, store), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        )

    # ---------------------------------------------------------------- counters
    def count(self, name: str) -> int:
        """Add one; return how many there are now."""
        return int(self._store.add(name, 1))

    def counted(self, name: str) -> int:
        """Return how often `count` was called by all ranks."""
        return int(self._store.add(name, 0))

    # ---------------------------------------------------------------- texts
    def write(self, name: str, text: str) -> None:
        """Leave a text for all."""
        self._store.set(name, text)

    def read(self, name: str) -> str | None:
        """Return a text, None where nobody left one."""
        return self._store.get(name).decode() if self._store.check([name]) else None

    # ---------------------------------------------------------------- ranks
    def show(self, note: RankNote) -> None:
        """Write this rank's note over its former one."""
        self.write(f"rank/{note.rank}", json.dumps(asdict(note)))

    def notes(self) -> list[RankNote | None]:
        """Return every rank's note, in rank order; None where a rank has not come yet.

        As many requests as ranks.
        """
        texts = [self.read(f"rank/{rank}") for rank in range(self.world_size)]
        return [None if text is None else RankNote(**json.loads(text)) for text in texts]

    # ---------------------------------------------------------------- leaving
    def leave(self, code: int, line: str) -> None:
        """Note that this rank leaves, why, and with which code; the codes of a job are counted."""
        if code not in (0, 75) and self.count("failures") == 1:
            self.write("cause", json.dumps([code, f"rank {self.rank} on {self.host}: {line}"]))
        self.count(f"code/{code if code in (0, *CODES) else 1}")
        self.count("left")

    def cause(self) -> str | None:
        """Return what the first rank that failed said."""
        found = self.read("cause")
        return None if found is None else str(json.loads(found)[1])

    def failed(self) -> bool:
        """Return whether any rank left with another code than 0 and 75."""
        return self.counted("failures") > 0

    def codes(self) -> dict[int, int]:
        """Return how many ranks left with which code."""
        return {code: self.counted(f"code/{code}") for code in (0, *CODES)}
