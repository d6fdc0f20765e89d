"""One folder of vectors written by several jobs, such as the tasks of a job array: part K of N
embeds a contiguous range of the folder's shards, and no part waits for another.

parts.json         what the parts are of, written by the first; a part that differs is refused
part-0002/         where a part works, with a lock against a second job of its number
part-0002.json     rows of its shards; written when they are there
embeddings.json    written by every part that finds all others done, with equal content

A part writes its own note before it looks for the others', so of two that end at the same time at
least one finds all. Where a shared file system shows notes late, any part that is run again
publishes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sailplan.config.fields import JsonObject
from sailplan.errors import ConfigurationError
from sailplan.export.vector_folder import BEGUN, MANIFEST
from sailplan.runtime.claim import Claim
from sailplan.runtime.files import write_whole
from sailplan.runtime.main_rank import on_main
from sailplan.runtime.process import Parallel

PARTS = "parts.json"
NAMES = {"model": "weights or model settings", "records": "records", "parts": "number of parts"}

Counts = list[list[int]]  # of each shard: rows kept, left out, with a label


@dataclass(frozen=True)
class Part:
    """Part `number` (from 0) of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return the part that K/N names. Raises ConfigurationError for another text."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or int(found[1]) >= int(found[2]):
            raise ConfigurationError(
                f"--part {text}: expected K/N with K from 0 to N - 1, such as 0/8"
            )
        return cls(int(found[1]), int(found[2]))

    def shards(self, total: int) -> range:
        """Return this part's of `total` shards; none, where there are fewer shards than parts."""
        return range(total * self.number // self.count, total * (self.number + 1) // self.count)


class PartFolder:
    """A folder of vectors, as one of its parts sees it."""

    def __init__(self, out: Path, part: Part, about: JsonObject, parallel: Parallel) -> None:
        """about: what all parts must have in common."""
        self.out, self.part, self.parallel = out, part, parallel
        self.about = about | {"parts": part.count}
        self.work = out / f"part-{part.number:04d}"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other jobs out of this part. Collective.

        Raises ConfigurationError where one is at work, and where the folder is of something else.
        """
        claims: list[Claim] = []
        remedy = f"wait for it, end it, or give another --part than {self._name()}"
        on_main(
            self.parallel,
            f"claiming {self.work}",
            lambda: claims.append(Claim(self.work, remedy=remedy)),
        )
        try:
            on_main(self.parallel, f"looking into {self.out}", self._agree)
            yield
        finally:
            for one in claims:
                one.release()

    def done(self) -> Counts | None:
        """Return the counts of this part's shards, where an earlier job finished it. Collective."""

        def read() -> Counts | None:
            note = self._note(self.part.number)
            return _counts(note) if note.is_file() else None

        found: Counts | None = on_main(self.parallel, f"looking into {self.out}", read)
        return found

    def finish(self, counts: Counts, manifest: Callable[[Counts], JsonObject]) -> JsonObject:
        """Note that this part is done; publish where all are, and return the manifest, else what
        is waited for. Collective.

        manifest: makes the manifest of the counts of all shards.
        """

        def finish() -> JsonObject:
            write_whole(self._note(self.part.number), json.dumps(counts))
            shutil.rmtree(self.work, ignore_errors=True)
            names = set(os.listdir(self.out))
            notes = [self._note(number) for number in range(self.part.count)]
            missing = [place for place, note in enumerate(notes) if note.name not in names]
            if missing:
                return {
                    "part": self._name(),
                    "shards": len(counts),
                    "rows": sum(kept for kept, _, _ in counts),
                    "waiting_for": [f"{number}/{self.part.count}" for number in missing],
                }
            found = manifest([row for note in notes for row in _counts(note)])
            own = self.out / f"embeddings-of-part-{self.part.number:04d}.json"
            write_whole(own, json.dumps(found, indent=1))
            os.replace(own, self.out / MANIFEST)  # another part's has the same content
            return found

        found: JsonObject = on_main(self.parallel, f"finishing part {self._name()}", finish)
        return found

    # ---------------------------------------------------------------- parts
    def _name(self) -> str:
        return f"{self.part.number}/{self.part.count}"

    def _note(self, number: int) -> Path:
        return self.out / f"part-{number:04d}.json"

    def _agree(self) -> None:
        """Write what the parts are of, or compare."""
        agreed = self.out / PARTS
        if not agreed.is_file():
            if (self.out / MANIFEST).is_file() or (self.out / BEGUN).is_file():
                raise ConfigurationError(
                    f"--part {self._name()}: {self.out} holds what a `sailplan embed` without --part "
                    "wrote, expected an empty folder: remove it or give another --out"
                )
            own = self.work / PARTS
            write_whole(own, json.dumps(self.about))
            try:
                os.link(own, agreed)  # unlike a rename, it does not replace what came first
            except FileExistsError:
                pass
            finally:
                own.unlink()
        known = json.loads(agreed.read_text(encoding="utf-8"))
        differing = [key for key in self.about if known.get(key) != self.about[key]]
        if differing:
            raise ConfigurationError(
                f"--part {self._name()}: {self.out} holds parts of another embedding, with another "
                f"{' and '.join(NAMES.get(key, key) for key in differing)}"
                f"{self._numbers(known)}: start all parts with the same N, settings and "
                "--checkpoint, or give another --out"
            )

    def _numbers(self, known: JsonObject) -> str:
        found = known.get("parts")
        different = found != self.part.count
        return f" (found {found}, expected {self.part.count})" if different else ""


def _counts(note: Path) -> Counts:
    found: Counts = json.loads(note.read_text(encoding="utf-8"))
    return found


def clear_parts(out: Path) -> None:
    """Remove what parts left in a folder that is written as a whole.

    Raises ConfigurationError where not all of them are done.
    """
    if not (out / PARTS).is_file():
        return
    if not (out / MANIFEST).is_file():
        raise ConfigurationError(
            f"{out}: holds unfinished parts of an embedding: run those that are missing, remove the "
            "folder, or give another --out"
        )
    for path in out.glob("part-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / PARTS).unlink()
