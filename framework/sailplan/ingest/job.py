"""One import as a job: what was asked for, whether a folder holds it already or in part, and
what came of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sailplan.config.fields import JsonObject
from sailplan.errors import BadDataError, ConfigurationError
from sailplan.ingest.media import Check
from sailplan.ingest.work import STATE, Outcome, Workshop
from sailplan.runtime.files import write_whole

RESULT, DROPPED, TOKENIZER = "import.json", "dropped.jsonl", "tokenizer.json"


@dataclass(frozen=True)
class ImportOptions:
    """The command line of `sailplan data import`. out: folder of the shards; None: data/NAME."""

    source: str
    name: str
    kind: str | None = None  # items | pairs | interactions
    columns: Mapping[str, str] = field(default_factory=dict)  # role -> column
    items: str | None = None  # interactions: the table of the items
    media: str | None = None
    out: str | None = None
    held_out: float = 0.1
    shard_size: int = 10_000  # rows
    workers: int = 1
    language: str = "en"
    check: Check = "decode"
    score_maximum: float = 1.0
    drop_limit: float = 0.01
    tokenizer: str | None = None

    @property
    def folder(self) -> Path:
        """Return the folder that the import writes."""
        return Path(self.out) if self.out else Path("data") / self.name

    @property
    def media_folder(self) -> Path | None:
        """Return the folder that names of files are relative to, where it was given."""
        return None if self.media is None else Path(self.media)

    def identity(self, files: Iterable[str]) -> JsonObject:
        """Return what the bytes depend on."""
        names = (
            "source",
            "name",
            "kind",
            "items",
            "media",
            "held_out",
            "shard_size",
            "language",
            "check",
            "score_maximum",
        )
        found: JsonObject = {name: getattr(self, name) for name in names} | {
            "columns": dict(self.columns)
        }
        for name in files:
            stat = os.stat(name)
            found[f"file {name}"] = [stat.st_size, stat.st_mtime_ns]
        return found


@dataclass
class Result:
    """What came of an import: data sets with their counts, and what was dropped.

    Kept as import.json.
    """

    job: JsonObject
    sets: dict[str, JsonObject] = field(
        default_factory=dict
    )  # name -> train, held_out, scored, ... of each data set
    rows: int = 0
    dropped: int = 0
    repaired: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    tokenizer: str | None = None
    tokens: int = 32  # that 95 of 100 texts need at most
    again: bool = False  # the folder held it all


class ImportJob:
    """The folder of an import, with its state.

    Raises ConfigurationError where it holds something else.
    """

    def __init__(
        self,
        options: ImportOptions,
        files: Iterable[str],
        progress: Callable[[int], None] = lambda rows: None,
        *,
        writes: bool = True,
    ) -> None:
        """Check and claim the folder. writes: whether the import writes shards into it."""
        self.options, self.folder, self.progress = options, options.folder, progress
        self.identity = options.identity(files)
        self.shops: list[tuple[Workshop, str]] = []
        self.result = Result(self.identity)
        state = self.folder / STATE / "job.json"
        try:
            for path in (self.folder / RESULT, state):
                if path.is_file():
                    self._expect_same(path)
            if (
                writes
                and not state.is_file()
                and not (self.folder / RESULT).is_file()
                and any(self.folder.glob("*.tar"))
            ):
                raise ConfigurationError(
                    f"{self.folder}: holds tars of something else; expected an empty folder: "
                    "choose another --name or --out"
                )
            write_whole(state, json.dumps({"job": self.identity}))
        except OSError as error:
            raise ConfigurationError(
                f"{self.folder}: cannot be written ({error.strerror or error}); choose another "
                "--out"
            ) from error

    def _expect_same(self, path: Path) -> None:
        found = json.loads(path.read_text(encoding="utf-8"))["job"]
        now = json.loads(json.dumps(self.identity))
        if found != now:
            other = next(name for name in {**found, **now} if found.get(name) != now.get(name))
            raise ConfigurationError(
                f"{self.folder}: holds another import ({other} was {found.get(other)}, is "
                f"{now.get(other)}); delete it, or choose another --name"
            )

    def finished(self) -> Result | None:
        """Return the result of this very import where the folder holds all of it."""
        path = self.folder / RESULT
        if not path.is_file():
            return None
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
        if any(
            len(list(Path(one["shards"]).glob("*.tar"))) != one["files"]
            for one in result.sets.values()
            if "files" in one
        ):
            return None
        shutil.rmtree(self.folder / STATE, ignore_errors=True)
        result.again = True
        return result

    def shop(self, folder: Path) -> Workshop:
        """Return processes that write into a folder of this import."""
        folder.mkdir(parents=True, exist_ok=True)
        return Workshop(folder, self.options.workers, progress=self.progress)

    def done(self, shop: Workshop, phase: str, outcome: Outcome) -> None:
        """Count a phase."""
        self.shops.append((shop, phase))
        result = self.result
        result.rows, result.dropped, result.repaired = (
            result.rows + outcome.rows,
            result.dropped + outcome.dropped,
            result.repaired + outcome.repaired,
        )
        for name, count in outcome.notes.items():
            result.notes[name] = result.notes.get(name, 0) + count

    def add_set(self, name: str, shards: Path, outcome: Outcome) -> None:
        """Count a data set. Raises BadDataError for one without records."""
        self.result.sets[name] = {
            "shards": str(shards),
            "files": len(list(shards.glob("*.tar"))),
            "splits": outcome.splits,
        }
        if outcome.notes.get("scored"):
            self.result.sets[name]["scored"] = True

    def check_dropped(self) -> None:
        """Put the dropped rows of all parts into one file.

        Raises BadDataError where they are more than the limit.
        """
        result, path = self.result, self.folder / DROPPED
        reasons: list[str] = []
        if result.dropped:
            temporary = path.with_suffix(".tmp")
            with open(temporary, "wb") as file:
                for shop, phase in self.shops:
                    for part in sorted((shop.folder / STATE / phase).glob("*.dropped")):
                        with open(part, "rb") as opened:
                            if not reasons:
                                reasons = _first_reasons(part)
                            shutil.copyfileobj(opened, file)
            os.replace(temporary, path)
        else:
            path.unlink(missing_ok=True)
        share = result.dropped / max(1, result.rows)
        if share > self.options.drop_limit:
            raise BadDataError(
                f"data import {self.options.source}: {result.dropped} of {result.rows} rows "
                f"dropped ({share:.1%}), expected at most "
                f"{self.options.drop_limit:.1%}; the first: {'; '.join(reasons)}; all are in "
                f"{path}; mend them, or allow more with --drop-limit"
            )
        for name, one in result.sets.items():
            if not sum(one["splits"].values()):
                raise BadDataError(
                    f"data import {self.options.source}: not one record for {name}; expected rows "
                    "with texts or media"
                )

    def finish(self) -> Result:
        """Keep the result, and clear the state away."""
        write_whole(
            self.folder / RESULT, json.dumps(vars(self.result) | {"again": False}, indent=1) + "\n"
        )
        for left in self.folder.rglob("*.tmp"):  # of workers that were killed
            left.unlink(missing_ok=True)
        for shop, _ in self.shops:
            shutil.rmtree(shop.folder / STATE, ignore_errors=True)
        shutil.rmtree(self.folder / STATE, ignore_errors=True)
        return self.result


def _first_reasons(path: Path) -> list[str]:
    """The first dropped rows of a part, as text."""
    with open(path, encoding="utf-8") as file:
        found = [json.loads(line) for line, _ in zip(file, range(3), strict=False)]
    return [f"{one['file']}:{one['line']}: {one['reason']}" for one in found]
