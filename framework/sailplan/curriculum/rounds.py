"""Rounds of mining on disk: a round is in force when it is whole, and a killed one changes nothing.

    FOLDER/round-00000040/round.json            step, patterns with their files and thresholds
    FOLDER/round-00000040/0.negatives.npy       int64 [records, k] positions, -1 where absent
    FOLDER/round-00000040/0.scores.npy          float32 [records, k] cosines
    FOLDER/CURRENT                              the round in force; switched last
    FOLDER/working/                             what an unfinished round has so far

Ranks write disjoint ranges of the arrays, which training maps: the processes of a node share one
copy, and a rank reads the rows of its own batches.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from sailplan.config.fields import JsonObject
from sailplan.data.negatives import ROUND
from sailplan.runtime.files import write_whole

CURRENT, WORKING, MODEL = "CURRENT", "working", "model"
KEPT = 2  # rounds that stay whatever the checkpoints


class Rounds:
    """The rounds of a stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """Return the folder of the round of a step of the stage."""
        return self.folder / f"round-{step:08d}"

    def working(self, step: int) -> Path:
        """Return the folder of an unfinished round."""
        return self.folder / WORKING / f"round-{step:08d}"

    def begin(self, step: int, model: str) -> JsonObject:
        """Return the patterns of a whole round of this model; {}: it is to be made, and what
        another model's unfinished one had is gone.
        """
        if (self.path(step) / ROUND).is_file():
            note = json.loads((self.path(step) / ROUND).read_text(encoding="utf-8"))
            if note["model"] == model:
                return dict(note["patterns"])
        note = self.working(step) / MODEL
        if not note.is_file() or note.read_text(encoding="utf-8") != model:
            shutil.rmtree(self.folder / WORKING, ignore_errors=True)
            write_whole(note, model)
        return {}

    def publish(self, step: int, model: str, patterns: JsonObject) -> None:
        """Put a round that is whole in force."""
        working, path = self.working(step), self.path(step)
        note = {"step": step, "model": model, "patterns": patterns}
        write_whole(working / ROUND, json.dumps(note, indent=1))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(working, path)
        write_whole(self.folder / CURRENT, path.name)
        shutil.rmtree(self.folder / WORKING, ignore_errors=True)

    def prune(self, needed: Iterable[int]) -> None:
        """Remove rounds but the last KEPT, and those that were in force after each of these numbers
        of steps: what a run that goes on from a checkpoint reads.
        """
        kept = {path for done in needed if (path := self.last(done)) is not None}
        kept |= {self.path(step) for step in sorted(self._whole())[-KEPT:]}
        for step in self._whole():
            if self.path(step) not in kept:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def last(self, done: int) -> Path | None:
        """Return the last whole round up to a step, None where there is none."""
        step = max((step for step in self._whole() if step <= done), default=None)
        return None if step is None else self.path(step)

    def _whole(self) -> list[int]:
        """Return the steps of the rounds that are whole."""
        return [
            int(match[1])
            for path in self.folder.glob("round-*")
            if (match := re.fullmatch(r"round-(\d+)", path.name)) and (path / ROUND).is_file()
        ]
