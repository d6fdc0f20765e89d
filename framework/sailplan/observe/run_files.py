"""The run folder's own records: metrics.jsonl, evaluation/*.json and stages.json.

metrics.jsonl has one object a line, `{"step", "stage", "time", name: value ...}`, and never a step
twice: a resumed run first drops the lines of steps that will be done again. Every rewrite goes
through a temporary file and a rename, so that a kill leaves the old file or the new one. JSON has
no NaN, so a value that is not finite is written as null.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from sailplan.config.fields import JsonObject
from sailplan.errors import ConfigurationError
from sailplan.observe.logger import Examples, Logger, Results, RunInfo, StageInfo, Value
from sailplan.runtime.environment import world_size_from_environment
from sailplan.runtime.files import write_whole
from sailplan.runtime.leaving import say

METRICS, PREVIOUS, STAGES, EVALUATION, QUARANTINE, SKIPPED = (
    "metrics.jsonl",
    "metrics.previous.jsonl",
    "stages.json",
    "evaluation",
    "quarantine.jsonl",
    "skipped_steps.jsonl",
)


def finite(value: object) -> object:
    """`value` with every float that is not finite replaced by None, inside mappings and lists
    too.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON to `path` atomically (temporary file in the same folder, then
    rename). What a full disk refuses is said, and left as it was.
    """
    text = json.dumps(finite(value), ensure_ascii=False, indent=1, allow_nan=False)
    try:
        write_whole(path, text)
    except OSError as error:
        say(f"{path}: cannot be written ({error.strerror or error}); training goes on")


def read_lines(path: Path) -> Iterator[JsonObject]:
    """The objects of a JSON-lines file; a last line cut short by a kill is left out.

    Raises ValueError naming file and line when a line before the last one is not an object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            complete = line.endswith(b"\n")
            try:
                value = json.loads(line)
            except ValueError as error:
                if complete:
                    raise ValueError(
                        f"{path}: line {number} is not JSON ({error}); remove the line or restore "
                        "the file"
                    ) from error
                return
            if not isinstance(value, dict):
                raise ValueError(
                    f"{path}: line {number} is not a JSON object; remove the line or restore the "
                    "file"
                )
            yield value


def drop_after(path: Path, step: int) -> int:
    """Rewrite a metrics file without the lines of steps after `step` (and without a broken last
    line); returns lines kept.
    """
    kept = 0
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for line in read_lines(path):
            if line.get("step", 0) <= step:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                kept += 1
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return kept


def _kept_until(path: Path, step: int) -> int:
    """Do as `drop_after`. Raises ConfigurationError for a file that is none of ours."""
    try:
        return drop_after(path, step)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


