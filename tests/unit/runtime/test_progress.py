"""Progress: nothing of short work, plain lines when piped, one line on a terminal, and only where it
was asked for.
"""

from __future__ import annotations

import sys
import threading
import time

import pytest

from sailplan.runtime import progress
from sailplan.runtime.progress import Meter


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def worked(seconds: int, total: int | None = 1000) -> None:
    clock = Clock()
    meter = Meter("encoding things/item", total, "rows", clock)
    for _ in range(10 * seconds):
        clock.now += 0.1
        meter.advance(2)
    meter.close()


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    worked(2)
    assert capsys.readouterr() == ("", "")


def test_piped_it_is_a_plain_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    worked(25)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and "\r" not in err and len(lines) == 3, err
    assert lines[0] == "encoding things/item: 60 of 1,000 rows, 20 rows/s, 47 s left"
    assert lines[2].endswith("rows, 20 rows/s, 27 s left")


def test_a_terminal_has_one_line_that_is_gone_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    worked(5, total=None)
    err = capsys.readouterr().err
    drawn = err.split("\r")
    assert "\n" not in err and len(drawn) > 8 and drawn[-1] == "" and not drawn[-2].strip()
    assert drawn[2].startswith("encoding things/item: 6") and "left" not in err


def test_only_the_first_rank_of_a_command_shows_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    for shown, rank, lines in ((False, "0", 0), (True, "1", 0), (True, "0", 1)):
        monkeypatch.setattr(progress, "_shown", shown)
        monkeypatch.setenv("RANK", rank)
        with progress.progress("mining", 4, "rows") as advance:
            advance(1)
        assert len(capsys.readouterr().err.splitlines()) == lines, (shown, rank)


@pytest.mark.parametrize("counted", [False, True])
def test_a_command_in_which_nothing_counts_says_what_it_is_at(
    counted: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.05)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.1)
    monkeypatch.delenv("RANK", raising=False)
    before = threading.active_count()
    with progress.showing_progress("report"), progress.progress("counting", 99, "rows") as advance:
        for _ in range(50):
            time.sleep(0.01)
            if counted:
                advance(1)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and "\r" not in err and len(lines) >= 2, lines
    start = "counting: " if counted else "report: for 0 s so far"
    assert sum(line.startswith(start) for line in lines) >= 2, lines
    assert threading.active_count() == before, "its thread is gone"
    with progress.progress("after", 1, "rows") as advance:
        advance(1)
    assert not capsys.readouterr().err, "nothing is shown after the command"
