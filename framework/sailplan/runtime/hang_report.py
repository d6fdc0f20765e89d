"""What is said of a hang: one table of all ranks, and the stacks of each, one file for each
different one.

The first rank that notices writes the table to stderr and into `hang-STEP/` below the run folder;
the others add what their threads were doing, unless another rank was doing the same.
"""

from __future__ import annotations

import faulthandler
import hashlib
import re
import tempfile
import time
from pathlib import Path

from sailplan.runtime.board import Board, RankNote
from sailplan.runtime.leaving import note_lost, say

TABLE_SECONDS = 5.0  # for the first rank that noticed to write the table


def stacks() -> tuple[str, str]:
    """Return (a name of what the threads of this process are doing, their stacks as text)."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file)
        file.seek(0)
        text = re.sub(r"Thread 0x[0-9a-f]+", "Thread", file.read())
    threads = sorted(
        part.strip() for part in re.split(r"(?m)^(?:Current t|T)hread.*:$", text) if part.strip()
    )
    return hashlib.sha256("\n".join(threads).encode()).hexdigest()[:8], text


def report_hang(
    note: RankNote,
    text: str,
    silent: float,
    limit: float,
    folder: Path | None,
    board: Board | None,
    tick: float,
) -> None:
    """Write what this rank was doing, and, as the first of all ranks, the table."""
    place = None if folder is None else folder / f"hang-{note.step}"
    if board is None or board.count(f"stack/{note.stack}") == 1:
        _write(
            place,
            f"stack-{note.stack}.txt",
            f"rank {note.rank} on {note.host}, and others with this stack in table.txt\n\n{text}",
            text,
        )
    if board is None:
        say(
            f"no progress for {silent:.0f} s (parallel.timeout_seconds={limit:.0f}) in "
            f"{note.phase} at step {note.step}: a hang"
        )
        return
    note.seen = time.time()
    board.show(note)
    if board.count("hang") > 1:
        stay(note, board, tick)
        return
    time.sleep(min(2.0, 4 * tick))  # until the others have looked
    where = "" if place is None else f"; stacks in {place}"
    say(
        f"no progress on any rank for {silent:.0f} s (parallel.timeout_seconds={limit:.0f}): a "
        f"hang{where}"
    )
    notes, now = board.notes(), time.time()
    lines = table(notes, now, 3 * tick + 1)
    note_lost(lost_hosts(notes, now, 3 * tick + 1))
    for line in lines:
        say(line)
    _write(place, "table.txt", "\n".join(lines) + "\n", None)
    board.write("table", "written")


def stay(note: RankNote, board: Board, tick: float) -> None:
    """Keep showing that this rank is there until the table is written, some seconds at most."""
    deadline = time.monotonic() + TABLE_SECONDS
    while time.monotonic() < deadline and board.read("table") is None:
        note.seen = time.time()
        board.show(note)
        time.sleep(tick)


def missing(notes: list[RankNote | None], now: float, patience: float) -> list[int]:
    """Return the ranks that have not come, or not written for `patience` seconds: stopped,
    killed, or cut off.
    """
    return [rank for rank, note in enumerate(notes) if note is None or now - note.seen > patience]


def lost_hosts(notes: list[RankNote | None], now: float, patience: float) -> list[str]:
    """Return the hosts of missing ranks that were there before."""
    found = (notes[rank] for rank in missing(notes, now, patience))
    return list(dict.fromkeys(note.host for note in found if note is not None))


def table(notes: list[RankNote | None], now: float, patience: float) -> list[str]:
    """Return a line for each rank: who waits for whom follows from who is missing, works alone,
    or is least far.
    """
    lost = missing(notes, now, patience)
    known = [note for note in notes if note is not None]
    behind = lost or [note.rank for note in known if note.local]
    if not behind and known:
        least = min((note.step, note.beats) for note in known)
        behind = [note.rank for note in known if (note.step, note.beats) == least]
        behind = [] if len(behind) == len(notes) else behind
    named = ", ".join(map(str, behind[:8])) + (
        f" and {len(behind) - 8} more" if len(behind) > 8 else ""
    )
    rows = [("rank", "host", "pid", "step", "phase", "last seen", "silent", "waits for", "stack")]
    for rank, note in enumerate(notes):
        waits = "-" if rank in behind or not behind else f"rank {named}"
        if note is None:
            rows.append((str(rank), "?", "?", "?", "never came", "never", "?", waits, "-"))
            continue
        seen = f"{now - note.seen:.0f} s ago"
        phase = note.phase + (" (no answer)" if rank in lost else "")
        rows.append(
            (
                str(rank),
                note.host,
                str(note.pid),
                str(note.step),
                phase,
                seen,
                f"{note.silent:.0f} s",
                waits,
                note.stack or "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _write(place: Path | None, name: str, content: str, otherwise: str | None) -> None:
    """Write a file of the report; where there is no place for it, say `otherwise`."""
    if place is not None:
        try:
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(content, encoding="utf-8")
            return
        except OSError:  # the folder's file system may be what hangs, or is full
            pass
    for line in (otherwise or "").splitlines():
        say(line)