class Lines:
    """A file that grows by whole lines, each on the disk's side when `add` returns: a crash loses
    no finished step. What a full disk refuses is kept, said once, and written with a later line.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._kept = path, list[bytes]()
        self._file = path.open("ab", buffering=0)
        self._whole = self._file.tell()  # bytes of whole lines

    def add(self, line: str) -> None:
        """Write a line, and those that could not be written before."""
        self._kept.append(line.encode() + b"\n")
        content = b"".join(self._kept)
        try:
            written = self._file.write(content)
            if written != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._whole)  # no part of a line stays
            if len(self._kept) == 1:
                say(
                    f"{self._path}: cannot be written ({error.strerror or error}); training goes "
                    "on, and lines are kept until it can"
                )
            return
        self._whole += len(content)
        self._kept = []

    def close(self) -> None:
        """Close the file; says how many lines are lost."""
        if self._kept:
            say(f"{self._path}: {len(self._kept)} lines could not be written")
        self._file.close()


class RunFiles(Logger):
    """Writes the records of a run into its folder.

    A run that is not resumed starts afresh (an older metrics.jsonl is kept once as
    metrics.previous.jsonl); a resumed one continues after its step. `stages.json` holds a stage's
    wall seconds, including steps that were repeated after a stop, and the backends of its losses:
    those foretold until a step has been made, then all that its steps have gone through.
    """

    def __init__(self, run: RunInfo) -> None:
        super().__init__(run)
        folder, resumed_step = run.folder, run.resumed_step
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.stages: list[JsonObject] = []
        self.ran: dict[str, set[str]] = {}  # objective -> backends of the stage's steps so far
        self.started = time.monotonic()
        metrics = folder / METRICS
        if resumed_step is None:
            if metrics.exists():
                os.replace(metrics, folder / PREVIOUS)
        else:
            kept = _kept_until(metrics, resumed_step)
            if kept < resumed_step:
                say(
                    f"{metrics}: found {kept} lines of steps, expected {resumed_step}; the others are "
                    "lost (a full disk, a host that crashed): charts have a gap, training goes on"
                )
            if (folder / STAGES).exists():
                stages = json.loads((folder / STAGES).read_text(encoding="utf-8"))
                self.stages = [stage for stage in stages if stage["first_step"] <= resumed_step + 1]
        for records in (folder / QUARANTINE, folder / SKIPPED):
            if records.exists():
                _kept_until(records, resumed_step or 0)
        self._drop_evaluations(-1 if resumed_step is None else resumed_step)
        self.lines = Lines(metrics)

    def _drop_evaluations(self, step: int) -> None:
        for path in (self.folder / EVALUATION).glob("step-*.json"):
            number = re.fullmatch(r"step-(\d+)", path.stem)
            if number and int(number.group(1)) > step:
                path.unlink()

    def start_stage(self, stage: StageInfo) -> None:
        self.started, self.ran = time.monotonic(), {}
        entry = {
            "name": stage.name,
            "first_step": stage.first_step,
            "last_step": stage.last_step,
            "seconds": 0.0,
            "data": list(stage.data),
            "weights": dict(stage.data),
            "objectives": dict(stage.objectives),
            "backends": dict(stage.backends),
            "learning_rate": list(stage.learning_rate) if stage.learning_rate else None,
            "world_size": world_size_from_environment(),
        }
        known = {old["name"]: position for position, old in enumerate(self.stages)}
        if stage.name in known:
            entry["seconds"] = self.stages[known[stage.name]]["seconds"]
            self.stages[known[stage.name]] = entry
        else:
            self.stages.append(entry)
        write_json(self.folder / STAGES, self.stages)

    def _add_seconds(self) -> None:
        now = time.monotonic()
        if self.stages:
            self.stages[-1]["seconds"] = round(self.stages[-1]["seconds"] + now - self.started, 3)
            write_json(self.folder / STAGES, self.stages)
        self.started = now

    def log_step(self, step: int, stage: str, values: Mapping[str, Value]) -> None:
        line = {"step": step, "stage": stage, "time": round(time.time(), 3), **values}
        self.lines.add(json.dumps(finite(line), ensure_ascii=False, allow_nan=False))
        self._note_backends(values)

    def _note_backends(self, values: Mapping[str, Value]) -> None:
        """A kernel that the device refuses goes another way in the middle of a run: the stage
        names all ways that were taken.
        """
        if not self.stages:
            return
        for key, backend in values.items():
            if key.startswith("backend/"):
                self.ran.setdefault(key.removeprefix("backend/"), set()).update(
                    str(backend).split(" + ")
                )
        known = self.stages[-1]["backends"]
        found = known | {name: " + ".join(sorted(ran)) for name, ran in self.ran.items()}
        if found != known:
            self.stages[-1]["backends"] = found
            write_json(self.folder / STAGES, self.stages)

    def log_evaluation(self, step: int, stage: str, results: Results, examples: Examples) -> None:
        value = {"step": step, "stage": stage, "tasks": results, "examples": examples}
        write_json(self.folder / EVALUATION / f"step-{step:08d}.json", value)
        self._add_seconds()

    def finish_stage(self, stage: StageInfo) -> None:
        self._add_seconds()

    def close(self, finished: bool) -> None:
        self._add_seconds()
        self.lines.close()
